"""Teachers with another tokenizer: what they write and answer, in their own tokens.

They are timed on the student's token ids, which are no text to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from limbeck.contract.data.heldout import Blocks
from limbeck.contract.results.bench import Arm
from limbeck.contract.sources.models import adapter_tokenizer, context_of
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.runtime.text import Text
from serve_bench.measure.workers import Worker


class OwnTokens:
    """A torch model that reads texts with its own tokenizer.

    ``decode`` gives the text of ids of the student, without special tokens.
    """

    def __init__(self, arm: Arm, worker: Worker, decode: Callable[[Sequence[int]], str]) -> None:
        folder = Path(arm.spec["model"])
        own = adapter_tokenizer(Path(arm.spec["adapter"])) if arm.spec.get("adapter") else None
        self._tokenizer = load_tokenizer(own or folder).backend_tokenizer
        self._text = Text(self._tokenizer, template=None, special={}, stop_ids=frozenset())
        self._arm, self._worker, self._decode = arm, worker, decode
        self._context = context_of(folder) or math.inf

    def written(self, prompt: Sequence[int], new_tokens: int) -> str | None:
        """How the model continues a prompt, greedily.

        It writes about as much text as ``new_tokens`` tokens of the student hold. Returns None if
        its context is too short for that.
        """
        ids = self._text.encode(self._decode(prompt))
        new = math.ceil(new_tokens * (self._arm.token_rate or 1.0))
        if len(ids) + new > self._context:
            return None
        found = self._worker.ask("generate", prompt=ids, new_tokens=new)["tokens"]
        return str(self._tokenizer.decode(found))

    def answers(self, rows: Mapping[str, Blocks]) -> dict[str, dict[str, list[float]]] | None:
        """The short evaluations, as `serve_bench.measure.quality.measure_evaluations` gives them.

        ``right`` is scaled to the student's tokens, all of which are right where all of the model's
        are. Returns None if a row does not fit into the model's context, or has no text to answer.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for name, blocks in rows.items():
            found[name] = {"nll": [], "right": []}
            columns = zip(blocks.input_ids, blocks.lengths, blocks.scored, strict=True)
            for ids, length, scored in columns:
                first = int(scored.argmax())
                before = self._text.encode(self._decode(ids[:first].tolist()))
                answer = self._tokenizer.encode(
                    self._decode(ids[first:length].tolist()), add_special_tokens=False
                ).ids
                if not before:  # the first token of all has nothing before it
                    before, answer = answer[:1], answer[1:]
                if not answer or len(before) + len(answer) > self._context:
                    return None
                marks = [0] * (len(before) - 1) + [1] * len(answer)
                sums = self._worker.ask(
                    "evaluate",
                    ids=before + answer,
                    scored=marks,
                    vocabulary=int(self._worker.opened["facts"]["vocabulary"]),
                )
                found[name]["nll"].append(sums["nll"])
                found[name]["right"].append(sums["right"] / len(answer) * int(scored.sum()))
        return found
