"""Arms of the ablation of each task: their changes to the recipe, and the reference arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import AnyRecipe, parse_any_recipe
from limbeck.contract.sources.teacher_tokens import tokenizer_mistakes

Changes = Mapping[str, Mapping[str, Any]]  # by section of the recipe
ORACLE = "routed-oracle"  # no student: each domain is answered by the teacher that reads it best
BY_DOMAIN = "best-by-domain"  # each domain is taught by the teacher that reads it best
EQUAL_TIME = "ce-only-equal-time"  # cross-entropy alone, for as many seconds as the recipe takes
STARTS = ("base", "merge")
SINGLE = "single-"  # followed by the name of the one teacher that is used
ACROSS = "across-"  # followed by the loss against teachers with another tokenizer
_LOSSES = ("projected", "chunk", "uld")


def _weights(kind: str, **options: Any) -> Changes:
    return {"fusion": {"weights": {"kind": kind, **options}}}


def _merge(method: str) -> Changes:
    return {"student": {"kind": "merge", "method": method}}


@dataclass(frozen=True)
class Design:
    """The ablation of one task."""

    arms: Mapping[str, Changes]
    reference: str  # arm that every other one is compared with
    loss: str  # the figure, and its unit
    training: Mapping[str, Any]  # of every arm
    has_starts: bool = False  # whether `ARM@base` and `ARM@merge` are arms too

    @property
    def is_nll(self) -> bool:
        """Whether the loss is a negative log-likelihood, so that its exp is a perplexity."""
        return self.loss.startswith("NLL")


_CE_ONLY: Changes = {"fusion": {"weight": 0.0, "cross_entropy": 1.0}}
_LANGUAGE = Design(
    arms={
        "ce-only": {**_CE_ONLY, "features": {"weight": 0.0}},
        "best-single": {},
        "uniform": _weights("uniform"),
        "static": {},
        "entropy-token": _weights("entropy", granularity="token"),
        "entropy-sequence": _weights("entropy", granularity="sequence", sharpness=0.1),
        "entropy-batch": _weights("entropy", granularity="batch", sharpness=0.1),
        "entropy-inverted": _weights("entropy", control="inverted"),
        "entropy-shuffled": _weights("entropy", control="shuffled"),
        "corrected-entropy": _weights("corrected_entropy"),
        "posterior": _weights("posterior"),
        "posterior-entropy": _weights("posterior", entropy=1.0),
        "label-token": _weights("label", granularity="token", sharpness=1.0),
        "label-sequence": _weights("label", granularity="sequence", sharpness=0.1),
        # Merges of the teachers, which cost no training.
        "merge-average": _merge("average"),
        "merge-ties": _merge("ties"),
        "merge-dare": _merge("dare_ties"),
        "merge-svd": _merge("svd"),
        ORACLE: {},
        BY_DOMAIN: {},
        "recipe": {},
        EQUAL_TIME: {**_CE_ONLY, "features": {"weight": 0.0}},
    },
    reference="ce-only",
    loss="NLL, nats a token",
    has_starts=True,
    # Teachers run once for all arms.
    training={"teacher_cache": {"kind": "hidden"}, "patience": None},
)
_CLASSIFICATION = Design(
    arms={
        "ce-only": _CE_ONLY,
        "best-single": {},
        "uniform": _weights("uniform"),
        "static": {},
        "entropy": _weights("entropy"),
        "entropy-inverted": _weights("entropy", control="inverted"),
        "inverse-entropy": _weights("inverse_entropy"),
        "ca-mkd": _weights("ca_mkd", granularity="token"),
        "label": _weights("label", granularity="token", sharpness=1.0),
        "recipe": {},
    },
    reference="ce-only",
    loss="NLL, nats an example",
    training={},
)
# There are no labels, so an equal mixture of the teachers is what each weighting has to beat.
_EMBEDDING = Design(
    arms={
        "uniform": _weights("uniform"),
        "best-single": {},
        "static": {},
        "entropy": _weights("entropy"),
        "entropy-inverted": _weights("entropy", control="inverted"),
        "inverse-entropy": _weights("inverse_entropy"),
        "recipe": {},
    },
    reference="uniform",
    loss="1 - rank correlation with the teachers",
    training={},
)
DESIGNS: Mapping[str, Design] = {
    "causal-lm": _LANGUAGE,
    "classification": _CLASSIFICATION,
    "embedding": _EMBEDDING,
}


def changes_of(recipe: AnyRecipe, arm: str) -> Changes | None:
    """Return what an arm changes in the recipe; None if the recipe has no such arm."""
    design, arm = DESIGNS[recipe.task], arm.partition("@")[0]
    if arm in design.arms:
        return design.arms[arm]
    if arm in [f"{SINGLE}{teacher.name}" for teacher in recipe.teachers]:
        return {}
    if design.has_starts and arm in [f"{ACROSS}{loss}" for loss in _LOSSES]:
        return {"fusion": {"across": arm.removeprefix(ACROSS)}}
    return None


def variant(
    recipe: AnyRecipe,
    arm: str,
    seed: int,
    losses: Mapping[str, float],
    *,
    by_domain: Mapping[str, str] | None = None,
    tokens: int | None = None,
) -> AnyRecipe:
    """Return the recipe of one arm; ``losses`` are those of the teachers on held-out text.

    ``by_domain`` names the best teacher of each domain; ``tokens`` replaces the budget. Held-out
    text is measured at the end only, so that no arm picks its best step.
    """
    design, tree = DESIGNS[recipe.task], recipe.resolved()
    arm, _, start = arm.partition("@")
    arm_changes = changes_of(recipe, arm) or {}
    for section, changes in arm_changes.items():
        tree[section] = {**tree[section], **changes}
    if is_merge(arm):  # a merge has no other field of the recipe's student
        tree["student"] = {"base": tree["student"]["base"], **arm_changes["student"]}
    if start:
        tree["student"]["init"] = start
    if tokens is not None:
        tree["training"]["tokens"] = tokens
    only = arm.removeprefix(SINGLE) if arm.startswith(SINGLE) else None
    if arm == "best-single":
        only = min(losses, key=losses.__getitem__)
    if only is not None:
        tree["teachers"] = [t for t in tree["teachers"] if t["name"] == only]
        tree["fusion"]["weights"] = {"kind": "uniform"}
    if arm == BY_DOMAIN:
        prior = {domain: {teacher: 1.0} for domain, teacher in (by_domain or {}).items()}
        tree["fusion"]["weights"] = {"kind": "posterior", "prior": prior}
    if arm == "static":
        least = min(losses.values())
        values = {name: math.exp(-(loss - least) / 0.1) for name, loss in losses.items()}
        tree["fusion"]["weights"] = {"kind": "static", "values": values}
    tree["seed"] = seed
    tree["training"] |= design.training
    if recipe.store is not None:
        tree["training"]["teacher_cache"] = {"kind": "hidden", "store": recipe.store}
    if (tree["training"].get("on_policy") or {}).get("share"):
        if tree["fusion"]["weight"]:
            tree["training"]["teacher_cache"] = {"kind": "none"}  # it cannot hold own text
        else:
            tree["training"]["on_policy"] = None  # own text is learnt from teachers alone
    quiet = {"evaluate_every": _NEVER, "checkpoint_every": _NEVER, "trackers": []}
    tree["training"] |= quiet
    made = parse_any_recipe(tree)
    made._folder = recipe.folder
    return made


def is_merge(arm: str) -> bool:
    """Whether an arm merges the teachers instead of training a student."""
    return arm.startswith("merge-")


def asks_teachers(recipe: AnyRecipe, arm: str) -> bool:
    """Whether the training of an arm needs the teachers' answers."""
    fusion = (changes_of(recipe, arm) or {}).get("fusion", {})
    return not is_merge(arm) and fusion.get("weight") != 0


