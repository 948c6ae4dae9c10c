"""The honesty ablation: the recipe's fusion beside its controls, at equal tokens and seeds, from one teacher cache.

A claim about several teachers counts only beside these: cross-entropy only, the best single teacher, uniform, static,
entropy in its forms, inverted, shuffled, and an oracle that sees the label. Intervals are paired bootstraps over seeds
and held-out blocks; NLL is per token, averaged over domains without weights. Beside it: KL to a mixture that no arm trains on, and
what greedy continuations of held-out text are like.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress import quiet_libraries
from compress.data.blocks import IGNORED, labels_of
from compress.head import chunks_of_labels
from compress.loop import (
    Run,
    fit,
    heldout_batches,
    measure_teachers,
    setup,
    student_head,
    student_nll,
)
from compress.states import TeacherStates
from limbeck.contract import sources
from limbeck.contract.errors import RecipeError
from limbeck.contract.files import write_atomically
from limbeck.contract.generated import distinct, repetition
from limbeck.contract.heldout import mean_nll
from limbeck.contract.progress import say
from limbeck.contract.recipe import Recipe, fingerprint, parse_recipe

REFERENCE = "ce-only"
_FURTHER = {  # beside the loss, and how the table calls them
    "kl_to_mixture": "KL to mixture", "top1_agreement": "top-1", "text_match": "text's own tokens", "distinct_2": "distinct pairs",
    "repetition": "repeated",
}  # fmt: skip
_GENERATED, _GENERATED_BATCHES = (
    32,
    2,
)  # most tokens read, and generated after them; batches of held-out rows a domain
ARMS: dict[str, dict[str, Any]] = {
    "ce-only": {"fusion": {"weight": 0.0, "cross_entropy": 1.0}, "features": {"weight": 0.0}},
    "best-single": {},
    "uniform": {"fusion": {"weights": {"kind": "uniform"}}},
    "static": {},
    "entropy-token": {"fusion": {"weights": {"kind": "entropy", "granularity": "token"}}},
    "entropy-sequence": {
        "fusion": {"weights": {"kind": "entropy", "granularity": "sequence", "sharpness": 0.1}}
    },
    "entropy-batch": {
        "fusion": {"weights": {"kind": "entropy", "granularity": "batch", "sharpness": 0.1}}
    },
    "entropy-inverted": {"fusion": {"weights": {"kind": "entropy", "control": "inverted"}}},
    "entropy-shuffled": {"fusion": {"weights": {"kind": "entropy", "control": "shuffled"}}},
    "corrected-entropy": {"fusion": {"weights": {"kind": "corrected_entropy"}}},
    "posterior": {"fusion": {"weights": {"kind": "posterior"}}},
    "posterior-entropy": {"fusion": {"weights": {"kind": "posterior", "entropy": 1.0}}},
    "label-token": {
        "fusion": {"weights": {"kind": "label", "granularity": "token", "sharpness": 1.0}}
    },
    "label-sequence": {
        "fusion": {"weights": {"kind": "label", "granularity": "sequence", "sharpness": 0.1}}
    },
    "recipe": {},
}


def ablate(
    *,
    recipe: Recipe,
    products: Mapping[str, Path],
    out: Path,
    arms: Sequence[str] = tuple(ARMS),
    seeds: int = 3,
) -> dict[str, Any]:
    """Train every arm with every seed and compare; writes ``ablation.json`` and ``ablation.svg`` to ``out``.

    Goes on where it was interrupted, while the models and texts are the same. Raises `RecipeError` for a recipe without two teachers or an unknown arm.
    """
    if len(recipe.teachers) < 2:
        raise RecipeError(
            f"{recipe.name}: an ablation of fusion needs at least two teachers, found {len(recipe.teachers)}."
        )
    for arm in arms:
        if arm not in ARMS:
            raise RecipeError(f"--arms {arm}: no such arm; known: {', '.join(ARMS)}.")
    if recipe.training.tokens is None:
        raise RecipeError(
            f"{recipe.name}: arms are compared at equal tokens; give training.tokens instead of minutes."
        )
    quiet_libraries()
    arms = list(dict.fromkeys([REFERENCE, *arms]))
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "runs.json"
    key = fingerprint(
        [recipe.distillation(), sources.input_digests(recipe, products=products), ARMS]
    )
    saved = json.loads(kept.read_text()) if kept.exists() else {}
    runs: dict[str, dict[str, Any]] = saved["runs"] if saved.get("key") == key else {}
    for seed in range(recipe.seed, recipe.seed + seeds):
        for arm in arms:
            if f"{arm}/{seed}" in runs:
                continue
            say(f"{arm}, seed {seed}")
            runs[f"{arm}/{seed}"] = _train_arm(recipe, products, out, arm, seed, key)
            write_atomically(kept, json.dumps({"key": key, "runs": runs}))
    wanted = {name: run for name, run in runs.items() if name.split("/")[0] in arms}
    table = summarise(wanted, list(range(recipe.seed, recipe.seed + seeds)))
    write_atomically(
        out / "ablation.json",
        json.dumps({"arms": table, "seeds": seeds, "recipe": recipe.resolved()}, indent=1),
    )
    _draw(table, out / "ablation.svg")
    return {"arms": table, "verdict": verdict(table)}


def _variant(recipe: Recipe, arm: str, seed: int, nll: Mapping[str, float]) -> Recipe:
    """The recipe of one arm: teachers run once, held-out text measured at the end only, so that no arm picks its best step."""
    tree = recipe.resolved()
    for section, changes in ARMS[arm].items():
        tree[section] = {**tree[section], **changes}
    if arm == "best-single":
        tree["teachers"] = [
            t for t in tree["teachers"] if t["name"] == min(nll, key=nll.__getitem__)
        ]
        tree["fusion"]["weights"] = {"kind": "uniform"}
    if arm == "static":
        least = min(nll.values())
        tree["fusion"]["weights"] = {
            "kind": "static",
            "values": {n: math.exp(-(v - least) / 0.1) for n, v in nll.items()},
        }
    tree["seed"] = seed
    steps = tree["training"]["tokens"] // tree["training"]["batch_tokens"]
    tree["training"] |= {
        "teacher_cache": {"kind": "hidden"},
        "evaluate_every": steps,
        "checkpoint_every": steps,
        "patience": None,
    }
    variant = parse_recipe(tree)
    variant._folder = recipe.folder
    return variant


def _train_arm(
    recipe: Recipe, products: Mapping[str, Path], out: Path, arm: str, seed: int, key: str
) -> dict[str, Any]:
    work = out / ".training"
    nll = _teacher_nll(recipe, products, out, key)
    run = setup(
        recipe=_variant(recipe, arm, seed, nll),
        products=products,
        work=work,
        key=f"{key}/{arm}/{seed}",
    )
    measure_teachers(run)
    fit(run)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    (work / "log.jsonl").unlink()
    (work / "checkpoint.pt").unlink(missing_ok=True)
    (work / "teachers.json").unlink(missing_ok=True)
    weights = [row["weights"] for row in log if row["event"] == "step" and row["weights"]]
    mean_weights = {
        d: {t: float(np.mean([w[d][t] for w in weights if d in w])) for t in weights[0][d]}
        for d in (weights[0] if weights else {})
    }
    return {
        "nll": student_nll(run, label=arm),
        "labels": {
            b.name: (labels_of(b.heldout.input_ids, b.heldout.scored) != IGNORED).sum(1).tolist()
            for b in run.blocks
        },
        "weights": mean_weights,
        **_generation(run),
        **(_against_mixture(run) if len(run.teachers) > 1 else {}),
    }


def _teacher_nll(
    recipe: Recipe, products: Mapping[str, Path], out: Path, key: str
) -> dict[str, float]:
    """Mean held-out NLL by teacher, once for the whole ablation of ``key``."""
    kept = out / "teachers.json"
    saved = json.loads(kept.read_text()) if kept.exists() else {}
    if saved.get("key") != key:
        run = setup(
            recipe=_variant(recipe, "uniform", recipe.seed, {}),
            products=products,
            work=out / ".training",
            key=f"{key}/teachers",
        )
        nll = {name: report["mean_nll"] for name, report in measure_teachers(run).items()}
        saved = {"key": key, "nll": nll}
        write_atomically(kept, json.dumps(saved))
    found: dict[str, float] = saved["nll"]
    return found


@torch.no_grad()
def _against_mixture(run: Run) -> dict[str, float]:
    """KL(uniform teacher mixture at tau = 1 || student), nats a token, and top-1 agreement: a reference no arm trains on."""
    divergence = agreement = count = 0.0
    head = student_head(run)
    run.student.eval()
    for domain in run.blocks:
        for ids, labels in heldout_batches(domain.heldout):
            with run.accelerator.autocast():
                hidden = run.student(
                    ids.to(run.accelerator.device), lambda hidden_RLd, _: hidden_RLd
                )
                teachers, _ = run.teachers.states(ids)
            for place in chunks_of_labels(labels, 256, whole_rows=False):
                logq = torch.log_softmax(head.logits(hidden[place].to(head.weight_Vd.dtype)), -1)
                mixture = torch.stack(
                    [
                        torch.softmax(t.head.logits(t.hidden_RLd[place]), -1)
                        for t in teachers
                        if isinstance(t, TeacherStates)
                    ]
                ).mean(0)
                divergence += float(
                    (torch.special.xlogy(mixture, mixture) - mixture * logq).double().sum()
                )
                agreement += float((mixture.argmax(-1) == logq.argmax(-1)).sum())
                count += len(place[0])
    return {"kl_to_mixture": divergence / count, "top1_agreement": agreement / count}


@torch.no_grad()
def _generation(run: Run) -> dict[str, float]:
    """Greedy continuations of held-out text: share of it that is the text's own tokens, of different pairs, of repeated pieces."""
    model, device = run.accelerator.unwrap_model(run.student).model.eval(), run.accelerator.device
    half = min(_GENERATED, run.recipe.data.block // 2)
    rows, agreed = [], []
    for domain in run.blocks:
        for ids, labels in itertools.islice(heldout_batches(domain.heldout), _GENERATED_BATCHES):
            text = ids[(labels[:, : 2 * half] != IGNORED).sum(1) >= 2 * half - 1, : 2 * half].to(
                device
            )
            if not len(text):  # every row is shorter
                continue
            with run.accelerator.autocast():
                made = model.generate(
                    input_ids=text[:, :half], attention_mask=torch.ones_like(text[:, :half]), do_sample=False,
                    min_new_tokens=half, max_new_tokens=half, pad_token_id=0,
                )[:, half:]  # fmt: skip
            rows += made.tolist()
            agreed += (made == text[:, half:]).float().mean(1).tolist()
    if not rows:
        return {}
    return {
        "text_match": float(np.mean(agreed)),
        "distinct_2": distinct(rows, 2),
        "repetition": float(np.mean([repetition(row) for row in rows])),
    }


def summarise(
    runs: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], *, draws: int = 4000
) -> dict[str, dict[str, Any]]:
    """By arm: mean NLL, by domain, and the paired difference to cross-entropy only with its 95 % interval.

    The bootstrap resamples seeds and, within every domain, held-out blocks; both arms of a pair share every draw.
    """
    arms = list(dict.fromkeys(name.split("/")[0] for name in runs))
    reference = runs[f"{REFERENCE}/{seeds[0]}"]
    domains = list(reference["nll"])
    sums = {
        a: {d: np.array([runs[f"{a}/{s}"]["nll"][d] for s in seeds]) for d in domains} for a in arms
    }  # [S, blocks]
    labels = {d: np.array(reference["labels"][d]) for d in domains}
    rng = np.random.default_rng(0)
    picks = [
        (
            rng.integers(len(seeds), size=len(seeds)),
            {d: rng.integers(len(labels[d]), size=len(labels[d])) for d in domains},
        )
        for _ in range(draws)
    ]

    def interval(arm: str, other: str, names: Sequence[str]) -> tuple[float, float, float]:
        gap = {d: sums[arm][d] - sums[other][d] for d in names}
        point = float(np.mean([gap[d].mean(0).sum() / labels[d].sum() for d in names]))
        drawn = [
            np.mean([gap[d][s][:, b[d]].mean(0).sum() / labels[d][b[d]].sum() for d in names])
            for s, b in picks
        ]
        low, high = np.percentile(drawn, [2.5, 97.5])
        return point, float(low), float(high)

    table = {}
    for arm in arms:
        nll = {d: float(sums[arm][d].mean(0).sum() / labels[d].sum()) for d in domains}
        table[arm] = {
            "nll": nll,
            "mean_nll": mean_nll(nll),
            "perplexity": {d: math.exp(value) for d, value in nll.items()},
            "against_ce": interval(arm, REFERENCE, domains),
            "against_ce_by_domain": {d: interval(arm, REFERENCE, [d]) for d in domains},
            "weights": runs[f"{arm}/{seeds[0]}"]["weights"],
        }
        for name in _FURTHER:
            if all(name in runs[f"{arm}/{s}"] for s in seeds):
                table[arm][name] = float(np.mean([runs[f"{arm}/{s}"][name] for s in seeds]))
        if "recipe" in arms and arm != "recipe":
            table[arm]["recipe_against_it"] = interval("recipe", arm, domains)
    return table


