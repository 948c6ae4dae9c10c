"""What classifiers and sentence encoders share: examples, teachers that answer once, saving.

Shapes: R examples of a batch, N of the whole, L tokens, C classes, d width. An answer is a model's
output for an example: logits ``[C]``, or a unit vector ``[d]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.data.examples import load_examples, training_order
from compress.features import Projections
from compress.host import give_memory_back
from compress.models.encoders import base_folder, build_student, encoder_folder, require_context
from compress.models.language import folder_config
from compress.tasks.saved import Saved
from limbeck.contract.data.arrays import Ids
from limbeck.contract.data.examples import EXAMPLES, Examples, save_examples
from limbeck.contract.data.heldout import CALIBRATION, save_calibration
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import EncoderRecipe, EncoderShrinkStudent, EncoderTeacher, fingerprint
from limbeck.contract.recipe.checks import require_equal_shares
from limbeck.contract.results.student import EncoderFigures, Parameters, TeacherResult
from limbeck.contract.sources.digests import model_digest
from limbeck.contract.sources.licences import sources_of
from limbeck.contract.sources.tokenizer import load_tokenizer, require_same_tokenizer

ROWS = 32  # examples of a batch that is not trained on
_CALIBRATION_ROWS = 64  # training examples that travel with a student, for the export's calibration

Answers = Tensor  # [R, C] or [R, d]
Model = Callable[[Tensor, Tensor], Answers]  # of ids and mask [R, L]


@dataclass(frozen=True)
class Teacher:
    """One teacher on disk, and its answers for every example."""

    name: str
    folder: Path
    digest: str
    pooling: str  # empty for a classifier
    train: Answers
    heldout: Answers


class EncoderStudent(nn.Module):
    """An encoder being trained, with the projections beside it (never inside)."""

    def __init__(self, model: Any, projections: Projections | None, answer: Any) -> None:
        """``answer`` turns the model, ids and mask ``[R, L]`` into answers in fp32."""
        super().__init__()
        self.model, self.projections, self.answer = model, projections, answer

    def forward(self, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """Return the answers of a batch."""
        found: Answers = self.answer(self.model, ids_RL, mask_RL)
        return found


class EncoderTask(ABC):
    """See `compress.tasks.Task`.

    The weights after the last step are kept: to choose among steps by the held-out examples would
    flatter them.
    """

    unit = "examples"
    loss_unit: str
    selects: str | None = None
    minutes: float | None = None
    patience: int | None = None

    def __init__(
        self, recipe: EncoderRecipe, *, products: Mapping[str, Path], accelerator: Any
    ) -> None:
        """Load the examples and the student, and let every teacher answer once."""
        _require_whole_shares(recipe, accelerator)
        self.recipe, self.accelerator = recipe, accelerator
        self.device: torch.device = accelerator.device
        with accelerator.main_process_first():  # the first one fills the cache, the others read it
            folders = [
                encoder_folder(t.model, folder=recipe.folder, product=products.get(t.name))
                for t in recipe.teachers
            ]
            self.folder = base_folder(recipe.student, folder=recipe.folder, teachers=folders)
            self._require_alike(folders)
            # Licences are read now: the folders may be gone when the training is over.
            self.sources = sources_of(recipe, base=self.folder, teachers=folders)
            self.train, self.heldout = load_examples(recipe, load_tokenizer(self.folder))
        give_memory_back()  # the texts
        say(f"  {len(self.train)} training and {len(self.heldout)} held-out examples")
        count = recipe.training.examples // recipe.training.batch * recipe.training.batch
        self.order = training_order(count, examples=len(self.train), seed=recipe.seed)
        model = self._build()
        used = np.unique(self.order)
        self.teachers = [
            self._ask(teacher, folder, used, products)
            for teacher, folder in zip(recipe.teachers, folders, strict=True)
        ]
        self.names = [t.name for t in self.teachers]
        self.temperatures = [1.0] * len(self.teachers)
        self.student = EncoderStudent(model, self._projections(model), self.answer).to(self.device)
        self.prepare()
        torch.manual_seed(recipe.seed)  # dropout does not depend on earlier draws

    @property
    def class_names(self) -> list[str] | None:
        """The recipe's classes; None for a sentence encoder."""
        return None

    @staticmethod
    @abstractmethod
    def answer(model: Any, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """Return a student's answers for a batch, in fp32."""

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load a saved student, in fp32."""

    @abstractmethod
    def load_teacher(self, teacher: EncoderTeacher, folder: Path) -> Model:
        """Load a teacher. Raises `ModelError` where it does not fit the recipe."""

    @abstractmethod
    def measure_answers(self, answers: Answers) -> dict[str, float]:
        """Return the figures of someone's answers for the held-out examples."""

    @abstractmethod
    def loss_of_each(self, answers: Answers) -> Tensor:
        """Return the loss of each held-out example ``[N]`` from someone's answers."""

    @abstractmethod
    def terms(
        self, student: EncoderStudent, answers: Answers, mine: Tensor, rows: Tensor, progress: float
    ) -> Terms:
        """Return the loss of this process's share of a step, and its terms.

        ``rows`` are the global batch's training examples, ``mine`` those that ``answers`` are of.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Finish what needs teachers and student."""

    def _projections(self, model: Any) -> Projections | None:
        return None

    # Loading -----------------------------------------------------------------------------------

    def _require_alike(self, folders: Sequence[Path]) -> None:
        """Raise `ModelError` unless all models have one tokenizer and read `data.max_tokens`."""
        places = {"the student": self.folder}
        places |= {t.name: p for t, p in zip(self.recipe.teachers, folders, strict=True)}
        require_same_tokenizer(places)
        for name, place in places.items():
            require_context(name, folder_config(place), self.recipe.data.max_tokens)

    def _build(self) -> Any:
        recipe, calibration = self.recipe, list[Tensor]()
        if isinstance(recipe.student, EncoderShrinkStudent):
            chosen = self._rows(self.order[: recipe.student.calibration_examples])
            calibration = [torch.from_numpy(row).long()[None] for row in chosen]
        model, self.importance, self.kept = build_student(
            recipe.student,
            folder=self.folder,
            classes=self.class_names,
            calibration=calibration,
            seed=recipe.seed,
        )
        # A fresh student has sizes of its own.
        require_context("the student", model.config, recipe.data.max_tokens)
        if self.kept:
            now, before = (self.kept[n] / 1e6 for n in ("parameters", "parameters_before"))
            say(f"  student: {now:.1f}M of {before:.1f}M parameters kept")
        return model

    def _rows(self, chosen: Ids) -> list[npt.NDArray[np.int32]]:
        """Token rows of training examples, without padding."""
        train = self.train
        return [train.input_ids[row, : train.lengths[row]] for row in chosen]

    def _ask(
        self, entry: EncoderTeacher, folder: Path, used: Ids, products: Mapping[str, Path]
    ) -> Teacher:
        """Load a teacher, let it answer all that training and measuring need, and let it go."""
        digest = model_digest(
            entry.model, folder=self.recipe.folder, products=products, teacher=entry.name
        )
        model = self.load_teacher(entry, folder)
        label = f"teacher {entry.name}: training examples"
        some = self._answers(model, self.train.take(used), label=label)
        every = torch.zeros(len(self.train), some.shape[1], device=self.device)
        every[torch.from_numpy(used)] = some
        pooling = str(getattr(entry, "pooling", ""))
        heldout = self._answers(model, self.heldout)
        return Teacher(entry.name, folder, digest, pooling, every, heldout)

    @torch.no_grad()
    def _answers(
        self, model: Model, examples: Examples, *, label: str = "held-out examples"
    ) -> Answers:
        """Return the answers of ``model`` for every example, in their order.

        Rows of like length are read together, which saves padding.
        """
        order, parts = np.argsort(examples.lengths, kind="stable"), []
        with task(label, len(order)) as progress:
            for at in range(0, len(order), ROWS):
                ids, mask = examples.batch(order[at : at + ROWS])
                given = (torch.from_numpy(a).to(self.device) for a in (ids, mask))
                parts.append(model(*given).float())
                progress.advance(len(ids))
        found = torch.cat(parts)
        place = torch.from_numpy(order).to(self.device)
        return torch.empty_like(found).index_copy_(0, place, found)

    # Training ----------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps of the budget."""
        return len(self.order) // self.recipe.training.batch

    def step(self, index: int, *, progress: float) -> EncoderStep:
        batch = self.recipe.training.batch
        return EncoderStep(self, self.order[index * batch : (index + 1) * batch], progress)

    # Measuring ---------------------------------------------------------------------------------

    def measure(self, label: str) -> dict[str, Any]:
        """Measure the student on the held-out examples, in fp32."""
        self.student.eval()
        figures = self.measure_answers(self._student_answers(self.student.model))
        self.student.train()
        return figures

    def _student_answers(self, model: Any) -> Answers:
        return self._answers(lambda ids, mask: self.answer(model, ids, mask), self.heldout)

    def measure_teacher(self, k: int) -> TeacherResult:
        metrics = self.measure_answers(self.teachers[k].heldout)
        return TeacherResult(self.temperatures[k], metrics=metrics)

    def describe_teacher(self, report: TeacherResult) -> str:
        metrics = report.metrics or {}
        units = {"nll": f" {self.loss_unit}"}
        return "  ".join(f"{n} {value:.4f}{units.get(n, '')}" for n, value in metrics.items())

    def losses(self, label: str) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        self.student.eval()
        losses = self._by_group(self.loss_of_each(self._student_answers(self.student.model)))
        self.student.train()
        return losses, {name: [1] * len(found) for name, found in losses.items()}

    def _by_group(self, loss_N: Tensor) -> dict[str, list[float]]:
        losses: dict[str, list[float]] = {}
        names = [name for _, name, _ in self.recipe.groups()]
        for value, group in zip(loss_N.tolist(), self.heldout.groups.tolist(), strict=True):
            losses.setdefault(names[group], []).append(value)
        return losses

    def teacher_losses(self, k: int) -> dict[str, list[float]]:
        return self._by_group(self.loss_of_each(self.teachers[k].heldout))

    def teacher_seconds(self, k: int) -> float:
        """Return 0: the teachers have answered before the training begins, for all arms alike."""
        return 0.0

    def further_figures(self) -> dict[str, float]:
        """The task's own metrics."""
        return {name: float(value) for name, value in self.measure("student").items()}

    # Saving ------------------------------------------------------------------------------------

    def teacher_entries(self) -> list[dict[str, Any]]:
        return [
            {
                "name": t.name,
                "model": str(t.folder),
                "pooling": t.pooling,
                "temperature": temperature,
                "digest": t.digest,
            }
            | self.sources["teachers"][t.name]
            for t, temperature in zip(self.teachers, self.temperatures, strict=True)
        ]

    def save(self, folder: Path, best: Mapping[str, Tensor], *, seen: int, best_step: int) -> Saved:
        assert not best, "encoders keep the last weights"
        self.student.eval()
        self.student.model.save_pretrained(folder / "model")
        load_tokenizer(self.folder).save_pretrained(folder / "model")
        if self.importance is not None:
            save_file(self.importance.tensors(), folder / "importance.safetensors")
        save_examples(folder / EXAMPLES, self.heldout)
        save_calibration(folder / CALIBRATION, self._rows(self.order[:_CALIBRATION_ROWS]))
        saved = self.load(folder / "model").to(self.device)
        trained = sum(p.numel() for p in self.student.model.parameters() if p.requires_grad)
        figures = EncoderFigures(
            metrics=self.measure_answers(self._student_answers(saved)),
            classes=tuple(self.class_names) if self.class_names is not None else None,
            examples={"train": len(self.train), "heldout": len(self.heldout), "seen": seen},
        )
        return Saved(
            Parameters(total=saved.num_parameters(), trained=trained),
            shrink=self.kept or None,
            sources={name: self.sources[name] for name in ("base", "texts")},
            encoder=figures,
        )


@dataclass(frozen=True)
class Terms:
    """Terms of one process's share of a step; shares of all processes add up to the batch's."""

    loss: Tensor  # scalar with gradient
    figures: dict[str, float]  # by name: means over the global batch
    weights_KR: Tensor  # of the teachers, for this process's examples
    entropy_KR: Tensor  # nats
    shared: float = 0.0  # of the loss's value: what every process computed of the whole batch


class EncoderStep:
    """See `compress.tasks.Step`: one micro-batch a process."""

    def __init__(self, task: EncoderTask, rows: Ids, progress: float) -> None:
        """``rows`` are the training examples of the global batch."""
        self.task, self.rows, self.progress, self.count = task, rows, progress, len(rows)
        rank, world = task.accelerator.process_index, task.accelerator.num_processes
        self.parts: Sequence[Tensor] = [torch.arange(rank, len(rows), world)]
        self._terms: Terms | None = None

    def fingerprint(self) -> str:
        return fingerprint(self.rows.tolist())[:16]

    def loss(self, student: Any, part: Tensor) -> Tensor:
        task, mine = self.task, self.rows[part.numpy()]
        ids, mask = (torch.from_numpy(a).to(task.device) for a in task.train.batch(mine))
        with task.accelerator.autocast():
            answers = student(ids, mask)
        rows = torch.from_numpy(self.rows)
        self._terms = task.terms(task.student, answers, rows[part], rows, self.progress)
        return self._terms.loss

    def samples(self) -> list[dict[str, Any]]:
        """An encoder writes no text."""
        return []

    def figures(self) -> dict[str, Any]:
        """Return means over the global batch, the same on every process."""
        terms, task = self._terms, self.task
        assert terms is not None, "figures of a step that has not run"
        world, names = task.accelerator.num_processes, list(terms.figures)
        value = float(terms.loss.detach()) - terms.shared * (1 - 1 / world)
        K = len(task.names)
        packed = torch.cat(
            [
                torch.tensor([value, *terms.figures.values()], dtype=torch.float64),
                terms.weights_KR.double().sum(1).cpu() / self.count,
                terms.entropy_KR.double().sum(1).cpu() / self.count,
            ]
        )
        total = task.accelerator.reduce(packed.to(task.device), reduction="sum").tolist()
        means, entropies = total[-2 * K :][:K] if K else [], total[-K:] if K else []
        return {
            "loss": total[0],
            **dict(zip(names, total[1:], strict=False)),
            "weights": {n: round(v, 4) for n, v in zip(task.names, means, strict=True)},
            "entropy": {n: round(v, 4) for n, v in zip(task.names, entropies, strict=True)},
        }


def _require_whole_shares(recipe: EncoderRecipe, accelerator: Any) -> None:
    """Raise unless all processes get equal shares of each step and hold the whole student."""
    if accelerator.distributed_type == DistributedType.FSDP:
        raise EnvironmentalError(
            "encoders are trained whole in every process; start accelerate without FSDP."
        )
    require_equal_shares(recipe, processes=accelerator.num_processes)
