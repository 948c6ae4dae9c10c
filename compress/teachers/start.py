"""Where a student starts: its base as it is, or its teachers merged into that base.

A merge costs no training and gives most of what distilling teachers of one base gains. So it is the
place to start if the teachers have the base's shape. `compress.models.merge` has the formulas.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.models.language import cached, load_model
from compress.models.merge import (
    BASE,
    Merge,
    Method,
    best_merge,
    can_be_merged,
    candidates,
    load_merged,
    merged,
    parameters_of,
)
from compress.teachers.live import TeacherFolder
from limbeck.contract.artifact import MANIFEST
from limbeck.contract.errors import ModelError, RecipeError
from limbeck.contract.files import file_digest, files_below
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.models.adapters import attach, join
from limbeck.contract.models.adapters import merged as without_adapter
from limbeck.contract.progress import say
from limbeck.contract.recipe import LoraStudent, MergeStudent, ShrinkStudent, fingerprint

_VERSION = 1  # raise it when the same input would give another choice
_CHOICE = "choice.json"


class NothingToMergeError(RecipeError):
    """A teacher that the merge needs does not have the shape of the student's base."""


@dataclass(frozen=True)
class Start:
    """The merge that a student starts from."""

    merge: Merge
    scores: Mapping[str, float]  # nats a token on training text, of every merge that was tried
    teachers: Mapping[str, TeacherFolder] = field(default_factory=dict)  # those in the merge
    seed: int = 0

    def apply(self, model: Any, base: Path) -> None:
        """Put the merged weights into ``model``, which holds those of ``base``."""
        if not self.teachers:  # the base itself
            return
        states = {name: parameters(folder) for name, folder in self.teachers.items()}
        start = parameters_of(load_model(base))
        load_merged(model, merged(self.merge, start, states, seed=self.seed))

    def join_adapter(self, own: Path, base: Path) -> bool:
        """Turn the adapter ``own``, trained on the merged weights, into one on the true ``base``.

        It then holds the teachers' adapters and its own, side by side (peft's exact `cat`), so it
        loads beside the base as any adapter does. Returns False, and removes the folder, where
        `can_join` says that no adapter can hold what the merge did to the base.
        """
        if not self.teachers:  # trained on the base itself
            return True
        if not self.can_join(base, dora=adapter_facts(own).config.get("use_dora", False)):
            shutil.rmtree(own)
            return False
        parts = [(own, 1.0)]
        for name, teacher in self.teachers.items():
            assert teacher.adapter is not None  # see `can_join`
            parts.append((teacher.adapter, self.merge.weights[name]))
        out = own.with_name(f"{own.name}.joined")
        join(load_model(base), parts, out)
        shutil.rmtree(own)
        out.rename(own)
        return True

    def can_join(self, base: Path, *, dora: bool) -> bool:
        """Whether the merge is a weighted sum of plain LoRA adapters on ``base``.

        ``dora``: the student's adapter is DoRA, whose norms are the merged weights'.
        """
        if not self.teachers:
            return True
        return (not dora and self.merge.method == "average") and all(
            t.adapter is not None and t.base.resolve() == base.resolve() and _is_plain(t.adapter)
            for t in self.teachers.values()
        )

    def described(self) -> dict[str, Any]:
        """Return the entry of the student's result."""
        return {"merge": str(self.merge), "scores": dict(self.scores)}


def _is_plain(adapter: Path) -> bool:
    """Whether an adapter is low-rank updates of one rank and nothing else."""
    facts = adapter_facts(adapter)
    more = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern")
    return facts.shares_base and not any(facts.config.get(name) for name in more)


def parameters(teacher: TeacherFolder) -> dict[str, Tensor]:
    """The fp32 weights of a teacher with its adapter merged, by name."""
    if teacher.adapter is None or teacher.whole_adapter is None:
        return parameters_of(load_model(teacher.whole))
    model = attach(load_model(teacher.base), teacher.adapter)
    return parameters_of(without_adapter(model, where=str(teacher.adapter)))


def merges_to_try(
    student: LoraStudent | ShrinkStudent | MergeStudent, names: Sequence[str]
) -> list[Merge]:
    """The merges of these teachers that the recipe leaves to choose among."""
    if not isinstance(student, MergeStudent):
        found = candidates(names)
        return found if student.init == "auto" else [merge for merge in found if merge != BASE]
    if student.method == "auto" and student.weights is None:
        return [merge for merge in candidates(names) if merge != BASE]
    if missing := sorted({n for n, w in (student.weights or {}).items() if w} - set(names)):
        raise NothingToMergeError(
            f"student.weights: {', '.join(missing)} cannot be merged into the student's base; "
            "leave it out, or name the base that it was made from."
        )
    method: Method = "average" if student.method == "auto" else student.method
    equal = 1 / len(names) if method in ("average", "svd") else 1.0
    weights = student.weights or dict.fromkeys(names, equal)
    used = {name: weights[name] for name in names if weights.get(name)}
    return [Merge(method, used, student.density, student.rank)]


def choose_start(
    base: Path,
    teachers: Sequence[TeacherFolder],
    *,
    text: str,
    score: Callable[[Any], float],
    among: Callable[[Sequence[str]], Sequence[Merge]],
    seed: int,
    device: torch.device,
) -> Start | None:
    """The best merge of the teachers that have the base's shape, or None where no teacher has it.

    ``score(model)`` gives nats a token of a model on ``device``; ``text`` is a digest of the text
    and of the precision. ``among`` gives the merges to try, from the teachers' names. The choice is
    kept in the cache. Raises `ModelError` for the base, and the errors of ``among``.
    """
    model = load_model(base, device=device)
    # A merge replaces the model's tensors, so these keep the base's values.
    start = {name: values.cpu() for name, values in parameters_of(model).items()}
    states = {}
    for teacher in teachers:
        try:
            state = parameters(teacher)
        except ModelError as error:  # its adapter may run beside the base all the same
            say(f"  teacher {teacher.name} is in no merge: {error}")
            continue
        if can_be_merged(start, state):
            states[teacher.name] = state
        else:
            say(f"  teacher {teacher.name} is in no merge: it does not have the base's shape")
    if not states:
        return None
    tried = list(among(list(states)))
    digests = {t.name: t.digest for t in teachers if t.name in states}

    def choose(out: Path) -> dict[str, Any]:
        choice = best_merge(model, start, states, score, among=tried, seed=seed)
        found = {"merge": asdict(choice.merge), "scores": dict(choice.scores)}
        (out / _CHOICE).write_text(json.dumps(found), encoding="utf-8")
        return {}

    asked = {
        "choice": _VERSION,
        # By content: another model may come to lie there. The manifest of a cached one has times.
        "base": {n: file_digest(base / n) for n in files_below(base) if n != MANIFEST},
        "teachers": digests,
        "text": text,
        "among": [asdict(merge) for merge in tried],
        "seed": seed,
    }
    found = json.loads((cached(fingerprint(asked), choose) / _CHOICE).read_text("utf-8"))
    merge, scores = Merge(**found["merge"]), found["scores"]
    say(
        f"  the student starts from {merge}: {scores[str(merge)]:.3f} nats a token on training text"
    )
    if str(BASE) in scores and merge != BASE:
        say(f"    (the base: {scores[str(BASE)]:.3f} nats a token)")
    used = {t.name: t for t in teachers if merge.weights.get(t.name)}
    return Start(merge, scores, used, seed)
