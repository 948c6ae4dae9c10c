"""Language models: the loss for each token of a block, and held-out NLL.

Shapes: R rows (blocks), L positions, d width.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.aligned import AlignedStates
from compress.data.blocks import IGNORED, DomainBlocks, labels_of
from compress.data.evals import evaluate_rows, evaluation_rows
from compress.data.general import general_rows
from compress.data.training_text import heldout_batches
from compress.head import fit_temperature, label_nll
from compress.models.body import Body, causal_lm
from compress.models.language import load_model
from compress.models.students import save_student
from compress.states import AnyStates, SparseStates, TeacherStates, teacher_statistics
from compress.tasks.continuations import against_mixture, calibration, continuations
from compress.tasks.language_models import LanguageModels
from compress.tasks.language_step import LanguageStep
from compress.tasks.saved import Saved
from compress.teachers.served import ServedTeacher
from limbeck.contract.data.evals import EVALS, losses, shares
from limbeck.contract.data.heldout import (
    CALIBRATION,
    HELDOUT,
    Blocks,
    mean_nll,
    save_calibration,
    save_heldout,
)
from limbeck.contract.errors import DataError
from limbeck.contract.progress import task
from limbeck.contract.recipe import FittedCalibration, FixedCalibration, FreshStudent, LoraStudent
from limbeck.contract.results.student import LanguageFigures, Parameters, TeacherResult
from limbeck.contract.sources.models import context_in
from limbeck.contract.sources.tokenizer import load_tokenizer

_CALIBRATION_ROWS = 24  # training blocks that travel with a student, for the export's calibration

# Token ids and labels [R, L] -> NLL of each row [R], in nats.
Scorer = Callable[[Tensor, Tensor], Tensor]


class LanguageTask(LanguageModels):
    """See `compress.tasks.Task`."""

    unit = "tokens"
    loss_unit = "nats a token"
    selects: str | None = "mean_nll"

    # Training ----------------------------------------------------------------------------------

    def step(self, index: int, *, progress: float) -> LanguageStep:
        batch = self.batch(index)
        if self.own is None:
            return LanguageStep(self, index, batch, progress)
        processes = self.accelerator.num_processes
        with self.accelerator.autocast():
            written = self.own.write(
                self.student.model, index, batch, rank=self.accelerator.process_index,
                processes=processes,
            )  # fmt: skip
        return LanguageStep(self, index, batch, progress, written)

    # Measuring ---------------------------------------------------------------------------------

    def measure(self, label: str) -> dict[str, Any]:
        """Held-out NLL in nats a token by domain, and the mean over domains."""
        nll = per_token(self.student_nll(label=label), self.blocks)
        return {"nll": nll, "mean_nll": mean_nll(nll)}

    def student_nll(self, *, label: str) -> dict[str, list[float]]:
        """Held-out NLL of the student as it is now, in the number type of its training.

        In nats, summed over each block, by domain.
        """

        def score(ids_RL: Tensor, labels_RL: Tensor) -> Tensor:
            with self.accelerator.autocast():
                found: Tensor = self.student(
                    ids_RL, lambda hidden_RLd, _: self._nll(hidden_RLd, labels_RL)
                )
            return found

        self.student.eval()
        nll = evaluate(score, self.blocks, device=self.device, label=label)
        self.student.train()
        return nll

    def _nll(self, hidden_RLd: Tensor, labels_RL: Tensor) -> Tensor:
        head = self.student_head()
        with torch.autocast(self.device.type, enabled=False):
            return label_nll(hidden_RLd.to(head.weight_Vd.dtype), head, labels_RL)

    def measure_teacher(self, k: int) -> TeacherResult:
        """Held-out NLL of teacher ``k`` in nats a token, and its calibration temperature."""
        sums = self.teacher_losses(k)
        nll = per_token(sums, self.blocks)
        # The bench does not read these again.
        elsewhere = isinstance(self.folders[k], ServedTeacher) or self.pairs[k] is not None
        blocks = sums if elsewhere else None
        coverage = self.coverage.get(self.names[k])
        return TeacherResult(
            self._temperature(k),
            nll=nll,
            mean_nll=mean_nll(nll),
            blocks=blocks,
            bits_per_byte=per_byte(sums, self.blocks),
            added_tokens=list(self.pairs.differ[k]) or None,
            coverage={name: asdict(found) for name, found in coverage.items()}
            if coverage
            else None,
        )

    def teacher_losses(self, k: int) -> dict[str, list[float]]:

        def score(ids_RL: Tensor, labels_RL: Tensor) -> Tensor:
            states = self._teacher_states(k, ids_RL, labels_RL)
            if states.spans is not None:
                return self._aligned_nll(k, states, labels_RL)
            if isinstance(states, SparseStates):
                return -(states.label_logp_RL.double() * (labels_RL != IGNORED)).sum(1)
            assert isinstance(states, TeacherStates)
            return label_nll(states.hidden_RLd, states.head, labels_RL)

        sums = evaluate(score, self.blocks, device=self.device, label=self.names[k])
        return sums if self.pairs[k] is None else self._of_all_rows(k, sums)

    def _of_all_rows(self, k: int, sums: dict[str, list[float]]) -> dict[str, list[float]]:
        """Rows of which teacher ``k`` judges no byte have the nats a byte of their domain.

        Raises `DataError` where it judges no row of a domain.
        """
        found = dict(sums)
        for domain in self.blocks:
            nats_N, size_N = np.array(sums[domain.name]), domain.heldout.utf8_bytes
            known_N = ~np.isnan(nats_N)
            if known_N.all():
                continue
            if not size_N[known_N].sum():
                raise DataError(
                    f"teachers.{k}: {self.names[k]} judges no held-out text of {domain.name}, so "
                    "its loss there is not known: its tokens do not meet the student's there. "
                    "Leave the teacher or the domain out, or hold out more text (data.heldout)."
                )
            rate = nats_N[known_N].sum() / size_N[known_N].sum()
            found[domain.name] = np.where(known_N, nats_N, rate * size_N).tolist()
        return found

    def teacher_seconds(self, k: int) -> float:
        """See `compress.tasks.Task`. Median of three micro-batches."""
        rows = self.recipe.training.micro_batch
        ids_RL, labels_RL = (part[:rows].to(self.device) for part in self.batch(0)[1:])
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            self._teacher_states(k, ids_RL, labels_RL)
            seconds.append(time.monotonic() - started)
        return statistics.median(seconds) / ids_RL.numel()

    def _aligned_nll(self, k: int, states: AnyStates, labels_RL: Tensor) -> Tensor:
        """NLL of each row ``[R]`` of a teacher with another tokenizer, in nats of all its labels.

        Bytes that the teacher does not read as they are count as much as the others; NaN where it
        reads none.
        """
        pair, spans = self.pairs[k], states.spans
        assert pair is not None
        assert spans is not None
        sizes = torch.tensor([len(piece) for piece in pair.aligner.own.of], dtype=torch.float64)
        valid = (labels_RL != IGNORED).cpu()
        last = len(sizes) - 1
        bytes_RL = sizes[labels_RL.cpu().clamp(min=0, max=last)] * valid
        given, size = (bytes_RL * (spans.start_RL.cpu() >= 0)).sum(1), bytes_RL.sum(1)
        evidence = teacher_statistics([states], labels_RL)[1][0].double().cpu().sum(1)
        # A row of special tokens alone has no bytes.
        return -evidence * torch.where(size > 0, size / given, 1.0).nan_to_num(posinf=math.nan)

    def describe_teacher(self, report: TeacherResult) -> str:
        nll = report.nll or {}
        figures = "  ".join(f"{domain} {value:.3f}" for domain, value in nll.items())
        unit = "nats a token"
        if report.coverage:  # another tokenizer
            bits = report.bits_per_byte or {}
            shown = "  ".join(f"{domain} {value:.3f}" for domain, value in bits.items())
            unit = f"nats for each token of the student ({shown} bits a byte)"
        return f"{figures} {unit}, calibration temperature {report.temperature:.3f}"

    def _teacher_states(self, k: int, ids_RL: Tensor, labels_RL: Tensor) -> AnyStates:
        with self.accelerator.autocast():
            return self.teachers.states(ids_RL, only=k, labels_RL=labels_RL)[0][0]

    def _temperature(self, k: int) -> float:
        match self.recipe.fusion.calibration:
            case FixedCalibration(values=values):
                return values[self.names[k]]
            case FittedCalibration(bounds=bounds):
                pass
            case _:
                return 1.0
        batches = [batch for b in self.blocks for batch in heldout_batches(b.heldout)[:2]]
        states = [
            self._teacher_states(k, ids.to(self.device), labels.to(self.device))
            for ids, labels in batches
        ]
        if self.pairs[k] is not None:  # of its own tokens, and rows of other lengths
            aligned = [s for s in states if isinstance(s, AlignedStates)]
            width = max(s.hidden_RMd.shape[1] for s in aligned)
            hidden = [_padded(s.hidden_RMd, width, 0.0) for s in aligned]
            wanted = [_padded(s.alignment.labels_RM, width, IGNORED) for s in aligned]
        else:
            dense = [s for s in states if isinstance(s, TeacherStates)]
            hidden = [s.hidden_RLd for s in dense]
            wanted = [labels.to(self.device) for _, labels in batches]
        assert not isinstance(states[0], SparseStates), "the recipe's check refuses them"
        return fit_temperature(torch.cat(hidden), states[0].head, torch.cat(wanted), bounds=bounds)

    def losses(self, label: str) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        labels = {b.name: labels_of(b.heldout.input_ids, b.heldout.scored) for b in self.blocks}
        counts = {name: (found != IGNORED).sum(1).tolist() for name, found in labels.items()}
        return self.student_nll(label=label), counts

    def further_figures(self) -> dict[str, float]:
        """Calibration, the short evaluations, continuations of held-out text, and the distance to
        a mixture of several teachers."""
        batches = [heldout_batches(b.heldout) for b in self.blocks]
        found = calibration(self, batches) | self._evaluations() | continuations(self, batches)
        return found | (against_mixture(self, batches) if len(self.teachers) > 1 else {})

    @functools.cached_property
    def evaluation_rows(self) -> dict[str, Blocks]:
        """Rows of the short evaluations, by name."""
        longest = context_in(causal_lm(self.student.model).config.to_dict()) or sys.maxsize
        return evaluation_rows(
            load_tokenizer(self.folder), self.blocks, longest=longest, vocabulary=self.vocabulary
        )

    def _evaluations(self) -> dict[str, float]:
        """Shares of right answers and losses of the student as it is now."""
        head = self.student_head()

        def states(ids_L: Tensor) -> Tensor:
            with self.accelerator.autocast():
                hidden = self.student(ids_L[None].to(self.device), lambda hidden_RLd, _: hidden_RLd)
            last: Tensor = hidden[0]
            return last.to(head.weight_Vd.dtype)

        self.student.eval()
        found = evaluate_rows(self.evaluation_rows, states, head)
        self.student.train()
        labels = {name: rows.scored.sum(1).tolist() for name, rows in self.evaluation_rows.items()}
        right = {name: statistics.fmean(rows) for name, rows in shares(labels, found).items()}
        return right | {f"{name}_loss": loss for name, loss in losses(labels, found).items()}

    # Saving ------------------------------------------------------------------------------------

    def teacher_entries(self) -> list[dict[str, Any]]:
        return [
            f.entry(temperature) | self.sources["teachers"][f.name]
            for f, temperature in zip(self.folders, self.temperatures, strict=True)
        ]

    def save(self, folder: Path, best: Mapping[str, Tensor], *, seen: int, best_step: int) -> Saved:
        model = self.student.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        save_student(model, best, tokenizer_folder=self.folder, out=folder, begin=self.begin)
        if self.importance is not None:
            save_file(self.importance.tensors(), folder / "importance.safetensors")
        save_heldout(folder / HELDOUT, {b.name: b.heldout for b in self.blocks})
        save_calibration(folder / CALIBRATION, self._calibration_rows())
        sums, total = self._merged_nll(folder / "model")
        nll = per_token(sums, self.blocks)
        save_heldout(folder / EVALS, self.evaluation_rows)
        has_adapter = isinstance(self.recipe.student, LoraStudent)
        if has_adapter and self.start is not None:
            has_adapter = self.start.join_adapter(folder / "adapter", self.folder)
        figures = LanguageFigures(
            nll=nll,
            mean_nll=mean_nll(nll),
            bits_per_byte=per_byte(sums, self.blocks),
            tokens=seen,
            best_step=best_step,
            base=str(self.folder.resolve()) if has_adapter else None,
            start=self.start.described() if self.start is not None else None,
            base_evals=self._evals_of_base(),
        )
        return Saved(
            Parameters(total=total, trained=trained),
            shrink=self.kept or None,
            sources={name: self.sources[name] for name in ("base", "texts")},
            language=figures,
        )

    def _calibration_rows(self) -> list[npt.NDArray[np.int32]]:
        """Training text, and as much text of other kinds."""
        width, tokenizer = self.recipe.data.block, load_tokenizer(self.folder)
        others = general_rows(tokenizer, width=width, vocabulary=self.vocabulary)
        return self.text.first_texts(_CALIBRATION_ROWS) + others

    def _merged_nll(self, folder: Path) -> tuple[dict[str, list[float]], int]:
        """Held-out NLL of a saved student in fp32, as `student_nll`, and its parameters."""
        merged = Body(load_model(folder, device=self.device))

        def score(ids_RL: Tensor, labels_RL: Tensor) -> Tensor:
            return label_nll(merged.states(ids_RL)[0], merged.head, labels_RL)

        label = "student, merged, fp32"
        sums = evaluate(score, self.blocks, device=self.device, label=label)
        return sums, merged.model.num_parameters()

    def _evals_of_base(self) -> dict[str, dict[str, list[float]]] | None:
        """The base's answers to the short evaluations; None for a student without a base."""
        if isinstance(self.recipe.student, FreshStudent):
            return None
        base = Body(load_model(self.folder, device=self.device))

        def states(ids_L: Tensor) -> Tensor:
            return base.states(ids_L[None].to(self.device))[0][0]

        return evaluate_rows(self.evaluation_rows, states, base.head)


