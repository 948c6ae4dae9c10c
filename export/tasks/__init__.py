"""The tasks that a student can be exported for; this is the one place that chooses."""

from __future__ import annotations

from export.tasks.base import Task


def task_of(name: str) -> type[Task]:
    """The class behind a recipe's or an artifact's ``task``."""
    if name == "causal-lm":
        from export.tasks.language import Language

        return Language
    from export.tasks.encoder import Encoder

    return Encoder