def is_timed(arm: str) -> bool:
    """Whether an arm's budget is the time that the recipe's arm took."""
    return arm.startswith(EQUAL_TIME)


def with_live_teachers(recipe: AnyRecipe) -> AnyRecipe:
    """Return the recipe without a teacher cache, so that the teachers' time can be measured."""
    tree = recipe.resolved()
    if "teacher_cache" in tree["training"]:
        tree["training"]["teacher_cache"] = {"kind": "none"}
    made = parse_any_recipe(tree)
    made._folder = recipe.folder
    return made


def require_arm(recipe: AnyRecipe, arm: str) -> None:
    """Raise `RecipeError` for an arm that this recipe's task does not have."""
    design = DESIGNS[recipe.task]
    name, at, start = arm.partition("@")
    if changes_of(recipe, name) is None:
        known = [*design.arms, *(f"{SINGLE}{teacher.name}" for teacher in recipe.teachers)]
        known += [f"{ACROSS}{loss}" for loss in _LOSSES if design.has_starts]
        raise RecipeError(f"--arms {arm}: no such arm; known: {', '.join(known)}.")
    if name.startswith(ACROSS):  # before other arms are trained
        made = variant(recipe, name, 0, {})
        for mistake in tokenizer_mistakes(made):
            raise RecipeError(f"--arms {arm}: {mistake}.")
    if not at and is_merge(name) and recipe.base is None:
        raise RecipeError(
            f"--arms {arm}: a merge starts from the student's base, and a student of kind "
            f"{recipe.student.kind} has none; leave the arm out."
        )
    if not at:
        return
    is_trained = not is_merge(name) and name != ORACLE
    if not (design.has_starts and is_trained and start in STARTS):
        raise RecipeError(
            f"--arms {arm}: found a start of {start!r}; a start is {' or '.join(STARTS)}, of an "
            "arm that trains a language model."
        )
    if recipe.student.kind not in ("lora", "shrink"):
        raise RecipeError(
            f"--arms {arm}: a student of kind {recipe.student.kind} has one start only; name the "
            f"arm {name}."
        )


def equal_time_tokens(recipe: AnyRecipe, runs: Mapping[str, Mapping[str, Any]], of: str) -> int:
    """Return how many tokens of cross-entropy take the seconds that the recipe's arm took.

    ``of`` names arm and seed of the equal-time arm, and ``runs`` holds those that it needs.
    """
    ours, alone = (runs[of.replace(EQUAL_TIME, arm, 1)] for arm in ("recipe", "ce-only"))
    training = recipe.resolved()["training"]
    batch: int = training["batch_tokens"]
    # The budget counts tokens of full blocks, and a run's `tokens` are its labels.
    seconds_a_token = alone["seconds"] / training["tokens"]
    return max(batch, int(ours["seconds"] / seconds_a_token) // batch * batch)


_NEVER = 1 << 30  # steps
