"""The runtimes of a worker behind one small protocol: torch eager and compiled, onnxruntime, and
GenAI's own loop. Greedy.

`prepare` imports libraries, so that import and opening are timed apart, and no process holds a
library that it does not use. The runtime behind a URL is `serve_bench.worker.client`.

Shape letters: B rows, S prompt tokens, L whole length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from limbeck.contract.data.arrays import Ids, Logits
from limbeck.contract.errors import ArtifactError, DataError, EnvironmentalError, ModelError
from limbeck.contract.models.adapters import attach, merged
from limbeck.contract.models.loading import load_pretrained, rounding


class Runtime(Protocol):
    """One opened arm.

    ``facts`` describes it: libraries, vocabulary, context, threads, and whether it keeps a KV
    cache.
    """

    facts: dict[str, Any]

    def begin(self, prompts: Ids, room: int) -> Ids:
        """Read ``prompts[B, S]`` into an empty cache with room for ``room`` more tokens a row; the
        token ``[B]`` that follows each."""

    def step(self, tokens: Ids) -> Ids:
        """Append ``tokens[B]``, one a row; the ones that follow."""

    def score(self, ids: Ids) -> Logits:
        """Logits [L, V] after every token of ``ids[L]``. Ends the arm's use for generation."""

    def device_seconds(self) -> list[float] | None:
        """Seconds of each token since `begin` by the device's own clock; None on the host."""

    def prompt_tokens(self) -> int:
        """Prompt tokens a row that the last `begin` read, as the runtime itself counted them."""


def prepare(runtime: str, spec: Mapping[str, Any]) -> None:
    """Import the libraries of a runtime, the code of the arm's architecture included.

    Raises `EnvironmentalError`.
    """
    match runtime:
        case "torch" | "torch-compile":
            import torch
            import transformers

            config = json.loads((Path(spec["model"]) / "config.json").read_text("utf-8"))
            for name in config.get("architectures") or ():
                getattr(transformers, name, None)  # imported when it is first named
            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            torch.set_num_interop_threads(1)
        case "onnxruntime":
            from limbeck.runtime.session import import_onnxruntime

            import_onnxruntime()
        case "onnxruntime-genai":
            if importlib.util.find_spec("onnxruntime_genai") is None:
                raise EnvironmentalError(
                    "onnxruntime-genai is not installed; run: pip install 'limbeck[cpu]' (or "
                    "'limbeck[gpu]' for CUDA), or leave it out of bench.runtimes."
                )
            import onnxruntime_genai

            onnxruntime_genai.disable_telemetry_events()
        case "openai":
            from serve_bench.worker import client  # noqa: F401
        case _:
            raise AssertionError(f"no such runtime: {runtime}")


def open_runtime(runtime: str, spec: Mapping[str, Any], *, threads: int) -> Runtime:
    """Open an arm. Raises `ModelError`, `ArtifactError` or `EnvironmentalError`."""
    match runtime:
        case "torch":
            return TorchEager(threads=threads, **spec)
        case "torch-compile":
            return TorchCompiled(threads=threads, **spec)
        case "onnxruntime":
            return OnnxRuntime(threads=threads, **spec)
        case "onnxruntime-genai":
            return OnnxRuntimeGenai(threads=threads, **spec)
        case "openai":
            from serve_bench.worker.client import OpenAi

            return OpenAi(**spec)
    raise AssertionError(f"no such runtime: {runtime}")


# torch --------------------------------------------------------------------------------------------

# transformers' names of what a model keeps of the tokens that it has read, in what it returns.
_CACHES = ("past_key_values", "cache_params")
_KEEPS_INSIDE = ("recurrent_gemma",)  # takes past_key_values and returns none


def _load_torch(
    model: str, adapter: str | None, quantize: str | None, number: Any, device: str
) -> Any:
    """A transformers folder on ``device`` in the torch type ``number``, with its adapter."""
    from transformers import AutoModelForCausalLM

    rounded = quantize is not None and quantize != "none"
    options = rounding(str(quantize), number, device) if rounded else {}

    def load() -> Any:
        return load_pretrained(AutoModelForCausalLM, model, dtype=number, **options)

    loaded = load()
    if adapter is not None:
        is_rounded = getattr(loaded, "is_quantized", False)  # also as it was stored
        loaded = attach(loaded, Path(adapter))
        if not is_rounded:
            try:
                loaded = merged(loaded, where=adapter)
            except ModelError:  # merging has changed the weights by then
                loaded = attach(load(), Path(adapter))
    return loaded if options else loaded.to(device)


