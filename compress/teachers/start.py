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
from limbeck.contract.adapters import attach
from limbeck.contract.adapters import merged as without_adapter
from limbeck.contract.artifact import MANIFEST
from limbeck.contract.errors import RecipeError
from limbeck.contract.files import file_digest, files_below
from limbeck.contract.progress import say
from limbeck.contract.recipe import LoraStudent, MergeStudent, ShrinkStudent, fingerprint

_VERSION = 1  # raise it when the same input would give another choice
_CHOICE = "choice.json"
_JOINED = "joined"


class NothingToMergeError(RecipeError):
    """No teacher has the shape of the student's base."""


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

    def join_adapter(self, own: Path, base: Path) -> bool:
        """Turn the adapter ``own``, trained on the merged weights, into one on the true ``base``.

        It then holds the teachers' adapters and its own, side by side (peft's exact `cat`), so it
        loads beside the base as any adapter does. Returns False, and removes the folder, where the
        teachers are not plain LoRA adapters: no adapter says what such a merge did to the base.
        """
        if not self.can_join(base):
            shutil.rmtree(own)
            return False
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_model(base), str(own), adapter_name="own")
        names, weights = ["own"], [1.0]
        for name, teacher in self.teachers.items():
            model.load_adapter(str(teacher.adapter), adapter_name=f"teacher:{name}")
            names.append(f"teacher:{name}")
            weights.append(self.merge.weights[name])
        model.add_weighted_adapter(names, weights, _JOINED, combination_type="cat")
        out = own.with_name(f"{own.name}.joined")
        model.save_pretrained(out, selected_adapters=[_JOINED])
        shutil.rmtree(own)
        (out / _JOINED).rename(own)
        shutil.rmtree(out)
        (own / "README.md").unlink(missing_ok=True)  # peft's empty model card
        return True

    def can_join(self, base: Path) -> bool:
        """Whether the merge is a weighted sum of plain LoRA adapters on ``base``."""
        return self.merge.method == "average" and all(
            t.adapter is not None and t.base.resolve() == base.resolve() and _is_plain(t.adapter)
            for t in self.teachers.values()
        )

    def described(self) -> dict[str, Any]:
        """Return the entry of the student's result."""
        return {"merge": str(self.merge), "scores": dict(self.scores)}


def _is_plain(adapter: Path) -> bool:
    """Whether an adapter is low-rank updates of one rank and nothing else."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    more = (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "rank_pattern",
        "layer_replication",
    )
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    return plain and not any(config.get(name) for name in more)


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
    method: Method = "average" if student.method == "auto" else student.method
    equal = 1 / len(names) if method == "average" else 1.0
    weights = student.weights or dict.fromkeys(names, equal)
    used = {name: weights[name] for name in names if weights.get(name)}
    return [Merge(method, used, student.density)]


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
        # By content: another model may come to lie there. The manifest of a cached one has times.
        "base": {n: file_digest(base / n) for n in files_below(base) if n != MANIFEST},
        "teachers": digests,
        "text": text,
        "among": [asdict(merge) for merge in tried],
        "seed": seed,
    }
    found = json.loads((cached(fingerprint(asked), choose) / _CHOICE).read_text())
    merge, scores = Merge(**found["merge"]), found["scores"]
    say(
        f"  the student starts from {merge}: {scores[str(merge)]:.3f} nats a token on training text"
    )
    if str(BASE) in scores and merge != BASE:
        say(f"    (the base: {scores[str(BASE)]:.3f})")
    used = {t.name: t for t in teachers if merge.weights.get(t.name)}
    return Start(merge, scores, used, seed)
