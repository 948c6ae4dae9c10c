"""Text figures of the timed generations: agreement of arms, repetition, likeness to the text.

Every arm was timed on the same held-out prompts, greedily, so the tokens cost nothing more. Knows
token rows. BLEU, chrF and ROUGE-L are those of sacrebleu and rouge-score (extra `[eval]`), and are
absent without them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.data.generated import Tokens, common_prefix, distinct, repetition
from limbeck.runtime.text import load_text
from serve_bench.judge.figures import Reference
from serve_bench.judge.stats import mean_interval

SHOWN = 3  # prompts whose answers the report shows
_WITHOUT = (
    "sacrebleu and rouge-score are not installed; run: pip install 'limbeck[eval]', and measure "
    "again."
)


def of_run(
    rows: Iterable[Mapping[str, Any]],
    reference: Reference,
    *,
    prompt: Callable[[int], Tokens],
    continuation: Callable[[int], Tokens],
    folder: Path,
    others: Mapping[int, Mapping[str, str]],
) -> dict[str, Any]:
    """Figures of the timed generations of samples.jsonl, one a block and arm, decoded with the
    tokenizer in ``folder``.

    ``continuation`` is how the held-out text of a block goes on after the prompt. Arms are held
    against the fp32 graph and the teachers; copies, and runtimes that only time, are left out.
    ``others`` are the answers of teachers with another tokenizer, by block and arm.
    """
    arms = [arm.id for arm in reference.arms if arm.scored]
    generated: dict[str, dict[int, Tokens]] = {arm: {} for arm in arms}
    for row in rows:
        if row["event"] == "sample" and row["arm"] in generated:
            generated[row["arm"]].setdefault(row["block"], row["tokens"])
    blocks = sorted(set.intersection(*(set(found) for found in generated.values())))
    against = [arm.id for arm in reference.arms if arm.id == "onnx:fp32" or arm.role == "teacher"]
    tokenizer = load_text(folder).tokenizer

    def decode(row: Tokens) -> str:
        return str(tokenizer.decode(list(row)))

    shown = [arm.id for arm in reference.arms if arm.role in ("teacher", "student")]
    shown.append(reference.shipped_arm.id)
    texts = []
    for block in blocks[:SHOWN]:
        answers = {arm: decode(generated[arm][block]) for arm in shown}
        found = marked(dict(others.get(block, {})) | answers, "student")
        text = decode(continuation(block))
        texts.append({"prompt": decode(prompt(block)), "answers": found, "text": text})
    found = describe(
        {arm: [found[block] for block in blocks] for arm, found in generated.items()},
        [continuation(block) for block in blocks],
        decode=decode,
        against=against,
    )
    return found | {"texts": texts}


def marked(texts: Mapping[str, str], base: str) -> dict[str, list[str]]:
    """Each text in two parts, the second from the first difference to that of ``base``."""
    same = {arm: _same(text, texts[base]) for arm, text in texts.items()}
    return {arm: [text[: same[arm]], text[same[arm] :]] for arm, text in texts.items()}


def describe(
    generated: Mapping[str, Sequence[Tokens]],
    references: Sequence[Tokens],
    *,
    decode: Callable[[Tokens], str],
    against: Sequence[str],
) -> dict[str, Any]:
    """Figures by arm, from one row of tokens a prompt; ``references`` is how the text itself goes
    on.

    ``against`` names arms whose choices the others are held against. Figures are means over prompts
    with bootstrap intervals; ``distinct`` is of all rows together, BLEU of the whole corpus.
    """
    texts = [decode(row) for row in references]
    result: dict[str, Any] = {
        "prompts": len(references),
        "tokens": len(references[0]),
        "against": list(against),
        "arms": {},
    }
    for arm, rows in generated.items():
        result["arms"][arm] = {
            "greedy_match": {
                other: _interval(
                    [
                        common_prefix(a, b) / len(b)
                        for a, b in zip(rows, generated[other], strict=True)
                    ]
                )
                for other in against
                if other != arm and other in generated
            },
            "distinct_1": distinct(rows, 1),
            "distinct_2": distinct(rows, 2),
            "repetition": _interval([repetition(row) for row in rows]),
        }
    result["text"] = {
        "distinct_1": distinct(references, 1),
        "distinct_2": distinct(references, 2),
        "repetition": _interval([repetition(row) for row in references]),
    }
    if not all(importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score")):
        return result | {"overlap": None, "why": _WITHOUT}
    return result | {
        "overlap": {
            arm: overlap([decode(row) for row in rows], texts) for arm, rows in generated.items()
        }
    }


def overlap(ours: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU of the corpus, and mean chrF and ROUGE-L (F1) of the texts, all from 0 to 100, with
    sacrebleu's signatures."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf, rouge = BLEU(), CHRF(), RougeScorer(["rougeL"])
    pairs = list(zip(ours, references, strict=True))
    return {
        "bleu": float(bleu.corpus_score(list(ours), [list(references)]).score),
        "chrf": _interval(
            [chrf.sentence_score(text, [reference]).score for text, reference in pairs]
        ),
        "rouge_l": _interval(
            [100 * rouge.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
        ),
        "signatures": {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
    }


def _interval(values: Sequence[float]) -> dict[str, Any]:
    found = mean_interval(np.asarray(values, np.float64))
    return found.as_json()


def _same(text: str, other: str) -> int:
    """Characters before the first difference."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
