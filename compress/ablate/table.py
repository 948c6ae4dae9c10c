"""The ablation's table: paired differences with intervals, a sentence, Markdown and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.ablate.arms import DESIGNS, Design
from limbeck.contract.data.heldout import mean_nll

Run = Mapping[str, Any]
FURTHER = {  # figures beside the loss, and how the table calls them
    "tokens": "tokens",
    "examples": "examples",
    "seconds": "seconds",
    "kl_to_mixture": "KL to mixture",
    "top1_agreement": "top-1",
    "last_word": "last word",
    "calibration_error": "calibration error",
    "facts": "facts kept",
    "next_line": "next line of code",
    "next_line_tokens": "its tokens",
    "prose_loss": "loss on other prose, nats a token",
    "python_loss": "loss on Python, nats a token",
    "text_match": "text's own tokens",
    "distinct_2": "distinct pairs",
    "repetition": "repeated",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "spearman": "Spearman",
}


class _Bootstrap:
    """Paired draws of seeds and, within every domain, of held-out blocks; all arms share them.

    Shapes: D draws, S seeds, B blocks of a domain.
    """

    def __init__(
        self,
        sums: Mapping[str, Mapping[str, npt.NDArray[np.float64]]],
        labels: Mapping[str, npt.NDArray[np.int64]],
        seeds: int,
        draws: int,
    ) -> None:
        """``sums``: losses ``[seeds, blocks]`` by arm, domain; ``labels``: counts ``[blocks]``."""
        self.sums, self.labels = sums, labels
        rng, sizes = np.random.default_rng(0), [len(counts) for counts in labels.values()]
        picks = [
            (rng.integers(seeds, size=seeds), [rng.integers(n, size=n) for n in sizes])
            for _ in range(draws)
        ]
        self.seeds_DS = np.stack([seeds for seeds, _ in picks])
        blocks = zip(*(blocks for _, blocks in picks), strict=True)
        self.blocks_DB = dict(zip(labels, map(np.stack, blocks), strict=True))

    def interval(self, arm: str, other: str, names: Sequence[str]) -> tuple[float, float, float]:
        """Return the difference per label of two arms over some domains, with its 95 % interval."""
        gap = {d: self.sums[arm][d] - self.sums[other][d] for d in names}
        labels = self.labels
        point = float(np.mean([gap[d].mean(0).sum() / labels[d].sum() for d in names]))
        seeds_DS1, blocks_DB = self.seeds_DS[:, :, None], self.blocks_DB
        gaps_D = [gap[d][seeds_DS1, blocks_DB[d][:, None]].mean(1).sum(1) for d in names]
        each_D = [g / labels[d][blocks_DB[d]].sum(1) for d, g in zip(names, gaps_D, strict=True)]
        drawn = np.stack(each_D, axis=1).mean(1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return point, float(low), float(high)


def summarise(
    runs: Mapping[str, Run],
    seeds: Sequence[int],
    *,
    design: Design = DESIGNS["causal-lm"],
    draws: int = 4000,
) -> dict[str, dict[str, Any]]:
    """Return by arm the mean loss, the loss by domain, and the difference to the reference arm.

    ``runs`` are named ``arm/seed``; they hold losses summed over each held-out block, and counts.
    """
    arms = list(dict.fromkeys(name.split("/")[0] for name in runs))
    reference = design.reference
    first = runs[f"{reference}/{seeds[0]}"]
    domains = list(first["loss"])
    sums = {
        a: {d: np.array([runs[f"{a}/{s}"]["loss"][d] for s in seeds]) for d in domains}
        for a in arms
    }
    labels = {d: np.array(first["labels"][d]) for d in domains}
    bootstrap = _Bootstrap(sums, labels, len(seeds), draws)
    table = {}
    for arm in arms:
        loss = {d: float(sums[arm][d].mean(0).sum() / labels[d].sum()) for d in domains}
        table[arm] = {
            "loss": loss,
            "mean_loss": mean_nll(loss),
            "against_reference": bootstrap.interval(arm, reference, domains),
            "against_reference_by_domain": {
                d: bootstrap.interval(arm, reference, [d]) for d in domains
            },
            "weights": runs[f"{arm}/{seeds[0]}"]["weights"],
        }
        if design.is_nll:
            table[arm]["perplexity"] = {d: math.exp(value) for d, value in loss.items()}
        for name in FURTHER:
            if all(name in runs[f"{arm}/{s}"] for s in seeds):
                table[arm][name] = float(np.mean([runs[f"{arm}/{s}"][name] for s in seeds]))
        if "recipe" in arms and arm != "recipe":
            table[arm]["recipe_against_it"] = bootstrap.interval("recipe", arm, domains)
    return table


def verdict(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one sentence which controls the recipe's own weighting beats, and which not."""
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


def markdown(table: Mapping[str, Mapping[str, Any]], design: Design) -> str:
    """Return the table as Markdown, best arm first."""
    first = next(iter(table.values()))
    domains = list(first["loss"])
    further = [n for n in FURTHER if any(n in r for r in table.values())]
    columns = ["arm", *domains, f"mean ({design.loss})", f"against {design.reference} (95 %)"]
    columns += [FURTHER[n] for n in further]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, row in sorted(table.items(), key=lambda item: item[1]["mean_loss"]):
        point, low, high = row["against_reference"]
        cells = [arm, *(f"{row['loss'][d]:.4f}" for d in domains), f"{row['mean_loss']:.4f}"]
        cells.append(f"{point:+.4f} [{low:+.4f}, {high:+.4f}]")
        cells += [_cell(n, row[n]) if n in row else "" for n in further]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    return f"{value:,.0f}" if name in ("tokens", "examples", "seconds") else f"{value:.3f}"


def draw(table: Mapping[str, Mapping[str, Any]], path: Path, design: Design) -> None:
    """Draw the differences to the reference arm with their intervals to ``path``."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    arms = sorted(table, key=lambda a: -table[a]["mean_loss"])
    rows: npt.NDArray[np.int64] = np.arange(len(arms))
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(arms) + 1.2), layout="constrained")
    for y, arm in zip(rows, arms, strict=True):
        point, low, high = table[arm]["against_reference"]
        colour = "#b3541e" if arm == "recipe" else "#2f5d8a"
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(point, y, "o", color=colour, markersize=6)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(rows, arms)
    axes.set_xlabel(
        f"held-out {design.loss}, against {design.reference} (left is better; 95 % interval)"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path)
    plt.close(figure)
