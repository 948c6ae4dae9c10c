"""Log-probabilities of a prompt's own tokens, from the graph that keeps the logits of every token.

Runs beside the engine, one prompt at a time, on a decoder that is opened at the first request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from limbeck.runtime.decoder import Decoder
from limbeck.runtime.sampling import TokenLogprobs, logprobs

_CHUNK = 128  # tokens a run: the logits of one chunk are in memory at once


class Scorer:
    """Scores prompts with one form of an exported folder."""

    def __init__(self, folder: Path, *, form: str, threads: int) -> None:
        self._folder, self._form, self._threads = folder, form, threads
        self._lock = threading.Lock()
        self._decoder: Decoder | None = None

    def score(self, ids: Sequence[int], count: int, *, deadline: float) -> list[TokenLogprobs]:
        """Log-probabilities of ``ids[1:]``, with the ``count`` likeliest tokens at each place.

        Blocks. Raises `TimeoutError` when ``deadline`` (`time.monotonic`) passes, `DataError`
        past the context.
        """
        with self._lock:
            if self._decoder is None:
                self._decoder = Decoder(
                    self._folder, form=self._form, threads=self._threads, all_logits=True
                )
            decoder, found = self._decoder, list[TokenLogprobs]()
            for start in range(0, len(ids) - 1, _CHUNK):  # the last token has no label
                if time.monotonic() > deadline:
                    raise TimeoutError
                chunk = list(ids[start : start + _CHUNK])
                if start:
                    logits = decoder.extend([chunk])
                else:
                    logits = decoder.prefill([chunk], room=len(ids) - len(chunk))
                labels = ids[start + 1 : start + 1 + len(chunk)]
                found += [
                    logprobs(row, label, count)
                    for row, label in zip(logits[0], labels, strict=False)
                ]
            return found
