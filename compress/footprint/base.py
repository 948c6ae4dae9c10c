"""The cost of a training, as both kinds of task count it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of training, by purpose, without the program itself."""

    teachers: int  # weights and heads, or their answers
    student: int  # weights, head and projections
    optimizer: int  # gradients, two moments, and the best weights so far
    activations: int  # of one micro-batch, and the teachers' answers to it
    logits: int  # of one chunk, of student and teachers
    moment: str  # when that is: `training`, `saving`, …

    @property
    def total(self) -> int:
        """All of it."""
        return self.teachers + self.student + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Writing:
    """Cost of the text that the student writes itself, and memory while some rows are written."""

    tokens: int  # written, at most: a row may end early
    operations: float
    cache: int  # bytes of keys and values, and of weights cast to the compute type
    logits: int  # bytes of one step of sampling


@dataclass(frozen=True)
class Footprint:
    """The cost of distilling one recipe, from its sizes."""

    trained: int  # parameters, projections included
    memory: Memory
    cache_bytes: int  # of the teacher cache, at most; 0 without one
    operations: float  # floating-point operations of the whole training, but for own text
    own_text: Writing | None = None
    filling: float = 0.0  # of the operations, those that fill the teacher cache


@dataclass(frozen=True)
class Asked:
    """What a teacher behind a server is asked for, at most."""

    model: str
    url: str
    requests: int
    tokens: int  # of their prompts
    bytes: int  # of the answers that are kept
