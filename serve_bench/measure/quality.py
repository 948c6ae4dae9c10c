"""Scoring held-out text with the arms that were timed: one block at a time, every arm on the same
one.

So memory and disk hold one block, whatever the amount of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.data.heldout import Blocks
from limbeck.contract.progress import task
from limbeck.contract.results.bench import Arm
from serve_bench.judge.quality import mix
from serve_bench.measure.workers import Workers

_FIGURES = ("nll", "kl", "top1", "calibration")


def measure_quality(
    workers: Workers,
    arms: Sequence[Arm],
    heldout: Mapping[str, Blocks],
    *,
    vocabulary: int,
    folder: Path,
    known: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> dict[str, Any]:
    """Score every arm on every held-out block, in the timed processes.

    ``vocabulary`` is the size that all arms share: padding rows of some arms are left out of every
    softmax. ``folder`` holds one block of log-probabilities per teacher. ``known`` are the NLL of
    teachers with another tokenizer, by arm, domain and block, in nats of the same text: they are
    not scored here, and are not in the mixture. Returns the content of quality.json: sums per
    block, so that any mean and interval can be computed from it.
    """
    known = known or {}
    here = [arm for arm in arms if arm.id not in known]
    teachers = [arm for arm in here if arm.role == "teacher"]
    answering = [arm for arm in here if arm.scored]
    result = {"vocabulary": vocabulary} | _empty(teachers, answering, heldout)
    chosen = _choices(workers, arms, heldout)
    files = [folder / f"teacher{index}.npy" for index in range(len(teachers))]
    mixture = folder / "mixture.npy"
    total = sum(len(blocks) for blocks in heldout.values())
    with task("quality: held-out blocks", total) as progress:
        for name, blocks in heldout.items():
            for index, (ids, scored) in enumerate(
                zip(_rows(blocks), blocks.scored.tolist(), strict=True)
            ):
                for arm, file in zip(teachers, files, strict=True):
                    workers[arm].ask("logp", ids=ids, vocabulary=vocabulary, file=str(file))
                if teachers:
                    mix(files, mixture)
                for arm in answering:
                    found = workers[arm].ask(
                        "score",
                        ids=ids,
                        scored=scored[1 : len(ids)],
                        vocabulary=vocabulary,
                        mixture=str(mixture) if teachers else None,
                    )
                    for figure, values in result["arms"][arm.id][name].items():
                        values.append(found[figure])
                    if index == 0 and arm.id in chosen:
                        same = result["same_choice"].setdefault(arm.id, {})
                        same[name] = chosen[arm.id][name] == found["last"]
                progress.advance()
    if known:
        result["other_tokenizers"] = list(known)
    result["arms"] |= {
        arm: {name: {"nll": list(nll)} for name, nll in by_domain.items()}
        for arm, by_domain in known.items()
    }
    return result


def _empty(
    teachers: Sequence[Arm], answering: Sequence[Arm], heldout: Mapping[str, Blocks]
) -> dict[str, Any]:
    """The content of quality.json before the first answer."""
    return {
        "mixture_of": [arm.id for arm in teachers],
        # Whether the graph that was timed and its twin that scores choose the same token after one
        # block a domain.
        "same_choice": {},
        "domains": {
            name: {
                "labels": blocks.scored.sum(1).tolist(),
                "utf8_bytes": blocks.utf8_bytes.tolist(),
            }
            for name, blocks in heldout.items()
        },
        "arms": {
            arm.id: {name: {figure: [] for figure in _FIGURES} for name in heldout}
            for arm in answering
        },
    }


def measure_evaluations(
    workers: Workers, arms: Sequence[Arm], rows: Mapping[str, Blocks], *, vocabulary: int
) -> dict[str, Any]:
    """Answer the short evaluations with every arm that has the student's tokens.

    Returns `evals` of quality.json: scored tokens of each row, and by arm their summed NLL and how
    many are the first choice.
    """
    found: dict[str, Any] = {
        "labels": {name: blocks.scored.sum(1).tolist() for name, blocks in rows.items()},
        "arms": {arm.id: {name: {"nll": [], "right": []} for name in rows} for arm in arms},
    }
    with task("quality: short evaluations", sum(map(len, rows.values()))) as progress:
        for name, blocks in rows.items():
            for ids, scored in zip(_rows(blocks), blocks.scored.tolist(), strict=True):
                for arm in arms:
                    answered = workers[arm].ask(
                        "evaluate", ids=ids, scored=scored[1 : len(ids)], vocabulary=vocabulary
                    )
                    for figure, values in found["arms"][arm.id][name].items():
                        values.append(answered[figure])
                progress.advance()
    return found


def _rows(blocks: Blocks) -> list[list[int]]:
    return [
        row[:length].tolist() for row, length in zip(blocks.input_ids, blocks.lengths, strict=True)
    ]


def _choices(
    workers: Workers, arms: Sequence[Arm], heldout: Mapping[str, Blocks]
) -> dict[str, dict[str, int]]:
    """First choices of each onnx arm's timed graph after the first block of each domain."""
    return {
        arm.id: {
            name: workers[arm].ask("last", ids=_rows(blocks)[0][:-1])["token"]
            for name, blocks in heldout.items()
        }
        for arm in arms
        if arm.role == "form"
    }
