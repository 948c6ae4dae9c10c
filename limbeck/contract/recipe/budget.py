"""The budget of a student, and the space of students that `limbeck search` tries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from limbeck.contract.recipe.base import Count, Float, Fraction, Frozen, Positive

# Budgets ------------------------------------------------------------------------------------------


class QualityBudget(Frozen):
    """How much worse than the teachers the shipped form may be."""

    metric: Literal["nll"] = Field(
        "nll", description="Held-out loss, nats a token, mean over the domains."
    )
    max_loss: Float = Field(
        description="Largest relative rise over the best single teacher; 0: none."
    )


class MetricBudget(Frozen):
    """How much worse than the better teacher an encoder may be in its task's metric."""

    max_loss: Float = Field(
        description="Largest relative loss of the metric against the better teacher; 0: none."
    )


class ClassificationQuality(MetricBudget):
    """As of every encoder; the figure is the bench's."""

    metric: Literal["accuracy", "macro_f1"] | None = Field(
        None, description="Figure that is compared; default: bench.metric."
    )


class EmbeddingQuality(MetricBudget):
    """As of every encoder."""

    metric: Literal["spearman"] = Field(
        "spearman",
        description="Rank correlation of all pairs' similarities with their mean over the "
        "teachers.",
    )


class Bounds(Frozen):
    """Fields of every budget."""

    size_mb: Positive | None = Field(
        None, description="Largest size of graph and weights, in MB (1e6 bytes)."
    )
    hours: Positive = Field(
        1.0,
        description="Time for the search, interruptions not counted; half is kept for the "
        "finalists, and students are begun in the other half.",
    )

    @property
    def times(self) -> dict[str, float | None]:
        """Bounds on times in ms, by the figure that is measured."""
        raise NotImplementedError


class Budget(Bounds):
    """Bounds of the shipped form, measured on this machine. A bound that is not named is not
    checked."""

    tpot_ms: Positive | None = Field(
        None, description="Largest median time per output token, in ms."
    )
    ttft_ms: Positive | None = Field(None, description="Largest median time to first token, in ms.")
    quality: QualityBudget | None = Field(
        None, description="Least quality; default: the best that is found."
    )

    @property
    def times(self) -> dict[str, float | None]:
        return {"tpot_ms": self.tpot_ms, "ttft_ms": self.ttft_ms}


class EncoderBudget(Bounds):
    """Bounds of an encoder; its time is that of one sequence."""

    latency_ms: Positive | None = Field(
        None,
        description="Largest median time of one sequence at the largest of bench.lengths, in ms.",
    )

    @property
    def times(self) -> dict[str, float | None]:
        return {"latency_ms": self.latency_ms}


class ClassificationBudget(EncoderBudget):
    """Bounds of a classifier, measured here. A bound that is not named is not checked."""

    quality: ClassificationQuality | None = Field(
        None, description="Least quality; default: the best that is found."
    )


class EmbeddingBudget(EncoderBudget):
    """Bounds of a sentence encoder, measured on this machine. A bound that is not named is not
    checked."""

    quality: EmbeddingQuality | None = Field(
        None, description="Least quality; default: the best that is found."
    )


AnyBudget = Budget | ClassificationBudget | EmbeddingBudget


# Search spaces ------------------------------------------------------------------------------------

Share = Annotated[Fraction, Field(gt=0)]
SearchForm = Literal["int8-weight", "int8-dynamic", "int4-weight"]
EncoderSearchForm = Literal["int8-weight", "int8-dynamic", "int8-static"]


class Cuts(Frozen):
    """Fields of every search space."""

    depths: tuple[Share, ...] = Field(
        (1.0, 0.8, 0.65, 0.5), min_length=1, description="Shares of the base's layers kept."
    )
    widths: tuple[Share, ...] = Field(
        (1.0, 0.75),
        min_length=1,
        description="Shares of the base's FFN neurons kept in each layer.",
    )
    probes: Count = Field(
        4, description="Shapes that are exported and timed before the rest is predicted."
    )
    finalists: Count = Field(
        2,
        description="Students that are trained, exported and measured in full: fewer if time is "
        "up and one keeps the budget, more if none does and time is left.",
    )


class Space(Cuts):
    """The students that `limbeck search` compares: the whole base with adapters, and the base cut
    in depth, in FFN width and in hidden width."""

    ranks: tuple[Count, ...] = Field(
        (16,), description="LoRA ranks tried on the whole base; an empty list tries no LoRA."
    )
    hidden: tuple[Share, ...] = Field(
        (1.0,),
        min_length=1,
        description="Shares of the base's hidden width kept; cuts of the width recover most "
        "slowly.",
    )
    forms: tuple[SearchForm, ...] = Field(
        ("int8-weight", "int4-weight"), min_length=1, description="Forms that may ship."
    )
    rungs: tuple[Count, ...] = Field(
        (4096, 12288),
        min_length=1,
        description="Training tokens of each round, counted from the start and at most "
        "training.tokens; "
        "the better half continues while it has more students than there are finalists.",
    )


class EncoderSpace(Cuts):
    """The students that `limbeck search` compares: the base whole where nothing is cut, and cut in
    depth and in FFN width."""

    forms: tuple[EncoderSearchForm, ...] = Field(
        ("int8-weight", "int8-dynamic"), min_length=1, description="Forms that may ship."
    )
    rungs: tuple[Count, ...] = Field(
        (512, 1536),
        min_length=1,
        description="Training examples of each round, at most training.examples. Each round trains "
        "anew; the better half continues while it has more students than there are finalists.",
    )