@torch.no_grad()
def evaluate(
    score: Scorer, blocks: Sequence[DomainBlocks], *, device: torch.device, label: str
) -> dict[str, list[float]]:
    """Return held-out NLL in nats, summed over each block, by domain."""
    nll: dict[str, list[float]] = {}
    with task(f"held-out text: {label}", sum(len(b.heldout) for b in blocks)) as progress:
        for domain in blocks:
            nll[domain.name] = []
            for ids, labels in heldout_batches(domain.heldout):
                nll[domain.name] += score(ids.to(device), labels.to(device)).tolist()
                progress.advance(len(ids))
    return nll


def _padded(values: Tensor, width: int, filling: float) -> Tensor:
    """Lengthen the second dimension to ``width``."""
    return torch.nn.functional.pad(
        values.movedim(1, -1), (0, width - values.shape[1]), value=filling
    ).movedim(-1, 1)


def per_byte(
    nll: Mapping[str, Sequence[float]], blocks: Sequence[DomainBlocks]
) -> dict[str, float]:
    """Return bits a byte by domain, from sums over blocks in nats.

    Domains whose labels are special tokens alone have no bytes, and are left out.
    """
    sizes = {b.name: int(b.heldout.utf8_bytes.sum()) for b in blocks}
    return {n: sum(sums) / math.log(2) / sizes[n] for n, sums in nll.items() if sizes[n]}


def per_token(
    nll: Mapping[str, Sequence[float]], blocks: Sequence[DomainBlocks]
) -> dict[str, float]:
    """Return nats a token by domain, from sums over blocks."""
    counts = {
        b.name: int((labels_of(b.heldout.input_ids, b.heldout.scored) != IGNORED).sum())
        for b in blocks
    }
    return {name: sum(sums) / counts[name] for name, sums in nll.items()}
