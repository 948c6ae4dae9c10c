"""The one training loop, read from top to bottom: set up, fit, evaluate, save.

Kept on disk beside the student until it is complete: a checkpoint that makes an interrupted run end in the same bits,
and the log. Budget in tokens; the number of micro-batches and processes changes nothing, because every term is divided
by the label count of the global batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast
from safetensors.torch import save_file
from torch import Tensor

from compress.data.blocks import IGNORED, DomainBlocks, labels_of, load_blocks, training_order
from compress.features import Projections, feature_loss, layer_pairs
from compress.head import Head, fit_temperature, label_nll
from compress.host import give_memory_back, prepare_host
from compress.loss import FusionTerms, fused_loss
from compress.models.attention import use_short_attention
from compress.models.body import Body, causal_lm
from compress.models.language import (
    DTYPES,
    cast_frozen,
    load_model,
    load_tokenizer,
    require_same_tokenizer,
    resolve_device,
)
from compress.models.sharded import like, whole
from compress.models.shrink import Importance
from compress.models.students import (
    Student,
    build_model,
    load_trainable_state,
    save_student,
    student_folder,
    trainable_state,
)
from compress.states import SparseStates, TeacherStates, teacher_statistics
from compress.teachers.cache import CachedTeachers
from compress.teachers.live import TeacherFolder, Teachers, teacher_folders
from compress.weights import span_of
from limbeck.contract.artifact import Artifact, open_artifact, work_folder, write_artifact
from limbeck.contract.errors import ArtifactError, DivergenceError, RecipeError
from limbeck.contract.files import disk_full_is_a_user_error, write_atomically
from limbeck.contract.heldout import (
    CALIBRATION,
    HELDOUT,
    Blocks,
    mean_nll,
    save_calibration,
    save_heldout,
)
from limbeck.contract.licences import sources_of
from limbeck.contract.machine import host
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import (
    EncoderTraining,
    FittedCalibration,
    FixedCalibration,
    LoraStudent,
    NoCache,
    Recipe,
    ShrinkStudent,
    Training,
    fingerprint,
)

CHECKPOINT, LOG, BOARD = "checkpoint.pt", "log.jsonl", "tensorboard"
_CALIBRATION_ROWS = 24  # training blocks that travel with a student, for the export's calibration


def train(
    *, recipe: Recipe, out: Path, products: Mapping[str, Path], key: str, parents: Mapping[str, str]
) -> Artifact:
    """Train the recipe's student and write its artifact to ``out``. See `compress.distill`."""
    started = time.monotonic()
    work = work_folder(out)
    run = setup(recipe=recipe, products=products, work=work, key=key)
    # Now, and not when it is over: folders may be gone by then.
    known = sources_of(recipe, base=run.tokenizer_folder, teachers=[f.whole for f in run.folders])
    reports = measure_teachers(run)
    prepared = time.monotonic() - started
    state = fit(run)

    if run.accelerator.is_main_process:
        spent = prepared + state.seconds
        _save(run, state, reports, known, out=out, key=key, parents=parents, spent=spent)
        shutil.rmtree(work)
    run.accelerator.wait_for_everyone()
    return open_artifact(out, kind="student", verify=False)


