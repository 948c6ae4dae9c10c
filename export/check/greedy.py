"""Where a form's greedy answer first leaves fp32's, and how sure fp32 was there.

Knows the decoder and token ids. A form is fed fp32's own tokens one at a time, which is its own
greedy answer up to the first difference; after that two texts are no longer comparable word by
word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.check.parity import margins
from limbeck.contract.progress import task
from limbeck.runtime.decoder import GraphDecoder

_PROMPT, _ANSWER = 32, 64  # tokens
_PROMPTS = 3  # one a domain


@dataclass(frozen=True)
class Answer:
    """What fp32 says after a prompt, greedily."""

    prompt: list[int]
    tokens: list[int]
    leads: list[float]  # logit difference between its first and its second choice, a token


def answer_greedily(
    decoder: GraphDecoder,
    texts: Mapping[str, npt.NDArray[np.int64]],
    *,
    stop_ids: Collection[int] = (),
) -> dict[str, Answer]:
    """Continue the start of each held-out text up to 64 tokens or a stop token, which is kept."""
    answers = {}
    with task("greedy answers of fp32", min(len(texts), _PROMPTS)) as progress:
        for name, text in list(texts.items())[:_PROMPTS]:
            context = decoder.context or _PROMPT + _ANSWER
            prompt = text[: max(min(_PROMPT, context // 2), 1)].tolist()
            tokens: list[int] = []
            leads: list[float] = []
            room = min(_ANSWER, context - len(prompt))
            row = decoder.prefill([prompt], room=room)[0]
            while True:
                tokens.append(int(row.argmax()))
                leads.append(float(margins(row[None])[0]))
                if len(tokens) == room or tokens[-1] in stop_ids:
                    break
                row = decoder.step([tokens[-1]])[0]
            answers[name] = Answer(prompt, tokens, leads)
            progress.advance()
    return answers


def first_differences(decoder: GraphDecoder, answers: Mapping[str, Answer]) -> list[dict[str, Any]]:
    """For each answer of fp32, by domain: its ``tokens``, how many of them the form gives too
    before it first differs (``same``), and fp32's ``lead`` at the token where it differs, none
    where it never does."""
    found = []
    for name, answer in answers.items():
        row = decoder.prefill([answer.prompt], room=len(answer.tokens))[0]
        same = 0
        while int(row.argmax()) == answer.tokens[same]:
            same += 1
            if same == len(answer.tokens):
                break
            row = decoder.step([answer.tokens[same - 1]])[0]
        lead = answer.leads[same] if same < len(answer.tokens) else None
        found.append({"text": name, "tokens": len(answer.tokens), "same": same, "lead": lead})
    return found
