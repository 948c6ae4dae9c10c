"""Quality on held-out text: NLL, KL to the teachers' mixture, top-1 agreement, bits per byte and
calibration error.

Blocks are scored one at a time, each by every arm, so memory and disk hold one block for any amount
of text. Knows log-probabilities and sums; the models run in `serve_bench.worker.language`.

Shape letters: N labels of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.contract.data.heldout import mean_nll

LogProbabilities = npt.NDArray[np.float32]
_ROWS = 32  # positions worked on at a time, in double precision
BINS = 15  # of confidence, for the calibration error; the number of Guo et al., arXiv 1706.04599


def log_softmax(logits_NV: npt.NDArray[np.float32]) -> LogProbabilities:
    """Log-probabilities [N, V], in place where the logits allow it."""
    out = np.require(logits_NV, np.float32, ["C", "W"])
    for start in range(0, len(out), _ROWS):
        rows = out[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        out[start : start + _ROWS] = rows
    return out


def mix(files: Sequence[Path], out: Path) -> None:
    """Write the log of the mean probability of the teachers (``files``, [N, V] each) to ``out``."""
    teachers = [np.load(file, mmap_mode="r") for file in files]
    mixture = np.empty(teachers[0].shape, np.float32)
    for start in range(0, len(mixture), _ROWS):
        total = np.zeros((len(mixture[start : start + _ROWS]), mixture.shape[1]))
        for teacher in teachers:
            total += np.exp(teacher[start : start + _ROWS].astype(np.float64))
        with np.errstate(divide="ignore"):  # a token that no teacher thinks possible
            mixture[start : start + _ROWS] = np.log(total / len(teachers))
    np.save(out, mixture)


def sums(
    arm_NV: LogProbabilities,
    labels_N: npt.NDArray[np.int64],
    mixture_NV: LogProbabilities | None,
    scored_N: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """Sums over the scored labels, and the bins of calibration.

    NLL in nats, KL(mixture || arm) in nats, and agreement of the first choices. Each bin has the
    number of choices, their summed confidence, and the number of correct ones.
    """
    nll = -float(arm_NV[np.arange(len(labels_N)), labels_N][scored_N].astype(np.float64).sum())
    result: dict[str, Any] = {"labels": int(scored_N.sum()), "nll": nll, "kl": None, "top1": None}
    result["calibration"] = calibration(arm_NV[scored_N], labels_N[scored_N])
    result["last"] = int(arm_NV[-1].argmax())
    if mixture_NV is None:
        return result
    kl, agreed = 0.0, 0
    for start in range(0, len(labels_N), _ROWS):
        scored = scored_N[start : start + _ROWS]
        log_p = np.asarray(mixture_NV[start : start + _ROWS][scored], np.float64)
        log_q = arm_NV[start : start + _ROWS][scored].astype(np.float64)
        p = np.exp(log_p)
        kl += float(np.where(p > 0, p * (log_p - log_q), 0.0).sum())
        agreed += int((log_p.argmax(1) == log_q.argmax(1)).sum())
    return result | {"kl": kl, "top1": agreed}


def calibration(arm_NV: LogProbabilities, labels_N: npt.NDArray[np.int64]) -> list[list[float]]:
    """[BINS] of (choices, summed confidence, correct choices), in equal bins from 0 to 1."""
    choice_N = arm_NV.argmax(1)
    confidence_N = np.exp(arm_NV[np.arange(len(choice_N)), choice_N].astype(np.float64))
    bin_N = np.clip((confidence_N * BINS).astype(np.int64), 0, BINS - 1)
    columns = (np.ones(len(bin_N)), confidence_N, (choice_N == labels_N).astype(np.float64))
    bins: list[list[float]] = np.stack(
        [np.bincount(bin_N, c, minlength=BINS) for c in columns], axis=1
    ).tolist()
    return bins


def calibration_error(blocks: Sequence[Sequence[Sequence[float]]]) -> float:
    """Expected calibration error: mean |confidence - accuracy| over bins, weighted by choices."""
    count, confidence, right = np.asarray(blocks, np.float64).sum(0).T
    return float(np.abs(confidence - right).sum() / count.sum())


def summarise(quality: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """Figures of one arm from quality.json: by domain, and their unweighted mean.

    NLL and KL in nats per token, ``bits_per_byte`` over the UTF-8 bytes of the scored text (None
    where special tokens alone are scored);
    ``top1`` and ``calibration_error`` are shares of 1. Older benches have no calibration.
    """
    by_domain = {}
    for name, sizes in quality["domains"].items():
        sums, labels = quality["arms"][arm][name], sum(sizes["labels"])
        nll, size = sum(sums["nll"]), sum(sizes["utf8_bytes"])
        by_domain[name] = {
            "nll": nll / labels,
            "perplexity": math.exp(min(nll / labels, 700.0)),
            "bits_per_byte": nll / math.log(2) / size if size else None,
            # A teacher with another tokenizer has no distribution over these tokens.
            "kl": sum(sums["kl"]) / labels if quality["mixture_of"] and "kl" in sums else None,
            "top1": sum(sums["top1"]) / labels
            if quality["mixture_of"] and "top1" in sums
            else None,
            "calibration_error": calibration_error(sums["calibration"])
            if "calibration" in sums
            else None,
        }
    mean = mean_nll({name: figures["nll"] for name, figures in by_domain.items()})
    return {
        "domains": by_domain,
        "mean_nll": mean,
        "mean_perplexity": math.exp(min(mean, 700.0)),
        "mean_bits_per_byte": _mean(by_domain, "bits_per_byte"),
        "mean_kl": _mean(by_domain, "kl"),
        "mean_top1": _mean(by_domain, "top1"),
        "mean_calibration_error": _mean(by_domain, "calibration_error"),
    }


def _mean(by_domain: Mapping[str, Mapping[str, float | None]], figure: str) -> float | None:
    values = [figures[figure] for figures in by_domain.values()]
    return float(np.mean([v for v in values if v is not None])) if None not in values else None
