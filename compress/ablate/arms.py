"""Arms of the ablation of each task: their changes to the recipe, and the reference arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.contract.recipe import AnyRecipe, parse_any_recipe

Changes = Mapping[str, Mapping[str, Any]]  # by section of the recipe


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
        "recipe": {},
    },
    reference="ce-only",
    loss="NLL, nats a token",
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


def variant(recipe: AnyRecipe, arm: str, seed: int, losses: Mapping[str, float]) -> AnyRecipe:
    """Return the recipe of one arm; ``losses`` are those of the teachers on held-out text.

    Held-out text is measured at the end only, so that no arm picks its best step.
    """
    design, tree = DESIGNS[recipe.task], recipe.resolved()
    for section, changes in design.arms[arm].items():
        tree[section] = {**tree[section], **changes}
    if is_merge(arm):  # a merge has no other field of the recipe's student
        tree["student"] = {"base": tree["student"]["base"], **design.arms[arm]["student"]}
    if arm == "best-single":
        best = min(losses, key=losses.__getitem__)
        tree["teachers"] = [t for t in tree["teachers"] if t["name"] == best]
        tree["fusion"]["weights"] = {"kind": "uniform"}
    if arm == "static":
        least = min(losses.values())
        values = {name: math.exp(-(loss - least) / 0.1) for name, loss in losses.items()}
        tree["fusion"]["weights"] = {"kind": "static", "values": values}
    tree["seed"] = seed
    tree["training"] |= design.training
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


_NEVER = 1 << 30  # steps
