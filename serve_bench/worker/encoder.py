"""The commands of an encoder's process.

open       runtime, spec, threads   -> import_s, load_s, facts
time       ids (rows), runs         -> seconds of all runs together, peak_rss_bytes
answers    examples, out            -> rows; writes logits or unit vectors to the file ``out``
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from limbeck.contract.data.arrays import Ids, Logits
from limbeck.contract.data.examples import load_examples
from limbeck.contract.models.encoders import load_encoder, read
from serve_bench.worker.process import peak_rss
from serve_bench.worker.runtimes import prepare

_ROWS = 16  # examples of a batch that is not timed


class Runtime(Protocol):
    """One opened arm."""

    facts: dict[str, Any]

    def run(self, ids: Ids, mask: Ids) -> Logits:
        """Logits ``[B, C]`` or unit vectors ``[B, d]`` of a batch padded on the right."""


class TorchEncoder:
    """A transformers folder in torch eager fp32, with the attention that transformers chooses."""

    def __init__(self, *, model: str, task: str, pooling: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        loaded = load_encoder(model, task=task)
        self._torch, self._model = torch, loaded
        self._task, self._pooling = task, pooling
        self.facts = {
            "context": getattr(loaded.config, "max_position_embeddings", None),
            "threads": torch.get_num_threads(),
            "library": f"torch {torch.__version__}",
            "number_type": "float32",
            "attention": getattr(loaded.config, "_attn_implementation", None),
        }

    def run(self, ids: Ids, mask: Ids) -> Logits:
        torch = self._torch
        with torch.inference_mode():
            kept = torch.from_numpy(mask)
            output = read(self._model, torch.from_numpy(ids), kept)
            if self._task == "classification":
                found = output.logits
            else:
                states = output.last_hidden_state
                weight = kept[..., None].to(states.dtype)
                mean = (states * weight).sum(1) / weight.sum(1)
                found = torch.nn.functional.normalize(
                    states[:, 0] if self._pooling == "cls" else mean, dim=-1
                )
            answers: Logits = found.numpy()
        return answers


class OnnxEncoder:
    """A form of an ``onnx`` artifact through `limbeck.runtime.encoder`."""

    def __init__(
        self, *, artifact: str, form: str, threads: int, device: str | None = None
    ) -> None:
        """``device`` is always the CPU: encoders have no other provider yet."""
        from limbeck.runtime.encoder import Encoder
        from limbeck.runtime.session import import_onnxruntime

        self._encoder = Encoder(Path(artifact), form=form, threads=threads)
        self.facts = {
            "context": self._encoder.context,
            "threads": self._encoder.threads,
            "library": f"onnxruntime {import_onnxruntime().__version__}",
            "provider": "CPUExecutionProvider",
        }

    def run(self, ids: Ids, mask: Ids) -> Logits:
        answers: Logits = self._encoder.run(ids, mask)
        return answers


class Session:
    """State of the worker between commands."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None

    def answer(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Do one command."""
        if command == "open":
            return self.open(**arguments)
        assert self.runtime is not None, f"{command} before open"
        match command:
            case "time":
                return self.time(self.runtime, **arguments)
            case "answers":
                return self.answers(self.runtime, **arguments)
        raise AssertionError(f"no such command: {command}")

    def open(self, runtime: str, spec: dict[str, Any], threads: int) -> dict[str, Any]:
        """Import the libraries, open the arm, and time both."""
        started = time.perf_counter()
        prepare(runtime, spec)
        imported = time.perf_counter()
        self.runtime = (
            TorchEncoder(threads=threads, **spec)
            if runtime == "torch"
            else OnnxEncoder(threads=threads, **spec)
        )
        loaded = time.perf_counter()
        return {
            "import_s": imported - started,
            "load_s": loaded - imported,
            "facts": self.runtime.facts,
        }

    def time(self, runtime: Runtime, ids: list[list[int]], runs: int) -> dict[str, Any]:
        """Run one batch of rows without padding some times over."""
        rows = np.array(ids, np.int64)
        mask = np.ones_like(rows)
        started = time.perf_counter()
        for _ in range(runs):
            runtime.run(rows, mask)
        return {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss()}

    def answers(self, runtime: Runtime, examples: str, out: str) -> dict[str, Any]:
        """Write this arm's outputs for held-out examples, in their order."""
        found = [
            runtime.run(ids, mask) for ids, mask in load_examples(Path(examples)).batches(_ROWS)
        ]
        np.save(out, np.concatenate(found))
        return {"rows": sum(len(part) for part in found)}