def verdict(table: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence: which controls the recipe's own weighting beats, and which it does not."""
    if "recipe" not in table:
        return "The recipe's own arm was not run."
    beaten = [a for a, row in table.items() if a != "recipe" and row["recipe_against_it"][2] < 0]
    rest = [a for a in table if a != "recipe" and a not in beaten]
    text = (
        f"The recipe's arm beats {', '.join(beaten)} (95 % interval below zero)"
        if beaten
        else "The recipe's arm beats no control"
    )
    return f"{text}; it does NOT clearly beat {', '.join(rest)}." if rest else f"{text}."


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown, best arm first."""
    domains = list(next(iter(table.values()))["nll"])
    lines = [
        f"| arm | {' | '.join(domains)} | mean NLL | against ce-only (95 %) | {' | '.join(_FURTHER.values())} |",
        "|---" * (len(domains) + 3 + len(_FURTHER)) + "|",
    ]
    for arm, row in sorted(table.items(), key=lambda item: item[1]["mean_nll"]):
        point, low, high = row["against_ce"]
        extra = [f"{row[n]:.3f}" if n in row else "" for n in _FURTHER]
        figures = " | ".join(f"{row['nll'][d]:.4f}" for d in domains)
        lines.append(
            f"| {arm} | {figures} | {row['mean_nll']:.4f} | {point:+.4f} [{low:+.4f}, {high:+.4f}] | {' | '.join(extra)} |"
        )
    return "\n".join(lines)


def _draw(table: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    arms = sorted(table, key=lambda a: -table[a]["mean_nll"])
    rows: npt.NDArray[np.int64] = np.arange(len(arms))
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(arms) + 1.2), layout="constrained")
    for y, arm in zip(rows, arms, strict=True):
        point, low, high = table[arm]["against_ce"]
        colour = "#b3541e" if arm == "recipe" else "#2f5d8a"
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(point, y, "o", color=colour, markersize=6)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(rows, arms)
    axes.set_xlabel(
        "held-out NLL against cross-entropy only, nats a token (left is better; 95 % interval)"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path)
    plt.close(figure)
