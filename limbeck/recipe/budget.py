"""What a student may cost, and which students `limbeck search` looks among."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from limbeck.recipe.base import Count, Float, Fraction, Frozen, Positive


class QualityBudget(Frozen):
    """How much worse than the teachers the shipped form may be."""

    metric: Literal["nll"] = Field("nll", description="Held-out loss, nats a token, mean over the domains.")
    max_loss: Float = Field(description="Largest relative rise over the best single teacher; 0: none.")


class Budget(Frozen):
    """What the shipped form must keep to, measured here. A bound that is not named is not kept to."""

    size_mb: Positive | None = Field(None, description="Largest size of graph and weights, in MB (1e6 bytes).")
    tpot_ms: Positive | None = Field(None, description="Largest median time per output token, in ms.")
    ttft_ms: Positive | None = Field(None, description="Largest median time to first token, in ms.")
    quality: QualityBudget | None = Field(None, description="Least quality; none takes the best that is found.")
    hours: Positive = Field(
        1.0,
        description="Time for the search, interruptions not counted; half is kept for the finalists, and students are begun in the other half.",
    )


SearchForm = Literal["int8-weight", "int8-dynamic", "int4-weight"]


class Space(Frozen):
    """The students that `limbeck search` compares: the whole base with adapters, and the base cut in depth, in FFN width and in hidden width."""

    ranks: tuple[Count, ...] = Field((16,), description="LoRA ranks tried on the whole base; none tries no LoRA.")
    depths: tuple[Annotated[Fraction, Field(gt=0)], ...] = Field(
        (1.0, 0.8, 0.65, 0.5), min_length=1, description="Shares of the base's layers kept."
    )
    widths: tuple[Annotated[Fraction, Field(gt=0)], ...] = Field(
        (1.0, 0.75), min_length=1, description="Shares of the base's FFN neurons kept in each layer."
    )
    hidden: tuple[Annotated[Fraction, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="Shares of the base's hidden width kept; what is cut there heals slowest."
    )
    forms: tuple[SearchForm, ...] = Field(
        ("int8-weight", "int4-weight"), min_length=1, description="Forms that may ship."
    )
    probes: Count = Field(4, description="Shapes that are exported and timed before the rest is predicted.")
    rungs: tuple[Count, ...] = Field(
        (4096, 12288),
        min_length=1,
        description="Training tokens of each round, counted from the start and at most training.tokens; the better half goes on, where it has more students than there are finalists.",
    )
    finalists: Count = Field(
        2,
        description="Students that are trained, exported and measured in full: fewer where time is up and one keeps the budget, "
        "more where none does and time is left.",
    )
