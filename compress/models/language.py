"""Model sources to plain transformers folders in the cache, and folders to torch models.

All later code sees one form only: a folder with config, safetensors weights and a tokenizer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from compress.models.body import Body, require_faithful
from compress.models.gguf import dequantise, gguf_key
from compress.models.gguf_config import UNREADABLE, gguf_config
from limbeck.contract.errors import EnvironmentalError, ModelError
from limbeck.contract.lock import make_once
from limbeck.contract.models.loading import know_wrapper, load_pretrained, rounding
from limbeck.contract.recipe import (
    BaseSource,
    GgufModel,
    HubModel,
    LocalModel,
    PackageModel,
    RandomModel,
    fingerprint,
)
from limbeck.contract.sources.hub import hub_config, hub_snapshot
from limbeck.contract.sources.models import model_path
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.weights import check_weights, stored_form

# What transformers raises for impossible sizes.
BAD_CONFIG = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_folder(source: BaseSource, *, folder: Path) -> Path:
    """The plain folder of a model. GGUF files and random models are converted once, into the cache.

    Raises `ModelError` if the source holds nothing usable.
    """
    match source:
        case HubModel():
            return hub_snapshot(source.id, source.revision)
        case RandomModel():
            key = fingerprint({"random": source.model_dump(mode="json")})
            return cached(key, lambda out: _make_random(source, out))
        case LocalModel() | GgufModel() | PackageModel():
            path = model_path(source, folder=folder)
            assert path is not None
            if path.is_dir():
                return path
            return cached(gguf_key(path), lambda out: dequantise(path, out))


def model_config(source: BaseSource, *, folder: Path) -> Any:
    """Configuration of a model, without its weights; of a hub model only config.json is fetched.

    Raises `ModelError` if it is not available.
    """
    if isinstance(source, RandomModel):
        return random_config(source.config, vocab_size=len(byte_tokenizer()), where="model.config")
    if isinstance(source, HubModel):
        path = hub_config(source.id, source.revision)
    else:
        found = model_path(source, folder=folder)
        assert found is not None
        path = found
    return folder_config(path)


def folder_config(path: Path) -> Any:
    """The configuration in a model folder or a GGUF file. Raises `ModelError`."""
    try:
        if path.is_file():
            return copy.deepcopy(_gguf_config(path, path.stat().st_mtime_ns))
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        know_wrapper(config.model_type)
        return config
    except ModelError:
        raise
    except Exception as error:  # a damaged file makes transformers and gguf raise almost anything
        raise ModelError(
            f"{path}: transformers cannot read its configuration ({type(error).__name__}): {error}"
            + (f". {UNREADABLE}" if path.is_file() else "")
        ) from error


@functools.lru_cache(maxsize=8)
def _gguf_config(path: Path, _changed: int) -> Any:
    """The configuration in a GGUF file, which takes seconds to read, with its whole vocabulary."""
    return gguf_config(path)


def load_model(
    folder: Path,
    *,
    dtype: str = "fp32",
    quantize: str = "none",
    device: torch.device | str = "cpu",
    as_stored: bool = False,
) -> PreTrainedModel:
    """Load a causal LM from a plain folder, in eval mode and without gradients.

    ``quantize`` is `none`, `int8` or `nf4` (bitsandbytes, on CPU and CUDA). A model that is stored
    in such a form is dequantised, unless it is wanted ``as_stored``. Raises `ModelError`.
    """
    check_weights(folder)
    if quantize != "none" and (stored := stored_form(folder)) not in (None, quantize):
        raise ModelError(
            f"{folder}: its weights are stored as {stored}, and quantize asks for {quantize}; "
            "leave quantize out."
        )
    options = rounding(quantize, DTYPES[dtype], device) if quantize != "none" else {}
    model: PreTrainedModel = load_pretrained(
        AutoModelForCausalLM, folder, dtype=DTYPES[dtype], **options
    )
    if quantize == "none":
        if getattr(model, "is_quantized", False) and not as_stored:
            model = model.dequantize(DTYPES[dtype])
            # How transformers read the files, which it cannot undo when it saves the model.
            vars(model).pop("_weight_conversions", None)
        model = model.to(device)
    model.requires_grad_(False).eval()
    require_faithful(Body(model), str(folder))
    return model


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen fp32 matrices of linear layers to autocast's ``dtype`` once.

    Autocast would cast them at every use: the result is equal bit for bit and takes half the
    memory. A matrix that an embedding shares keeps its type. All parameters are copied, because one
    that still maps the file of weights would keep the whole file in memory.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D) or module.weight.dtype != torch.float32:
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and id(parameter) not in embedded:
                parameter.data = parameter.data.to(dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != dtype and not tensor.requires_grad:
            tensor.data = tensor.data.clone()


def resolve_device(device: str) -> torch.device:
    """Torch device for `auto`, `cpu` or `cuda`. Raises `EnvironmentalError` if there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentalError(
            "training.device: found 'cuda', but torch sees no GPU here; use device: auto or cpu, "
            "or install a CUDA build of torch."
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def cached(key: str, make: Callable[[Path], dict[str, Any]]) -> Path:
    """Folder of the `model` artifact of ``key`` in the cache.

    If it is missing, ``make`` fills it and returns its measurements.
    """
    path = cache_folder() / "models" / key[:16]
    make_once(path, kind="model", key=key, parents={}, make=make)
    return path


def _make_random(source: RandomModel, out: Path) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    model = random_model(
        source.config, vocab_size=len(tokenizer), seed=source.seed, where="model.config"
    )
    model.config.bos_token_id = model.config.eos_token_id = model.config.pad_token_id = (
        tokenizer.eos_token_id
    )
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = (
        tokenizer.eos_token_id
    )
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    _save(model, tokenizer, out)
    return {"parameters": model.num_parameters()}


def random_model(
    config: Mapping[str, Any],
    *,
    vocab_size: int,
    seed: int,
    where: str,
    auto: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """A randomly initialised model of a transformers configuration. Raises `ModelError`."""
    chosen = random_config(config, vocab_size=vocab_size, where=where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = auto.from_config(chosen, dtype=torch.float32)
            return model
        except BAD_CONFIG as error:
            raise ModelError(f"{where}: transformers cannot build it: {error}") from error


def random_config(config: Mapping[str, Any], *, vocab_size: int, where: str) -> Any:
    """The transformers configuration of fields given by hand. Raises `ModelError`."""
    options = {"vocab_size": vocab_size, **config}
    if "model_type" not in options:
        raise ModelError(
            f"{where}: no model_type; name the architecture, for example model_type: llama."
        )
    try:
        made = AutoConfig.for_model(**options)
    except BAD_CONFIG as error:
        raise ModelError(f"{where}: transformers cannot build it: {error}") from error
    text = made.get_text_config()
    if "pad_token_id" not in config and (text.pad_token_id or 0) >= text.vocab_size:
        text.pad_token_id = None  # the architecture's default, which the embedding would not hold
    return made


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and one end-of-text token; needs no training and no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={end: 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
