"""Where a student starts: its base as it is, or its teachers merged into that base.

A merge costs no training and takes most of what distilling teachers of one base gains, so it is the
place to start from wherever teachers have the base's shape. `compress.models.merge` has the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.models.language import cached, load_model
from compress.models.merge import (
    BASE,
    Merge,
    best_merge,
    can_be_merged,
    load_merged,
    merged,
    parameters_of,
)
from compress.teachers.live import TeacherFolder
from limbeck.contract.progress import say
from limbeck.contract.recipe import fingerprint

_VERSION = 1  # raise it when the same input would give another choice
_CHOICE = "choice.json"


@dataclass(frozen=True)
class Start:
    """The merge that a student starts from."""

    merge: Merge
    scores: Mapping[str, float]  # nats a token on training text, of every merge that was tried
    teachers: Mapping[str, TeacherFolder] = field(default_factory=dict)  # those in the merge
    seed: int = 0

    def apply(self, model: Any, base: Path) -> None:
        """Put the merged weights into ``model``, which has the shape of ``base``."""
        states = {name: parameters(folder) for name, folder in self.teachers.items()}
        start = parameters_of(load_model(base))
        load_merged(model, merged(self.merge, start, states, seed=self.seed))

    def described(self) -> dict[str, Any]:
        """Return the entry of the student's result."""
        return {"merge": str(self.merge), "scores": dict(self.scores)}


def parameters(teacher: TeacherFolder) -> dict[str, Tensor]:
    """The fp32 weights of a teacher with its adapter merged, by name."""
    if teacher.adapter is None or teacher.whole_adapter is None:
        return parameters_of(load_model(teacher.whole))
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(teacher.base), str(teacher.adapter))
    return parameters_of(model.merge_and_unload())


def choose_start(
    base: Path,
    teachers: Sequence[TeacherFolder],
    *,
    text: str,
    score: Callable[[Any], float],
    among: Callable[[Sequence[str]], Sequence[Merge]],
    seed: int,
) -> Start | None:
    """The best merge of the teachers that have the base's shape, or None where no teacher has it.

    ``score(model)`` gives nats a token on the training text whose digest is ``text``; ``among`` the
    merges to try, given the teachers' names. The choice is kept in the cache. Raises `ModelError`.
    """
    model = load_model(base)
    start = parameters_of(load_model(base))
    states = {t.name: parameters(t) for t in teachers}
    states = {name: state for name, state in states.items() if can_be_merged(start, state)}
    if not states:
        return None
    tried = list(among(list(states)))
    digests = {t.name: t.digest for t in teachers if t.name in states}

    def choose(out: Path) -> dict[str, Any]:
        choice = best_merge(model, start, states, score, among=tried, seed=seed)
        found = {"merge": asdict(choice.merge), "scores": dict(choice.scores)}
        (out / _CHOICE).write_text(json.dumps(found))
        return {}

    asked = {
        "choice": _VERSION,
        "base": str(base),
        "teachers": digests,
        "text": text,
        "among": [asdict(merge) for merge in tried],
        "seed": seed,
    }
    found = json.loads((cached(fingerprint(asked), choose) / _CHOICE).read_text())
    merge, scores = Merge(**found["merge"]), found["scores"]
    say(f"  the student starts from {merge}: {scores[str(merge)]:.3f} nats a token on training text")
    if str(BASE) in scores and merge != BASE:
        say(f"    (the base: {scores[str(BASE)]:.3f})")
    used = {t.name: t for t in teachers if merge.weights.get(t.name)}
    return Start(merge, scores, used, seed)
