"""A plan spread over nodes and cards. Every figure follows from the plan, and from a measured rate.

Assumed: each process trains with data parallelism (DDP), so that it holds all teachers and the
whole student, and takes an equal part of each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from limbeck.app.plan import Plan, columns, megabytes
from limbeck.contract.progress import about
from limbeck.contract.recipe import AnyRecipe


@dataclass(frozen=True)
class Cluster:
    """What one recipe takes on several nodes. Bytes, and seconds."""

    nodes: int
    gpus: int  # of each node; 0: one process on the processor of each
    memory: int  # at most, of a card or process
    shardable: int  # of it: weights, gradients and moments of the student, which FSDP2 divides
    gradients: int  # that each process sums with the others, in each step
    cache: int  # of the teacher cache, at most; a node that trains holds all of it
    rate: float | None  # operations a second of one card or process
    source: str  # of the rate, or why there is none
    seconds: float | None  # of training, prerequisites included; None without a rate
    filling: float | None  # of it, until the teacher cache is full

    @property
    def processes(self) -> int:
        """One for each card, or for each node without cards."""
        return self.nodes * max(1, self.gpus)

    def as_text(self) -> str:
        """For a terminal."""
        return columns(self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        each = "card" if self.gpus else "process"
        of = f" of {self.gpus} cards" if self.gpus else ", without cards"
        yield "nodes", f"{self.nodes}{of}: {self.processes} processes"
        yield (
            f"memory a {each}",
            f"at most {megabytes(self.memory)}, of which FSDP2 would divide "
            f"{megabytes(self.shardable)} among the processes",
        )
        if self.processes > 1:
            yield "summed each step", f"{megabytes(self.gradients)} of gradients"
        if self.cache:
            yield (
                "teacher cache",
                f"at most {megabytes(self.cache)} in a shared folder or store; from a store, as "
                "much again on each node that trains",
            )
        if self.seconds is None:
            yield "time of training", f"unknown: {self.source}"
            return
        assert self.rate is not None
        yield (
            "time of training",
            f"at least {about(self.seconds)}: {self.rate / 1e12:,.3g} TFLOP/s a {each} "
            f"({self.source}), no time for communication or loading",
        )
        if self.cache and self.filling:
            reading = self.seconds - self.filling
            yield (
                "filling the cache",
                f"at least {about(self.filling)} of it; all processes together write at most "
                f"{megabytes(self.cache / self.filling)} a second",
            )
            yield (
                "reading the cache",
                f"at most {megabytes(self.cache / reading)} a second in all from a shared folder, "
                f"{megabytes(self.nodes * self.cache / reading)} from a store",
            )


def spread(
    plan: Plan, recipe: AnyRecipe, *, nodes: int, gpus: int, tflops: float | None
) -> Cluster:
    """Spread a plan, made for cards if there are ``gpus``, over ``nodes`` and the cards of each.

    ``tflops`` is the measured rate of one card or process; None: that of the plan's trial.
    Raises `RecipeError` for a batch that so many processes cannot share.
    """
    from compress.footprint.tasks import require_shares

    processes = nodes * max(1, gpus)
    require_shares(recipe, processes=processes)
    rate, source = (
        (tflops * 1e12, "from --tflops") if tflops else (plan.speed, "by the trial on this machine")
    )
    seconds = filling = None
    if plan.own_text:
        source = "the rate of own text is that of writing, not of reading"
    elif recipe.minutes:
        source = "the budget is given in minutes"
    elif rate is None:
        source = "give the measured rate of one with --tflops, or add --trial on such a machine"
    else:
        seconds = (plan.operations + plan.operations_first) / (rate * processes)
        filling = plan.filling / (rate * processes)
    return Cluster(
        nodes=nodes,
        gpus=gpus,
        memory=plan.memory_total,
        shardable=plan.memory["student"] + plan.memory["optimizer"],
        gradients=4 * plan.trained,
        cache=plan.cache,
        rate=rate,
        source=source,
        seconds=seconds,
        filling=filling,
    )
