"""What a worker can run: torch eager and onnxruntime, behind one small protocol. Greedy, one stream, on the CPU.

Libraries are imported by `prepare`, so that importing and opening are timed apart and no process holds a library that it
does not use.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from limbeck.errors import DataError, ModelError

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Runtime(Protocol):
    """One opened arm. ``facts`` is what it says of itself: libraries, vocabulary, context, threads."""

    facts: dict[str, Any]

    def begin(self, prompt: Sequence[int], room: int) -> int:
        """Read a prompt into an empty cache with room for ``room`` more tokens; the token that follows it."""

    def step(self, token: int) -> int:
        """Append a token; the one that follows it."""

    def score(self, ids: Ids) -> Logits:
        """Logits [L, V] after every token of ``ids[L]``. Ends the arm's use for generation."""


def prepare(runtime: str, spec: Mapping[str, Any]) -> None:
    """Import the libraries of a runtime, the code of the arm's architecture included."""
    if runtime == "torch":
        import torch
        import transformers

        for name in json.loads((Path(spec["model"]) / "config.json").read_text()).get("architectures") or ():
            getattr(transformers, name, None)  # transformers imports a class when it is first named
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_interop_threads(1)
    else:
        from limbeck.runtime import import_onnxruntime

        import_onnxruntime()


def open_runtime(runtime: str, spec: Mapping[str, Any], *, threads: int) -> Runtime:
    """Open an arm. Raises `ModelError`, `ArtifactError` or `EnvironmentalError`."""
    if runtime == "torch":
        return TorchEager(threads=threads, **spec)
    return OnnxRuntime(threads=threads, **spec)


class TorchEager:
    """A transformers folder in torch, not compiled: the plain loop over the model's forward pass and its cache.

    It is the loop of `generate` without its bookkeeping, so it is no slower than what a user would call. An adapter is
    merged first, which is how it would be deployed; onto quantised weights it stays beside them, because merging would
    round it away.
    """

    def __init__(
        self,
        *,
        model: str,
        threads: int,
        adapter: str | None = None,
        quantize: str | None = None,
        dtype: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype or "fp32"]
        options: dict[str, Any] = {}
        if quantize not in (None, "none"):
            from transformers import BitsAndBytesConfig

            options["device_map"] = {"": "cpu"}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=quantize == "int8",
                load_in_4bit=quantize == "nf4",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=number,
            )
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=number, use_safetensors=True, trust_remote_code=False, local_files_only=True, **options
            )
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"{model}: transformers cannot load it as a causal language model: {error}") from error
        if adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, adapter)
            if not options:
                loaded = loaded.merge_and_unload()
        self._torch, self._model = torch, loaded.eval().requires_grad_(False)
        base = loaded.get_base_model() if hasattr(loaded, "peft_config") and options else loaded
        keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._last: dict[str, int] = {"logits_to_keep": 1} if keeps else {}
        self._cache: Any = None
        config = loaded.config.get_text_config()
        self.facts = {
            "vocabulary": int(config.vocab_size),
            "context": getattr(config, "max_position_embeddings", None),
            "threads": torch.get_num_threads(),
            "library": f"torch {torch.__version__}",
            "number_type": str(number).removeprefix("torch."),
            "attention": getattr(loaded.config, "_attn_implementation", None),
        }

    def begin(self, prompt: Sequence[int], room: int) -> int:
        """See `Runtime.begin`; torch's cache grows by itself."""
        self._cache = None
        return self._forward([list(prompt)])

    def step(self, token: int) -> int:
        """See `Runtime.step`."""
        return self._forward([[token]])

    def score(self, ids: Ids) -> Logits:
        """See `Runtime.score`."""
        self._cache = None
        with self._torch.inference_mode():
            output = self._model(input_ids=self._torch.from_numpy(ids)[None], use_cache=False)
            logits: Logits = output.logits[0].float().numpy()
        return logits

    def _forward(self, ids: list[list[int]]) -> int:
        with self._torch.inference_mode():
            output = self._model(
                input_ids=self._torch.tensor(ids), past_key_values=self._cache, use_cache=True, **self._last
            )
            self._cache = output.past_key_values
            return int(output.logits[0, -1].argmax())


class OnnxRuntime:
    """A form of an ``onnx`` artifact through `limbeck.runtime`, the loop that `limbeck generate` uses."""

    def __init__(self, *, artifact: str, form: str, threads: int) -> None:
        from limbeck.runtime import Decoder, import_onnxruntime

        self._open: dict[str, Any] = {"folder": Path(artifact), "form": form, "threads": threads}
        self._decoder: Decoder | None = Decoder(**self._open)
        self._scorer: Decoder | None = None
        ort = import_onnxruntime()
        self.facts = {
            "vocabulary": self._decoder.vocabulary,
            "context": self._decoder.context,
            "threads": self._decoder.threads,
            "library": f"onnxruntime {ort.__version__}",
            "providers": list(ort.get_available_providers()),
            "provider": self._decoder.provider,
        }

    def begin(self, prompt: Sequence[int], room: int) -> int:
        """See `Runtime.begin`."""
        return int(self._generating().prefill([list(prompt)], room=room)[0].argmax())

    def step(self, token: int) -> int:
        """See `Runtime.step`."""
        return int(self._generating().step([token])[0].argmax())

    def score(self, ids: Ids) -> Logits:
        """See `Runtime.score`. The graph that keeps all logits reads the same weights file as the one that was timed."""
        if self._scorer is None:
            from limbeck.runtime import Decoder

            self._decoder = None  # one copy of the weights at a time
            self._scorer = Decoder(**self._open, all_logits=True)
        logits: Logits = self._scorer.score(ids[None])[0]
        return logits

    def _generating(self) -> Any:
        if self._decoder is None:
            raise DataError("this arm was scored already, which ends its use for generation; open it anew.")
        return self._decoder
