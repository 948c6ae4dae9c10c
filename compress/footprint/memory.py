"""Memory of a language model's training at each moment that may be its worst.

Modules are traced (`compress.footprint.shapes`); what the loop keeps beside them (optimiser,
copies, logits of a chunk) is added here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from compress.footprint.base import Memory, Writing
from compress.footprint.shapes import BYTES, Shape, TeacherShape, is_cast, trace_line
from compress.footprint.tracing import Trace
from compress.head import CACHED
from limbeck.contract.recipe import LoraStudent, MergeStudent, NoCache, Recipe, ShrinkStudent

_EVALUATED = 4  # blocks in one batch of held-out text


@dataclass(frozen=True)
class Job:
    """A training as far as its memory depends on it; sizes are in bytes.

    ``pairs`` are the layers of student and teacher that are aligned, by teacher; ``mine`` is one
    micro-batch through the student, ``theirs`` through each teacher; ``adapters`` are the trainable
    parameters of a LoRA student.
    """

    recipe: Recipe
    student: Shape
    base: Shape | None
    teachers: Sequence[TeacherShape]
    pairs: Sequence[Sequence[tuple[int, int]]]
    mine: Trace
    theirs: Sequence[Trace]
    adapters: int
    precision: str

    @property
    def lora(self) -> bool:
        """Whether the student is an adapter."""
        return isinstance(self.recipe.student, LoraStudent)

    @property
    def compute(self) -> int:
        """Bytes of a number in the forward pass."""
        return BYTES[self.precision]

    @property
    def projections(self) -> int:
        """Parameters that map the student's features to the teachers'."""
        return sum(
            len(pairs) * self.student.width * teacher.shape.width
            for teacher, pairs in zip(self.teachers, self.pairs, strict=True)
        )

    @property
    def trained(self) -> int:
        """Parameters that are trained, projections included."""
        if isinstance(self.recipe.student, MergeStudent):
            return 0
        return (self.adapters if self.lora else self.student.parameters) + self.projections

    @property
    def cached(self) -> bool:
        """Whether the teachers answer before the training."""
        return not isinstance(self.recipe.training.teacher_cache, NoCache)

    @cached_property
    def heads(self) -> int:
        """Teachers' heads, which are cast once to the number type of the forward pass."""
        places = {teacher.place: teacher for teacher in self.teachers}
        return sum(
            t.shape.width * t.shape.vocabulary * self.compute
            for t in places.values()
            if self.cached or t.dtype != self.precision
        )

    @cached_property
    def bodies(self) -> int:
        """Teachers' weights and adapters."""
        places = {teacher.place: teacher for teacher in self.teachers}
        adapters = sum(4 * teacher.adapter for teacher in self.teachers)
        return sum(_body(t, self.compute) for t in places.values()) + adapters

    @property
    def kept_teachers(self) -> int:
        """Teachers while the student trains.

        A cache is mapped from disk: the kernel drops its pages when memory is short, and a GPU gets
        one micro-batch of it at a time.
        """
        return self.heads if self.cached else self.bodies + self.heads

    @cached_property
    def weights(self) -> int:
        """The student's weights and projections, with its head as the forward pass has it."""
        student = self.recipe.student
        quantize = student.quantize if isinstance(student, LoraStudent) else "none"
        weights = self.student.weights(quantize=quantize) + 4 * (self.projections + self.adapters)
        if is_cast(self.recipe) and quantize == "none":
            weights -= self.student.linear * (4 - self.compute)
        if self.precision != "fp32":
            weights += self.student.width * self.student.vocabulary * self.compute
        return weights


def worst_moment(job: Job, own_text: Writing | None) -> Memory:
    """The moment of ``job`` that takes most; ``own_text`` is what its student writes."""
    moments = [_training(job)]
    if own_text is not None:  # there are no gradients at this moment
        moments.append(
            Memory(
                job.kept_teachers,
                job.weights,
                12 * job.trained,
                own_text.cache,
                own_text.logits,
                "writing own text",
            )
        )
    if job.cached:
        filling = max((trace.forward_peak for trace in job.theirs), default=0)
        teachers = job.bodies + job.heads
        moments.append(Memory(teachers, job.weights, 0, filling, 0, "filling the cache"))
    if job.base is not None and isinstance(job.recipe.student, ShrinkStudent):
        both = job.base.weights() + job.student.weights()
        moments.append(Memory(0, both, 0, 0, 0, "shrinking"))
    return max([*moments, *_ends(job)], key=lambda moment: moment.total)


def _training(job: Job) -> Memory:
    config = job.recipe.training
    tokens = config.micro_batch * job.recipe.data.block
    widths = [(t.shape.width, len(p)) for t, p in zip(job.teachers, job.pairs, strict=True)]
    answers = sum(tokens * width * (job.compute + pairs * 4) for width, pairs in widths)
    aligned = sum(tokens * width * 4 * pairs * 4 for width, pairs in widths)
    logits = _logits(job)
    teacher_peak = max((trace.forward_peak for trace in job.theirs), default=0)
    activations = max(
        job.mine.kept + answers + aligned,
        job.mine.backward_peak - logits + answers,
        (0 if job.cached else teacher_peak) - logits,
    )
    # Gradients and two moments of AdamW, and the best weights so far.
    optimizer = 16 * job.trained
    return Memory(job.kept_teachers, job.weights, optimizer, activations, logits, "training")


def _logits(job: Job) -> int:
    """Peak of `fused_loss`, as measured: K + 2 products [C, V] and eight fp32 blocks."""
    recipe, vocabulary = job.recipe, job.student.vocabulary
    label_positions = recipe.training.micro_batch * (recipe.data.block - 1)
    chunk = min(recipe.fusion.chunk, label_positions) * vocabulary
    device = recipe.training.device
    # where a block is the chunk
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    blocks = 8 * (chunk if on_gpu else min(CACHED, chunk)) * 4
    logits = (len(job.teachers) + 2) * chunk * job.compute + blocks
    # The gradient of a trained head is summed over chunks.
    return logits if job.lora else logits + job.student.width * vocabulary * 4


def _ends(job: Job) -> list[Memory]:
    """The end of a training: the saved student is loaded and measured beside the trained one."""
    both, best = job.weights + job.student.weights(), 8 * job.trained
    length = job.recipe.data.block
    scored = trace_line(job.student, None, rows=_EVALUATED, length=length, precision="fp32")
    ends = [Memory(job.kept_teachers, both, best, scored.forward_peak, 0, "saving")]
    if job.lora:  # the adapters are merged into the base as it is on disk
        merged = both + 4 * job.student.linear
        ends.append(Memory(job.kept_teachers, merged, best, 0, 0, "merging"))
    return ends


def _body(teacher: TeacherShape, compute: int) -> int:
    """Bytes of a teacher's weights, whose fp32 matrices take the forward pass's number type."""
    size = teacher.shape.weights(dtype=teacher.dtype, quantize=teacher.quantize)
    cast = teacher.quantize == "none" and teacher.dtype == "fp32"
    return size - teacher.shape.linear * (4 - compute) if cast else size