def _save(
    run: Run, state: State, reports: Mapping[str, Any], known: Mapping[str, Any], *, out: Path, key: str,
    parents: Mapping[str, str], spent: float,
) -> None:  # fmt: skip
    """Write the artifact with the best weights, measured again as they will be loaded: merged, in fp32."""
    started, recipe = time.monotonic(), run.recipe
    give_memory_back()  # the student is about to be loaded a second time
    model = run.student.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with write_artifact(out, kind="student", key=key, parents=parents, recipe=recipe) as draft:
        save_student(model, state.best, tokenizer_folder=run.tokenizer_folder, out=draft.folder)
        if run.importance is not None:
            save_file(run.importance.tensors(), draft.folder / "importance.safetensors")
        save_heldout(draft.folder / HELDOUT, {b.name: b.heldout for b in run.blocks})
        save_calibration(
            draft.folder / CALIBRATION,
            _training_rows(run.blocks, count=_CALIBRATION_ROWS, seed=recipe.seed),
        )
        entries = [
            f.entry(reports[f.name]["temperature"]) | known["teachers"][f.name] for f in run.folders
        ]
        (draft.folder / "teachers.json").write_text(json.dumps(entries, indent=1))
        shutil.copy(run.work / LOG, draft.folder / LOG)
        if run.board is not None:
            run.board.close()
            shutil.copytree(run.work / BOARD, draft.folder / BOARD)
        merged = Body(load_model(draft.folder / "model", device=run.accelerator.device))
        sums = evaluate(
            lambda ids, labels: label_nll(merged.states(ids)[0], merged.head, labels),
            run.blocks, device=run.accelerator.device, label="student, merged, fp32",
        )  # fmt: skip
        nll = per_token(sums, run.blocks)
        draft.result = {
            "nll": nll,
            "mean_nll": mean_nll(nll),
            "teachers": reports,
            "tokens": state.tokens,
            "steps": state.step,
            "best_step": state.best_step,
            "seconds": round(spent + time.monotonic() - started, 1),
            "parameters": {"trained": trained, "total": merged.model.num_parameters()},
            "precision": run.precision,
            "device": str(run.accelerator.device),
            "shrink": run.kept or None,
            "base": str(run.tokenizer_folder.resolve())
            if isinstance(recipe.student, LoraStudent)
            else None,
            "sources": {name: known[name] for name in ("base", "texts")},
        }


def setup(
    *, recipe: Recipe, products: Mapping[str, Path], work: Path, key: str, model: Any = None
) -> Run:
    """Load teachers, text and student, and check that they fit together. ``work`` holds checkpoint and log.

    ``model`` is a causal LM to go on training; none makes the recipe's student.
    """
    config = recipe.training
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    prepare_host(config.threads)
    torch.manual_seed(recipe.seed)
    AcceleratorState._reset_state()  # a teacher's own recipe may have run in this process with another precision
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision)
    )
    require_share_for_all(
        recipe,
        processes=accelerator.num_processes,
        sharded=accelerator.distributed_type == DistributedType.FSDP,
    )
    with accelerator.main_process_first():  # the first one fills the cache, the others read it
        folders = teacher_folders(recipe, products)
        folder = student_folder(recipe, [f.tokenizer for f in folders])
        if folders:
            require_same_tokenizer(
                {"the student": folder, **{f.name: f.tokenizer for f in folders}}
            )
        tokenizer = load_tokenizer(folder)
        blocks = load_blocks(recipe, tokenizer)
        importance, kept, made = None, dict[str, Any](), model is None
        if made:
            calibration = _calibration_batches(recipe, blocks)
            model, importance, kept = build_model(
                recipe, folder=folder, calibration=calibration, device=device
            )
        if kept:
            say(
                f"  student: {kept['parameters'] / 1e6:.1f}M of {kept['parameters_before'] / 1e6:.1f}M parameters kept"
            )
        teachers: Teachers | CachedTeachers
        if isinstance(config.teacher_cache, NoCache):
            teachers = Teachers(folders, device=device, compute_dtype=DTYPES[precision])
        else:
            teachers = CachedTeachers(
                folders, cache=config.teacher_cache, device=device, compute_dtype=DTYPES[precision]
            )
        use_short_attention(causal_lm(model))
        student = Student(model, _projections(recipe, Body(model), teachers)).to(device)
        # DoRA takes norms of the base's weights, and a model that was given is trained in ways not known here.
        if made and isinstance(recipe.student, LoraStudent) and not recipe.student.dora:
            cast_frozen(model, DTYPES[precision])
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    work.mkdir(parents=True, exist_ok=True)
    run = Run(
        recipe, accelerator, student, teachers, blocks, precision, work, key, folders, folder, importance, kept,
        _tensorboard(work) if accelerator.is_main_process else None,
    )  # fmt: skip
    if isinstance(teachers, CachedTeachers):
        rows = [
            row
            for b in blocks
            for batch in heldout_batches(b.heldout)
            for row in zip(*batch, strict=True)
        ]
        for step in range(run.steps or 0):
            rows += zip(*_batch(run, run.rows_of(step)), strict=True)
        with accelerator.main_process_first(), accelerator.autocast():
            teachers.prepare(rows, run.teacher_layers)
    return run


