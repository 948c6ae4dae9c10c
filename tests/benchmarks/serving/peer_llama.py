"""The peer's side of bench_decode: llama.cpp through llama-cpp-python, in its own environment.

    python peer_llama.py quantize SOURCE.gguf TARGET.gguf
        llama.cpp's own quantiser, to Q8_0
    python peer_llama.py serve MODEL.gguf THREADS on|off
        one JSON job per line on stdin, one JSON answer on stdout; the last word is flash attention

Jobs and answers are those of `tests.benchmarks.serving.bench_decode`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as low

_ANSWERS = os.fdopen(
    os.dup(1), "w"
)  # llama.cpp may print to standard output; that goes to standard error from here on
os.dup2(2, 1)


def quantize(source: str, target: str) -> None:
    """Dequantise ``source`` and write it as Q8_0."""
    options = low.llama_model_quantize_default_params()
    options.ftype = low.LLAMA_FTYPE_MOSTLY_Q8_0
    options.allow_requantize = True
    if code := low.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)):
        raise SystemExit(f"llama_model_quantize: {code}")


class Peer:
    """One open model and its cache.

    ``logits_all`` is for `score` alone: llama-cpp-python 0.3.36 marks the rows of `Llama.eval`'s
    batches by it. `generate` decodes batches of `llama_batch_get_one`, which mark no row; llama.cpp
    then computes the head for the last token only.
    """

    def __init__(self, file: str, threads: int, *, flash_attention: bool) -> None:
        self._model = llama_cpp.Llama(
            file,
            n_ctx=512,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            flash_attn=flash_attention,
            verbose=False,
        )
        self._context = self._model._ctx.ctx
        self._vocabulary = self._model.n_vocab()

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Greedy, by the low-level loop of llama.cpp's examples: decode, read logits, top token."""
        low.llama_memory_clear(low.llama_get_memory(self._context), True)
        tokens: list[int] = []
        at: list[float] = []
        feed = prompt
        started = time.perf_counter()
        for _ in range(new_tokens):
            array = (low.llama_token * len(feed))(*feed)
            if code := low.llama_decode(self._context, low.llama_batch_get_one(array, len(feed))):
                raise SystemExit(f"llama_decode: {code}")
            logits = low.llama_get_logits_ith(self._context, -1)
            tokens.append(int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()))
            at.append(time.perf_counter() - started)
            feed = [tokens[-1]]
        return {"at": at, "tokens": tokens}

    def score(self, ids: list[int]) -> dict[str, Any]:
        """Nats of every token of ``ids`` but the first, summed."""
        self._model.reset()
        self._model.eval(ids)
        logits = np.asarray(self._model.scores[: len(ids) - 1], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(logits).sum(axis=1))
        return {"nll": float((normaliser - logits[np.arange(len(logits)), ids[1:]]).sum())}


def main() -> None:
    """Quantise, or answer until standard input ends."""
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
        return
    peer = Peer(sys.argv[2], int(sys.argv[3]), flash_attention=sys.argv[4] == "on")
    print(
        json.dumps({"library": f"llama-cpp-python {llama_cpp.__version__}"}),
        file=_ANSWERS,
        flush=True,
    )
    for line in sys.stdin:
        job = json.loads(line)
        answer = getattr(peer, job.pop("do"))(**job)
        print(json.dumps(answer), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    main()
