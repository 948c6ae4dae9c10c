"""Ask a server for the probabilities of a text's own tokens: vLLM's `prompt_logprobs`.

Knows HTTP and the shape of an answer; keeps nothing (see `compress.teachers.served`).

Shapes: P positions of a text (each token but the last), k likeliest tokens of a position.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt

from limbeck.contract.errors import EnvironmentalError, ModelError
from limbeck.contract.files import parse_json
from limbeck.contract.recipe import ServerModel
from limbeck.runtime.endpoint import CONNECT, Endpoint, ask

_BUSY = (408, 409, 425, 429)  # besides 5xx: the same request may succeed later
_LONG_NUMBER = re.compile(r"\b\d{4,9}\b")  # a token id that a server refuses, and hardly a limit
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds
_ABOVE_ONE = 1e-2  # nats; servers round
_ROWS = 2  # times as many rows as its tokenizer has tokens: more has no head
# Most bytes of an answer: for each token and likely token, and for all else.
_ENTRY, _ERROR = 1024, 1 << 20
_PROBE = (
    "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the moon; "
    'the third stayed in orbit.\n\ndef area(r):\n    return 3.14159 * r ** 2  # "circle"\n'
)
_OTHER_TEXT = 0.05  # share of token ids whose text may differ: servers decode bytes in their way


@dataclass(frozen=True)
class Likeliest:
    """Probabilities of the token after each position, as a server answers them."""

    ids_Pk: npt.NDArray[np.int32]
    logp_Pk: npt.NDArray[np.float32]  # -inf where an id is not in the tokenizer
    label_logp_P: npt.NDArray[np.float32]  # of the text's own next token


class Server:
    """One served teacher. Its methods may run in several threads at once."""

    def __init__(
        self, name: str, model: ServerModel, endpoint: Endpoint, *, vocabulary: int
    ) -> None:
        """``name`` is the teacher's; ``vocabulary`` is the number of ids of its tokenizer."""
        self._model, self._endpoint, self._vocabulary = model, endpoint, vocabulary
        self._url = f"{self._endpoint.url}/completions"
        self._where = f"teacher {name}: {self._url}"
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(model.timeout, connect=CONNECT),
            limits=httpx2.Limits(max_connections=model.concurrency),
        )
        self._gone = threading.Event()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()
        self._client.close()

    def give_up(self) -> None:
        """Let requests that wait for another try end at once."""
        self._gone.set()

    def require_room(self, tokens: int, *, aligned: bool = False) -> None:
        """Raise `ModelError` unless a text of ``tokens`` and the one token of an answer fit.

        ``aligned``: its tokens are not the ones that `data.block` counts.
        """
        context = self._endpoint.context
        if context is not None and tokens >= context:
            found = f"a text takes {tokens}; set data.block to {context - 1} or less"
            if aligned:
                found = f"a block of the text takes {tokens} of its tokens; make data.block smaller"
            raise ModelError(
                f"{self._where}: reads {context} tokens at most, one of an answer included, and "
                f"{found}, or start the server with a longer context."
            )

    def ask(self, ids: Sequence[int]) -> Likeliest:
        """Probabilities of ``ids[1:]``, each after the tokens before it.

        Raises `EnvironmentalError` when the server refuses or is gone, `ModelError` for a wrong
        answer.
        """
        return self._read(self._entries(ids), ids)

    def probe(self, tokenizer: Any) -> dict[str, list[float]]:
        """Compare the server's tokens with ``tokenizer``'s, a fast tokenizer of transformers.

        Returns the token ids of a short text and their log-probabilities, by which this model can
        be known again. Raises `ModelError` where the texts of tokens differ, and as `ask`.
        """
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        ids = ids[: (self._endpoint.context or len(ids) + 1) - 1]
        entries = self._entries(ids)
        found = self._read(entries, ids)
        theirs = {
            int(token): one.get("decoded_token")
            for entry in entries
            for token, one in entry.items()
        }
        self._require_same_texts(tokenizer, theirs)
        return {"ids": ids, "label_logp": found.label_logp_P.tolist()}

    def _require_same_texts(self, tokenizer: Any, theirs: Mapping[int, Any]) -> None:
        compared, different = 0, list[str]()
        for token, text in sorted(theirs.items()):
            if token >= self._vocabulary or text is None:
                continue
            if not isinstance(text, str):
                raise self._wrong(f"answers the decoded_token {self._endpoint.told(repr(text))}")
            ours = tokenizer.decode([token], skip_special_tokens=False)
            if "\ufffd" in ours + text or not ours.strip():  # part of a character; space alone
                continue
            compared += 1
            if text.strip() not in (ours.strip(), tokenizer.convert_ids_to_tokens(token)):
                different.append(f"{token} is {ours!r} here and {text!r} there")
        if not compared:
            raise ModelError(
                f"{self._where}: its answers hold no `decoded_token`, so its token ids cannot be "
                "compared with the tokenizer; use a server that gives them, as vLLM does."
            )
        if len(different) > _OTHER_TEXT * compared:
            raise ModelError(
                f"{self._where}: has another tokenizer than `tokenizer` names: of {compared} "
                f"token ids {len(different)} are another text "
                f"({self._endpoint.told('; '.join(different[:3]))}); name "
                "the tokenizer of the served model."
            )

    def _entries(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """For each token but the first, log-probabilities by token id, as the server has them."""
        top = min(self._model.top, self._vocabulary)
        body = self._endpoint.body(list(ids), 1) | {"prompt_logprobs": top}
        answer = self._post(body)
        if (name := answer.get("model")) != self._endpoint.model:
            named = self._endpoint.told(repr(name))
            raise self._wrong(f"answers as model {named}, not {self._endpoint.model!r}")
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            if entries is None:
                raise KeyError("prompt_logprobs")
            first: Any
            found: list[dict[str, Any]]
            first, *found = entries
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._wrong(
                "answers without prompt_logprobs; it needs a server that gives them, as vLLM and "
                "`limbeck serve` do"
            ) from None
        if len(entries) != len(ids):
            raise self._wrong(
                f"answers for {len(entries)} tokens, and {len(ids)} were sent: it cuts the prompt, "
                "adds a token to it, or leaves out the first one, which is null"
            )
        if first:
            raise self._wrong(
                "answers a log-probability of the first token, which nothing comes before: it puts "
                "a token in front of the prompt"
            )
        if not all(isinstance(entry, dict) for entry in found):
            raise self._wrong("answers a position without tokens")
        return found

    def _read(self, entries: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> Likeliest:
        k = min(self._model.top, self._vocabulary)
        ids_Pk = np.zeros((len(entries), k), np.int32)
        logp_Pk = np.full((len(entries), k), -np.inf, np.float32)
        labels_P = np.zeros(len(entries), np.float32)
        for place, entry in enumerate(entries):
            try:
                by_id = {int(token): float(one["logprob"]) for token, one in entry.items()}
            except (KeyError, TypeError, ValueError, OverflowError):
                shown = self._endpoint.told(entry)[:80]
                raise self._wrong(
                    f"position {place}: answers what is no log-probability by token id: {shown} …"
                ) from None
            label = by_id.get(ids[place + 1])
            if label is None:
                raise self._wrong(
                    f"position {place}: has no log-probability of the text's own token "
                    f"{ids[place + 1]}: it read other token ids than were sent"
                )
            if any(math.isnan(v) or v > _ABOVE_ONE for v in by_id.values()) or math.isinf(label):
                raise self._wrong(f"position {place}: answers what is no log-probability")
            if min(by_id) < 0:
                raise self._wrong(f"position {place}: answers the token id {min(by_id)}")
            total = sum(map(math.exp, by_id.values()))  # also of ids beyond the tokenizer
            if total > 1 + _ABOVE_ONE:
                raise self._wrong(f"position {place}: its probabilities sum to {total:.3f}")
            if len(by_id) < k:
                raise self._wrong(
                    f"position {place}: answers {len(by_id)} tokens, and {k} were asked for; set "
                    f"`top` to {len(by_id)}, or let the server give more (vLLM: --max-logprobs)"
                )
            if len(by_id) == k and any(_rank(one) > k for one in entry.values()):
                raise self._wrong(
                    f"position {place}: leaves out one of the {k} likeliest tokens; it must give "
                    "all of them, and the text's own token beside them"
                )
            best = sorted(by_id.items(), key=lambda item: -item[1])[:k]
            # None of the others is likelier than the last of these, and all sum to 1.
            most = total + _ROWS * self._vocabulary * math.exp(best[-1][1])
            if most < 1 - _ABOVE_ONE:
                raise self._wrong(
                    f"position {place}: its probabilities sum to {most:.3f} at most, whatever the "
                    "other tokens have: they are of other numbers than log-probabilities"
                )
            # A head can have more rows than the tokenizer has tokens; those are part of the tail.
            known = [(token, value) for token, value in best if 0 <= token < self._vocabulary]
            ids_Pk[place] = known[0][0] if known else ids[place + 1]
            for at, (token, value) in enumerate(known):
                ids_Pk[place, at], logp_Pk[place, at] = token, value
            labels_P[place] = label
        return Likeliest(ids_Pk, logp_Pk, labels_P)

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request, after as many tries as the recipe allows."""
        for attempt in itertools.count():
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.75, 1.25)
            try:
                answer = ask(
                    self._client,
                    "POST",
                    self._url,
                    json=body,
                    headers=self._endpoint.headers,
                    seconds=self._model.timeout,
                    most=_ENTRY * len(body["prompt"]) * (1 + body["prompt_logprobs"]) + _ERROR,
                )
                status = answer.status
                if status == 200:
                    found = parse_json(answer.body)
                    if isinstance(found, dict) and not found.get("error"):
                        return found
                    reason = "its answer is no JSON object"
                    if isinstance(found, dict):  # as some gateways refuse
                        reason = self._endpoint.refusal(status, answer.body)
                elif status in _BUSY or status >= 500:
                    reason = self._endpoint.refusal(status, answer.body)
                    with contextlib.suppress(ValueError):
                        asked = float(answer.headers.get("retry-after", ""))
                        wait = min(max(wait, asked), _LONGEST_WAIT)
                else:
                    reason, hint = self._endpoint.refusal(status, answer.body), ""
                    if status in (401, 403):
                        hint = f"; is the key in ${self._model.key_variable} right?"
                    elif any(int(n) in body["prompt"] for n in _LONG_NUMBER.findall(reason)):
                        hint = "; is `tokenizer` that of the served model?"
                    raise EnvironmentalError(f"{self._where}: {reason}{hint}")
            except httpx2.HTTPError as error:  # not reached, cut off, or too slow
                reason = self._endpoint.told(f"{type(error).__name__}: {error}".rstrip(": "))
            except ValueError:  # cut off inside the JSON
                reason = "its answer is not JSON"
            if attempt >= self._model.retries or self._gone.wait(wait):
                break
        tries = f"{attempt + 1} tries" if attempt else "one try"
        raise EnvironmentalError(
            f"{self._where}: {reason}; gave up after {tries}. Its answers so far are kept: run the "
            "same command again once the server is well."
        )

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._where}: {what}.")


def _rank(entry: Mapping[str, Any]) -> int:
    """Place of a token among all others, 1 for the likeliest; 0 where a server does not say."""
    rank = entry.get("rank")
    return rank if isinstance(rank, int) else 0