def require_share_for_all(recipe: Recipe, *, processes: int, sharded: bool) -> None:
    """Raise `RecipeError` unless each of the processes gets blocks of every step, and as many forward passes when ``sharded``.

    FSDP gathers the parameters in every forward pass, from all processes.
    """
    config, block = recipe.training, recipe.data.block
    rows = config.batch_tokens // block
    most, fewest = (
        -(-count // config.micro_batch) for count in (-(-rows // processes), rows // processes)
    )
    if rows >= processes and (most == fewest or not sharded):
        return
    why = (
        f"the {rows} blocks of a step cannot be shared by {processes} processes"
        if rows < processes
        else f"of the {rows} blocks of a step some of {processes} processes would run {most} micro-batches and others {fewest}"
    )
    raise RecipeError(
        f"training.batch_tokens: found {config.batch_tokens} with data.block {block}: {why}; make it a multiple of "
        f"{processes * block}, for example {max(rows // processes, 1) * processes * block}, or start fewer processes."
    )


def _calibration_batches(recipe: Recipe, blocks: Sequence[DomainBlocks]) -> list[Tensor]:
    """Full training blocks that a shrunk student's importance is measured on, in the recipe's mixture."""
    if not isinstance(recipe.student, ShrinkStudent):
        return []
    rows = _training_rows(blocks, count=recipe.student.calibration_blocks, seed=recipe.seed)
    return [torch.from_numpy(row).long()[None] for row in rows]


def _training_rows(
    blocks: Sequence[DomainBlocks], *, count: int, seed: int
) -> list[npt.NDArray[np.int32]]:
    """The first ``count`` training blocks in the recipe's mixture, without their padding."""
    order = training_order(blocks, count=count, seed=seed)
    return [np.array(blocks[d].train_ids[r, : blocks[d].train_lengths[r]]) for d, r in order]


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bf16 where it is computed in hardware, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(host()["flags"]) else "fp32"


# The loop --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """Everything the loop holds that does not change."""

    recipe: Recipe
    accelerator: Any
    student: Student
    teachers: Teachers | CachedTeachers
    blocks: Sequence[DomainBlocks]
    precision: str
    work: Path
    key: str
    folders: Sequence[TeacherFolder]
    tokenizer_folder: Path
    importance: Importance | None
    kept: dict[str, Any]
    board: Any  # TensorBoard writer or none
    _known_order: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def rows_of(self, step: int) -> npt.NDArray[np.int64]:
        """(domain, row) of the training blocks of a step; a function of the seed and the step alone."""
        return self._order(1 << (step * self.rows_per_step + self.rows_per_step).bit_length())[
            step * self.rows_per_step : (step + 1) * self.rows_per_step
        ]

    def _order(self, count: int) -> npt.NDArray[np.int64]:
        # A longer order begins with the shorter one, so growing it changes nothing.
        if len(self._known_order) < count:
            self._known_order = training_order(self.blocks, count=count, seed=self.recipe.seed)
        return self._known_order

    @property
    def teacher_layers(self) -> list[list[int]] | None:
        """Layers of each teacher that feature alignment looks at."""
        projections = self.student.projections
        return (
            [[j for _, j in pairs] for pairs in projections.pairs]
            if projections is not None
            else None
        )

    @property
    def rows_per_step(self) -> int:
        return self.recipe.training.batch_tokens // self.recipe.data.block

    @property
    def steps(self) -> int | None:
        """Steps of a budget in tokens; none when the budget is in minutes."""
        config = self.recipe.training
        return config.tokens // config.batch_tokens if config.tokens is not None else None

    def share(self, state: State) -> float:
        """Share of the budget that is spent, 1 at the end."""
        if self.steps is not None:
            return state.step / self.steps
        assert self.recipe.training.minutes is not None
        return state.seconds / (60 * self.recipe.training.minutes)


@dataclass
class State:
    """Everything that changes: what a checkpoint holds beside model, optimiser and random state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_nll: float = math.inf
    best_step: int = 0
    stale: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def fit(run: Run, *, ends: Callable[[], bool] = lambda: False) -> State:
    """Train to the end of the budget, or until held-out NLL has not improved for ``patience`` measurements.

    ``ends`` is asked after every measurement but the first, once that is in the log, and may end the training early.
    """
    config, accelerator = run.recipe.training, run.accelerator
    trained = [p for p in run.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    student, optimizer = accelerator.prepare(run.student, optimizer)
    trained = [
        p for p in student.parameters() if p.requires_grad
    ]  # FSDP puts sharded ones in their place
    state = _load_checkpoint(run, optimizer) or State(best=trainable_state(run.student))
    if state.step == 0:
        _record(run, "evaluate", _evaluate_student(run, state, count_stale=False))
    resumed, started, done = state.seconds, time.monotonic(), run.share(state)
    share_of_step = 1 / run.steps if run.steps else 0.0
    with task(f"training {run.recipe.name}", run.steps, done=state.step) as progress:
        while done < 1 and (config.patience is None or state.stale < config.patience):
            rate = learning_rate(config, done, share_of_step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            step_started = time.monotonic()
            figures = _step(
                run,
                student,
                optimizer,
                trained,
                run.rows_of(state.step),
                state=state,
                progress=done,
            )
            state.step += 1
            state.tokens += figures["labels"]
            state.seconds = _seconds_of_all(run, resumed + time.monotonic() - started)
            pace = figures.pop("labels") / (time.monotonic() - step_started)
            _record(
                run, "step",
                {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3), **figures,
                 "learning_rate": rate, "tokens_per_second": round(pace, 1)},
            )  # fmt: skip
            progress.advance(1, loss=figures["loss"], heldout=state.best_nll)
            before, done = done, run.share(state)
            share_of_step = share_of_step if run.steps else done - before
            if state.step % config.evaluate_every == 0 or done >= 1:
                _record(run, "evaluate", _evaluate_student(run, state))
                if ends():
                    if done < 1:
                        _save_checkpoint(run, optimizer, state)  # so that it can go on from here
                    break
                done = run.share(state)
            if state.step % config.checkpoint_every == 0 and done < 1:
                _save_checkpoint(run, optimizer, state)
    return state


def _seconds_of_all(run: Run, seconds: float) -> float:
    """The clock of the first process where a budget in minutes goes by it: learning rate and last step are those of all."""
    if run.steps is not None:
        return seconds
    return float(
        broadcast(torch.tensor(seconds, dtype=torch.float64, device=run.accelerator.device))
    )


def _step(
    run: Run,
    student: Any,
    optimizer: Any,
    trained: Sequence[Tensor],
    picked: Any,
    *,
    state: State,
    progress: float,
) -> dict[str, Any]:
    """One optimiser step on the global batch of (domain, row) pairs ``picked``; raw terms per label position."""
    recipe, accelerator, teachers = run.recipe, run.accelerator, run.teachers
    config = recipe.training
    ids_RL, labels_RL = _batch(run, picked)
    denominator = int((labels_RL != IGNORED).sum())
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = torch.arange(rank, len(ids_RL), world)
    micro = mine.split(config.micro_batch)
    means = (
        _global_means(run, ids_RL, labels_RL, micro)
        if teachers and span_of(recipe.fusion.weights) == "batch"
        else None
    )

    sums = _Sums(run, picked[:, 0])
    optimizer.zero_grad(set_to_none=True)
    for index, rows in enumerate(micro):
        ids, labels = ids_RL[rows].to(accelerator.device), labels_RL[rows].to(accelerator.device)
        last = index == len(micro) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(student):
            with accelerator.autocast():
                states, inner = teachers.states(ids, run.teacher_layers) if teachers else ([], [])
            weighed = functools.partial(
                _loss, run, labels_RL=labels, teachers=states, teacher_states=inner, denominator=denominator, progress=progress,
                global_means_2K=means,
            )  # fmt: skip
            with accelerator.autocast():
                loss, terms, gap = student(ids, weighed)
            sums.features += gap
            accelerator.backward(
                loss * world
            )  # processes average their gradients; the terms are already shares
        sums.add(terms, labels, rows, float(loss.detach()))
    norm = whole(accelerator.clip_grad_norm_(trained, config.clip))
    figures = sums.figures(denominator, norm=float(norm))
    if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
        checkpoint = run.work / CHECKPOINT
        good = (
            f"the last good checkpoint is {checkpoint}"
            if checkpoint.exists()
            else "there is no checkpoint yet"
        )
        raise DivergenceError(
            f"training of {recipe.name} diverged at step {state.step + 1}: loss {figures['loss']}, gradient "
            f"norm {figures['gradient_norm']}; batch {fingerprint(ids_RL.tolist())[:16]}; {good}. Lower training.learning_rate "
            f"(now {config.learning_rate}) or use precision: fp32."
        )
    optimizer.step()
    return figures


def _loss(
    run: Run, hidden_RLd: Tensor, projected: Sequence[Sequence[Tensor]], *, labels_RL: Tensor, teachers: Sequence[Any],
    teacher_states: Sequence[Sequence[Tensor]], denominator: int, progress: float, global_means_2K: Tensor | None,
) -> tuple[Tensor, FusionTerms, float]:  # fmt: skip
    """Loss of one micro-batch with gradient, its raw terms, and its feature term before the factor."""
    fusion, features = run.recipe.fusion, run.recipe.features
    with torch.autocast(
        run.accelerator.device.type, enabled=False
    ):  # the loss chooses its own number types
        terms = fused_loss(
            fusion, hidden_RLd=hidden_RLd.to(DTYPES[run.precision]), head=student_head(run), teachers=teachers, labels_RL=labels_RL,
            denominator=denominator, names=run.teachers.names, progress=progress, global_means_2K=global_means_2K,
        )  # fmt: skip
        if not projected:
            return terms.loss, terms, 0.0
        gap = feature_loss(
            projected, teacher_states, terms.weights_KRL, labels_RL != IGNORED, distance=features.distance, denominator=denominator
        )  # fmt: skip
    factor = features.weight * min(1.0, progress / features.warmup if features.warmup else 1.0)
    return terms.loss + factor * gap, terms, float(gap.detach())


def learning_rate(config: Training | EncoderTraining, done: float, step: float) -> float:
    """Linear warm-up to the peak, then cosine, linear or constant; ``done`` and ``step`` are shares of the budget."""
    if done < config.warmup:
        return config.learning_rate * min(1.0, (done + step) / config.warmup)
    share = (done - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1.0
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return config.learning_rate * (1 - share)
        case "constant":
            return config.learning_rate


def _batch(run: Run, picked: Any) -> tuple[Tensor, Tensor]:
    ids = np.stack([run.blocks[d].train_ids[r] for d, r in picked])
    scored = np.stack([run.blocks[d].train_scored[r] for d, r in picked])
    return torch.from_numpy(ids).long(), torch.from_numpy(labels_of(ids, scored))


def student_head(run: Run) -> Head:
    """The student's head in the number type of the training; to be called inside the student's forward."""
    head, dtype = Body(run.student.model).head, DTYPES[run.precision]
    if head.weight_Vd.dtype == dtype:
        return head
    cached: Head | None = getattr(run.student, "frozen_head", None)
    if cached is not None:
        return cached
    bias = head.bias_V.to(dtype) if head.bias_V is not None else None
    cast = replace(head, weight_Vd=head.weight_Vd.to(dtype), bias_V=bias)
    if not head.weight_Vd.requires_grad:
        object.__setattr__(
            run.student, "frozen_head", cast
        )  # not a part of the module: nothing to save or to shard
    return cast


def _global_means(run: Run, ids_RL: Tensor, labels_RL: Tensor, micro: Sequence[Tensor]) -> Tensor:
    """Mean entropy and label log-likelihood [2, K] of the teachers over the global batch."""
    sums = torch.zeros(2, len(run.teachers), device=run.accelerator.device)
    for rows in micro:
        labels = labels_RL[rows].to(run.accelerator.device)
        with run.accelerator.autocast():
            states, _ = run.teachers.states(ids_RL[rows].to(run.accelerator.device))
        for row, statistic in enumerate(
            teacher_statistics(states, labels, chunk=run.recipe.fusion.chunk)
        ):
            sums[row] += statistic.sum((1, 2))
    total: Tensor = run.accelerator.reduce(sums, reduction="sum")
    return total / int((labels_RL != IGNORED).sum())


class _Sums:
    """Raw terms of a step, summed over micro-batches and processes."""

    def __init__(self, run: Run, domains: Any) -> None:
        self.run, self.domains = run, torch.from_numpy(np.asarray(domains))
        K, D = len(run.teachers), len(run.blocks)
        self.loss = self.cross_entropy = self.fusion = self.features = 0.0
        self.weights_DK, self.labels_D = (
            torch.zeros(D, K, dtype=torch.float64),
            torch.zeros(D, dtype=torch.float64),
        )
        self.entropy_K = torch.zeros(K, dtype=torch.float64)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, terms: Any, labels_RL: Tensor, rows: Tensor, loss: float) -> None:
        """Add one micro-batch; ``rows`` are its places in the global batch."""
        self.loss += loss
        self.cross_entropy += terms.cross_entropy
        self.fusion += terms.divergence
        valid = labels_RL != IGNORED
        for row, place in enumerate(rows.tolist()):
            domain = int(self.domains[place])
            self.labels_D[domain] += int(valid[row].sum())
            if len(self.run.teachers):
                self.weights_DK[domain] += (
                    terms.weights_KRL[:, row][:, valid[row]].double().sum(1).cpu()
                )
        if len(self.run.teachers):
            self.entropy_K += terms.entropy_KRL[:, valid].double().sum(1).cpu()
            self.pairs.append(
                (terms.weights_KRL[:, valid].cpu(), terms.label_logp_KRL[:, valid].cpu())
            )

    def figures(self, denominator: int, *, norm: float) -> dict[str, Any]:
        """What the log says of the step; everything per label position of the global batch."""
        packed = torch.cat([
            torch.tensor([self.loss, self.cross_entropy, self.fusion, self.features], dtype=torch.float64),
            self.entropy_K, self.weights_DK.flatten(), self.labels_D,
        ])  # fmt: skip
        total = self.run.accelerator.reduce(
            packed.to(self.run.accelerator.device), reduction="sum"
        ).cpu()
        K, D = len(self.run.teachers), len(self.run.blocks)
        loss, cross_entropy, fusion, features = total[:4].tolist()
        entropy_K, rest = total[4 : 4 + K], total[4 + K :]
        weights_DK, labels_D = rest[: D * K].reshape(D, K), rest[D * K :]
        names, domains = self.run.teachers.names, [b.name for b in self.run.blocks]
        return {
            "labels": denominator,
            "loss": loss,
            "cross_entropy": cross_entropy / denominator,
            "fusion": fusion / denominator if K else None,
            "features": features if self.run.student.projections is not None else None,
            "gradient_norm": norm,
            "weights": {
                domains[d]: {names[k]: round(float(weights_DK[d, k] / labels_D[d]), 4) for k in range(K)}
                for d in range(D) if K and labels_D[d]
            },
            "entropy": {names[k]: round(float(entropy_K[k] / denominator), 4) for k in range(K)},
            "weight_label_correlation": self._correlation() if K > 1 else None,
        }  # fmt: skip

    def _correlation(self) -> float | None:
        """Pearson correlation of w_k - 1/K with log p_k(label) - its mean over teachers: do weights follow the better teacher?"""
        weights = torch.cat([w - w.mean(0) for w, _ in self.pairs], dim=1).flatten()
        logp = torch.cat([p - p.mean(0) for _, p in self.pairs], dim=1).flatten()
        scale = float(weights.norm() * logp.norm())
        return round(float(weights @ logp) / scale, 4) if scale > 1e-12 else None


# Measuring -------------------------------------------------------------------------------------------------------


Scorer = Callable[
    [Tensor, Tensor], Tensor
]  # token ids and labels [R, L] -> NLL of each row [R], nats


@torch.no_grad()
def evaluate(
    score: Scorer, blocks: Sequence[DomainBlocks], *, device: torch.device, label: str
) -> dict[str, list[float]]:
    """Held-out NLL in nats, summed over each block, by domain."""
    nll: dict[str, list[float]] = {}
    with task(f"held-out text: {label}", sum(len(b.heldout) for b in blocks)) as progress:
        for domain in blocks:
            nll[domain.name] = []
            for ids, labels in heldout_batches(domain.heldout):
                nll[domain.name] += score(ids.to(device), labels.to(device)).tolist()
                progress.advance(len(ids))
    return nll


def per_token(
    nll: Mapping[str, Sequence[float]], blocks: Sequence[DomainBlocks]
) -> dict[str, float]:
    """Nats a token by domain, from sums over blocks."""
    counts = {
        b.name: int((labels_of(b.heldout.input_ids, b.heldout.scored) != IGNORED).sum())
        for b in blocks
    }
    return {name: sum(sums) / counts[name] for name, sums in nll.items()}


def heldout_batches(heldout: Blocks, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    ids, labels = heldout.input_ids, labels_of(heldout.input_ids, heldout.scored)
    return [
        (torch.from_numpy(ids[i : i + rows]).long(), torch.from_numpy(labels[i : i + rows]))
        for i in range(0, len(ids), rows)
    ]


def _evaluate_student(run: Run, state: State, *, count_stale: bool = True) -> dict[str, Any]:
    nll = per_token(student_nll(run, label=f"student, step {state.step}"), run.blocks)
    mean = mean_nll(nll)
    if mean < state.best_nll:
        state.best_nll, state.best_step, state.stale = mean, state.step, 0
        state.best = trainable_state(run.student)
    elif count_stale:
        state.stale += 1
    return {"step": state.step, "tokens": state.tokens, "nll": nll, "mean_nll": mean}


def student_nll(run: Run, *, label: str) -> dict[str, list[float]]:
    """Held-out NLL of the student as it is now, in the number type of its training."""

    def score(ids_RL: Tensor, labels_RL: Tensor) -> Tensor:
        def nll_of(hidden_RLd: Tensor, _: object) -> Tensor:
            head = student_head(run)
            with torch.autocast(run.accelerator.device.type, enabled=False):
                return label_nll(hidden_RLd.to(head.weight_Vd.dtype), head, labels_RL)

        with run.accelerator.autocast():
            found: Tensor = run.student(ids_RL, nll_of)
        return found

    run.student.eval()
    nll = evaluate(score, run.blocks, device=run.accelerator.device, label=label)
    run.student.train()
    return nll


def measure_teachers(run: Run) -> dict[str, dict[str, Any]]:
    """Calibrate each teacher and measure it on held-out text; kept beside the checkpoint for a resumed run."""
    kept, names = run.work / "teachers.json", run.teachers.names
    if kept.exists() and (found := json.loads(kept.read_text())).get("key") == run.key:
        reports: dict[str, dict[str, Any]] = found["reports"]
    else:
        reports = {name: _measure_teacher(run, k) for k, name in enumerate(names)}
        write_atomically(kept, json.dumps({"key": run.key, "reports": reports}))
    run.teachers.temperatures = [reports[name]["temperature"] for name in names]
    for name in names:
        figures = "  ".join(f"{domain} {nll:.3f}" for domain, nll in reports[name]["nll"].items())
        say(
            f"  teacher {name}: {figures} nats a token, calibration temperature {reports[name]['temperature']:.3f}"
        )
    return reports


def _measure_teacher(run: Run, k: int) -> dict[str, Any]:
    head, calibration, device = (
        run.teachers.heads[k],
        run.recipe.fusion.calibration,
        run.accelerator.device,
    )
    name = run.teachers.names[k]

    def states(ids_RL: Tensor) -> TeacherStates | SparseStates:
        with run.accelerator.autocast():
            return run.teachers.states(ids_RL, only=k)[0][0]

    def score(ids_RL: Tensor, labels_RL: Tensor) -> Tensor:
        said = states(ids_RL)
        if isinstance(said, SparseStates):
            return -said.label_logp_RL.double().sum(1)  # 0 where there is no label
        return label_nll(said.hidden_RLd, head, labels_RL)

    nll = per_token(evaluate(score, run.blocks, device=device, label=name), run.blocks)
    temperature = 1.0
    match calibration:
        case FixedCalibration():
            temperature = calibration.values[name]
        case FittedCalibration():
            batches = [
                batch for domain in run.blocks for batch in heldout_batches(domain.heldout)[:2]
            ]
            hidden = [
                said.hidden_RLd
                for ids, _ in batches
                if isinstance(said := states(ids.to(device)), TeacherStates)
            ]
            labels = torch.cat([labels for _, labels in batches]).to(device)
            temperature = fit_temperature(
                torch.cat(hidden), head, labels, bounds=calibration.bounds
            )
    return {"nll": nll, "mean_nll": mean_nll(nll), "temperature": temperature}


# Log and checkpoint ----------------------------------------------------------------------------------------------


def _record(run: Run, event: str, figures: Mapping[str, Any]) -> None:
    """One line of the log; the same numbers go to TensorBoard where it is installed."""
    if not run.accelerator.is_main_process:
        return
    with disk_full_is_a_user_error(run.work / LOG), (run.work / LOG).open("a") as file:
        file.write(json.dumps({"event": event, **figures}) + "\n")
    if run.board is not None:
        for name, value in _flat(figures):
            run.board.add_scalar(f"{event}/{name}", value, figures["step"])


def _flat(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            yield f"{path}{name}", value


def _tensorboard(work: Path) -> Any:
    """A TensorBoard writer into ``work``, or none where the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(work / BOARD))


