"""llama.cpp in a process of its own: it ends the whole process on a file that it does not like.

``python -m export.gguf.llama_cpp FILE TOKENS`` reads requests from standard input, a JSON object a
line: ``{"ids": [...]}`` or ``{"text": "...", "special": true}``. It answers each with a line of
JSON, and for ids then with the bytes of their logits, fp32 ``[L, V]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.contract.errors import ParityError


class LlamaCpp:
    """A GGUF file, open in llama.cpp."""

    def __init__(self, file: Path, tokens: int) -> None:
        self._file = file
        self._process = subprocess.Popen(
            [sys.executable, "-m", "export.gguf.llama_cpp", str(file), str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def logits(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits ``[L, V]`` of a row. Raises `ParityError` where llama.cpp stops."""
        rows, columns = self._ask({"ids": ids.tolist()})
        assert self._process.stdout is not None
        content = self._process.stdout.read(4 * rows * columns)
        if len(content) < 4 * rows * columns:
            raise self._stopped()
        return np.frombuffer(content, np.float32).reshape(rows, columns)

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; ``special`` adds what the file says comes before a text."""
        found: list[int] = self._ask({"text": text, "special": special})
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            raise self._stopped() from None

    def _stopped(self) -> ParityError:
        self.close()
        return ParityError(
            f"{self._file.name}: llama.cpp stopped on it. Leave its form out of export.forms, or "
            "report the model."
        )


def main(file: str, tokens: int) -> None:
    """Answer requests until standard input ends."""
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        """With the attribute that cyllama 0.2.18 reads to return logits, and does not set."""

        n_vocab = property(lambda self: self.get_vocab().n_vocab)

    llama_cpp.disable_logging()
    options, limits = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
    options.n_gpu_layers = 0
    limits.n_ctx = limits.n_batch = limits.n_ubatch = tokens
    limits.n_threads = limits.n_threads_batch = os.cpu_count() or 1
    model = Model(file, options)
    context, vocabulary = llama_cpp.LlamaContext(model, limits), model.get_vocab()
    for line in sys.stdin.buffer:
        asked, out = json.loads(line), sys.stdout.buffer
        if "text" in asked:
            found = list(vocabulary.tokenize(asked["text"], asked["special"], True))
            out.write(json.dumps(found).encode() + b"\n")
        else:
            ids = asked["ids"]
            context.kv_cache_clear()
            batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
            for position, token in enumerate(ids):
                batch.add(token, position, [0], True)
            context.decode(batch)
            rows = [context.get_logits_ith(position) for position in range(len(ids))]
            logits = np.asarray(rows, np.float32)
            out.write(json.dumps(logits.shape).encode() + b"\n")
            out.write(logits.tobytes())
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