class TorchEager:
    """A transformers folder in torch, not compiled: the plain loop over the model's forward pass
    and its cache.

    It is the loop of `generate` without its bookkeeping, so it is no slower than what a user would
    call. An adapter is merged first, which is how it would be deployed. It stays beside quantised
    weights, because merging would round it away, and beside weights that it cannot be merged into.
    On CUDA the chosen token is copied to the host before its time is taken, which waits for the
    device.
    """

    def __init__(
        self,
        *,
        model: str,
        threads: int,
        adapter: str | None = None,
        quantize: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentalError(
                f"torch {torch.__version__} sees no NVIDIA card here; set bench.device: cpu, or "
                "install a CUDA build of torch."
            )
        torch.set_num_threads(threads)
        number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            dtype or "fp32"
        ]
        loaded = _load_torch(model, adapter, quantize, number, device)
        self._torch, self._model, self._device = torch, loaded.eval().requires_grad_(False), device
        base = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
        accepts = inspect.signature(base.forward).parameters
        self._last: dict[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        self._kept = next((name for name in _CACHES if name in accepts), None)
        if base.config.model_type in _KEEPS_INSIDE:
            self._kept = None
        self._cache: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._prompt_tokens = 0
        config = loaded.config.get_text_config()
        self.facts: dict[str, Any] = {
            "vocabulary": int(config.vocab_size),
            "context": getattr(config, "max_position_embeddings", None),
            "threads": torch.get_num_threads(),
            "kv_cache": self._kept is not None,
            "weight_bytes": _weight_bytes(base),
            "library": f"torch {torch.__version__}",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "number_type": str(number).removeprefix("torch."),
            "attention": getattr(loaded.config, "_attn_implementation", None),
        }

    def begin(self, prompts: Ids, room: int) -> Ids:
        """See `Runtime.begin`; torch's cache grows by itself."""
        self._cache, self._events = None, []
        self._prompt_tokens = prompts.shape[1]
        # A teacher with another tokenizer is timed on the student's ids: any token takes as long,
        # and the figures count how many it needs for the same text (`Arm.token_rate`).
        return self._forward(prompts % self.facts["vocabulary"])

    def step(self, tokens: Ids) -> Ids:
        return self._forward(tokens[:, None])

    def score(self, ids: Ids) -> Logits:
        self._cache = None
        with self._torch.inference_mode():
            output = self._model(
                input_ids=self._torch.from_numpy(ids)[None].to(self._device), use_cache=False
            )
            logits: Logits = output.logits[0].float().cpu().numpy()
        return logits

    def device_seconds(self) -> list[float] | None:
        """See `Runtime.device_seconds`; from CUDA events around every forward pass."""
        if self._device != "cuda":
            return None
        self._torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self._events]

    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    def _forward(self, ids: Ids) -> Ids:
        with self._torch.inference_mode(), self._timed():
            read = self._torch.from_numpy(ids).to(self._device)
            if self._kept is None:  # every step reads the whole row again
                if self._cache is not None:
                    read = self._torch.cat([self._cache, read], dim=1)
                output = self._model(input_ids=read, use_cache=False, **self._last)
                self._cache = read
            else:
                cache = {self._kept: self._cache}
                output = self._model(input_ids=read, use_cache=True, **cache, **self._last)
                self._cache = getattr(output, self._kept)
            chosen = output.logits[:, -1].argmax(-1)
        tokens: Ids = chosen.cpu().numpy()
        return tokens

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        if self._device != "cuda":
            yield
            return
        pair = tuple(self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        yield
        pair[1].record()
        self._events.append((pair[0], pair[1]))


class TorchCompiled(TorchEager):
    """The same model under ``torch.compile`` with a static cache: the prompt is read eagerly,
    decoding is compiled.

    The first generation of a batch size compiles, which can take minutes; warming up covers it.
    Raises `EnvironmentalError` where inductor has no compiler to call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._compiled = self._torch.compile(self._model.forward, dynamic=False, fullgraph=True)
        self._eager = self._model.forward
        self._room = (0, 0)  # rows, tokens
        self.facts["library"] += ", compiled"

    def begin(self, prompts: Ids, room: int) -> Ids:
        """See `Runtime.begin`; the cache is kept while it is large enough, because another size
        would be compiled anew."""
        from transformers import StaticCache

        self._events, self._prompt_tokens = [], prompts.shape[1]
        rows, length = len(prompts), prompts.shape[1] + room
        if rows != self._room[0] or length > self._room[1]:
            self._static = StaticCache(config=self._model.config, max_cache_len=length)
            self._room = (rows, length)
        else:
            with self._torch.inference_mode():  # in which it was made
                self._static.reset()
        self._cache = self._static
        return self._forward(prompts)

    def step(self, tokens: Ids) -> Ids:
        from torch._dynamo.exc import BackendCompilerFailed

        self._model.forward = self._compiled
        try:
            return self._forward(tokens[:, None])
        except BackendCompilerFailed as error:
            raise EnvironmentalError(
                f"torch.compile failed here ({' '.join(str(error).split())[:200]}); it needs a C++ "
                "compiler on a CPU, Triton on a card. "
                "Install one, or leave torch-compile out of bench.runtimes."
            ) from error
        finally:
            self._model.forward = self._eager


def _weight_bytes(model: Any) -> int:
    """Bytes of weights that decoding one token reads: all of them, but of an embedding that is not
    the head's one row."""
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    if not tied:
        sizes.pop(embedding.weight.data_ptr(), None)
    return sum(sizes.values())


# onnxruntime --------------------------------------------------------------------------------------


class OnnxRuntime:
    """A form of an ``onnx`` artifact in the decoder that `limbeck generate` uses."""

    def __init__(self, *, artifact: str, form: str, threads: int, device: Any = None) -> None:
        from limbeck.contract.artifact import open_artifact
        from limbeck.runtime.decoder import Decoder
        from limbeck.runtime.session import import_onnxruntime

        if device is None:  # as it was made for
            device = (
                open_artifact(Path(artifact), verify=False)
                .result["forms"]
                .get(form, {})
                .get("provider", "cpu")
            )
        self._open: dict[str, Any] = {
            "folder": Path(artifact),
            "form": form,
            "threads": threads,
            "provider": device,
        }
        self._decoder: Decoder | None = Decoder(**self._open)
        self._scorer: Decoder | None = None
        self._prompt_tokens = 0
        ort = import_onnxruntime()
        self.facts = {
            "vocabulary": self._decoder.vocabulary,
            "context": self._decoder.context,
            "threads": self._decoder.threads,
            "kv_cache": True,
            "library": f"onnxruntime {ort.__version__}",
            "device": device,
            "providers": list(ort.get_available_providers()),
            "provider": self._decoder.provider,
        }

    def begin(self, prompts: Ids, room: int) -> Ids:
        self._prompt_tokens = prompts.shape[1]
        chosen: Ids = self._generating().prefill(prompts, room=room).argmax(-1)
        return chosen

    def step(self, tokens: Ids) -> Ids:
        chosen: Ids = self._generating().step(tokens).argmax(-1)
        return chosen

    def score(self, ids: Ids) -> Logits:
        """See `Runtime.score`.

        The graph with all logits reads the same weights file as the timed graph.
        """
        if self._scorer is None:
            from limbeck.runtime.decoder import Decoder

            self._decoder = None  # one copy of the weights at a time
            self._scorer = Decoder(**self._open, all_logits=True)
        logits: Logits = self._scorer.score(ids[None])[0]
        return logits

    def device_seconds(self) -> list[float] | None:
        """See `Runtime.device_seconds`; onnxruntime reports no device times, and returns when the
        logits are on the host."""
        return None

    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    def _generating(self) -> Any:
        if self._decoder is None:
            raise DataError(
                "this arm was scored already, which ends its use for generation; open it anew."
            )
        return self._decoder


class OnnxRuntimeGenai:
    """The deployable folder under ONNX Runtime GenAI: its own cache, its own search, its own loop
    in C++.

    It chooses the token and appends it by itself, so `step` takes none. The end token is held back
    until the length is reached, as `min_length` has it.
    """

    def __init__(self, *, artifact: str, threads: int, device: str = "cpu") -> None:
        import onnxruntime_genai as og

        from limbeck.contract.artifact import open_artifact

        folder = Path(artifact)
        if not (folder / "genai_config.json").is_file():
            raise ArtifactError(
                f"{folder}: no genai_config.json, so ONNX Runtime GenAI cannot run it (the graph "
                "comes from torch's exporter); leave onnxruntime-genai out of bench.runtimes."
            )
        config = og.Config(str(folder))
        if device == "cuda":
            config.clear_providers()
            config.append_provider("cuda")
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        try:
            self._model = og.Model(config)
        except Exception as error:  # its errors share no base class of their own
            raise ArtifactError(
                f"{folder}: ONNX Runtime GenAI cannot open it ({error})."
            ) from error
        adapter = open_artifact(folder, verify=False).result.get("adapter")
        self._adapters: Any = None
        if adapter:
            adapters = og.Adapters(self._model)
            adapters.load(str(folder / adapter["file"]), "student")
            self._adapters = adapters
        self._og, self._prompt_tokens = og, 0
        self._generator: Any = None
        config = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        self.facts: dict[str, Any] = {
            "vocabulary": int(config["vocab_size"]),
            "context": int(config["context_length"]),
            "threads": threads,
            "kv_cache": True,
            "library": f"onnxruntime-genai {og.__version__}",
            "device": device,
        }

    def begin(self, prompts: Ids, room: int) -> Ids:
        parameters, length = self._og.GeneratorParams(self._model), prompts.shape[1] + room
        parameters.set_search_options(
            do_sample=False, batch_size=len(prompts), max_length=length, min_length=length
        )
        self._generator = None  # one cache at a time
        self._generator = self._og.Generator(self._model, parameters)
        if self._adapters is not None:
            self._generator.set_active_adapter(self._adapters, "student")
        self._generator.append_tokens(prompts.astype(np.int32))
        self._prompt_tokens = int(self._generator.token_count())
        return self._next()

    def step(self, tokens: Ids) -> Ids:
        return self._next()

    def score(self, ids: Ids) -> Logits:
        """Not offered: the form is scored through onnxruntime."""
        raise DataError(
            "ONNX Runtime GenAI keeps the last logits only; score the form under onnxruntime."
        )

    def device_seconds(self) -> list[float] | None:
        return None

    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    def _next(self) -> Ids:
        self._generator.generate_next_token()
        chosen: Ids = np.array(self._generator.get_next_tokens(), np.int64)
        return chosen