def _save_checkpoint(run: Run, optimizer: Any, state: State) -> None:
    model, moments = trainable_state(run.student), whole(optimizer.state_dict())
    if not run.accelerator.is_main_process:
        return
    saved = {
        "key": run.key, "model": model, "optimizer": moments, "state": vars(state), "rng": torch.get_rng_state(),
        "log_bytes": (run.work / LOG).stat().st_size,
    }  # fmt: skip
    write_checkpoint(run.work / CHECKPOINT, saved)


def write_checkpoint(path: Path, saved: Mapping[str, Any]) -> None:
    """Write ``saved`` so that ``path`` holds either the old checkpoint or all of the new one, whatever happens."""
    temporary = path.with_name(f"{path.name}.writing")
    with disk_full_is_a_user_error(path):
        with temporary.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def read_checkpoint(path: Path, *, key: str, device: torch.device | str) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote for the run of this ``key``; none for another's, or where there is none.

    Raises `ArtifactError` for one that is damaged.
    """
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except FileNotFoundError:
        return None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}); delete it, and the same command starts this training over."
        ) from error
    return saved if saved["key"] == key else None


def _load_checkpoint(run: Run, optimizer: Any) -> State | None:
    """The state of an interrupted run of the same key; anything else in the folder is cleared."""
    path = run.work / CHECKPOINT
    saved = read_checkpoint(path, key=run.key, device="cpu")
    if saved is None:
        (run.work / LOG).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return None
    load_trainable_state(run.student, saved["model"])
    moments, trained = saved["optimizer"], [p for p in run.student.parameters() if p.requires_grad]
    moments["state"] = {
        i: {n: like(trained[i], v) for n, v in s.items()} for i, s in moments["state"].items()
    }
    optimizer.load_state_dict(moments)
    torch.set_rng_state(saved["rng"].cpu())
    with (run.work / LOG).open("r+b") as file:
        file.truncate(saved["log_bytes"])
    state = State(**saved["state"])
    say(f"  going on at step {state.step + 1} of {run.steps}")
    return state


def _projections(
    recipe: Recipe, student: Body, teachers: Teachers | CachedTeachers
) -> Projections | None:
    if not len(teachers) or recipe.features.weight == 0:
        return None
    pairs = [
        layer_pairs(recipe.features, student_layers=student.layers, teacher_layers=depth)
        for depth in teachers.depths
    ]
    return Projections(student_width=student.width, teacher_widths=teachers.widths, pairs=pairs)
