"""Write one GGUF file of a student."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.check.weights import WeightError, require_limits, unlike, unlike_rows
from export.folder.clients import chat_template
from export.folder.ends import end_tokens
from export.gguf import architecture as known
from export.gguf.tokenizer import write_tokenizer
from limbeck.contract.data.arrays import Floats
from limbeck.contract.errors import ModelError
from limbeck.contract.progress import task

# By form: type of matrices, of embedding and head, and the whole file's number of its type. Four
# bits in the head cost more loss than they save bytes, so it keeps eight, as in int4-weight.
_TYPES = {
    "gguf-f16": ("F16", "F16", "MOSTLY_F16"),
    "gguf-q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "gguf-q4_0": ("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
}
_BITS = {"Q8_0": "8 bits", "Q4_0": "4 bits"}  # kinds of `WeightError`; others are not rounded
_BLOCK = 32  # numbers of a row that share a scale; a row that it does not divide is stored in F16


def write_gguf(
    model: Path, out: Path, form: str, *, name: str, metadata: Mapping[str, str]
) -> dict[str, int]:
    """Write the student in the transformers folder ``model`` to the file ``out``.

    Returns the number of tensors by type. Raises `ModelError` for an architecture, an option or a
    tokenizer that llama.cpp does not know, and `ParityError` for a tensor that differs by more than
    rounding does.
    """
    import gguf

    config = known.whole_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    arch = known.architecture(config)
    layers = known.layers_of(config)
    names = gguf.get_tensor_name_map(arch_number(arch), layers)
    writer = gguf.GGUFWriter(out, arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[_TYPES[form][2]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(layers)
    for key, value in metadata.items():
        writer.add_string(key, value)
    known.write_metadata(writer, arch, config)
    write_tokenizer(
        writer,
        model,
        rows=int(config["vocab_size"]),
        ends=end_tokens(model),
        template=chat_template(model),
    )
    counts: Counter[str] = Counter()
    errors: list[WeightError] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(model, config))
    if (factors := known.rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    with task(f"writing {form}", len(tensors)) as progress:
        for tensor, load in tensors.items():
            target = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ModelError(
                    f"{model}: llama.cpp's {arch} has no place for {tensor}. Leave the gguf forms "
                    "out of export.forms."
                )
            array = known.as_llama_cpp(arch, tensor, load(), config)
            kind = stored_type(form, target, tuple(array.shape))
            counts[kind] += 1
            number = gguf.GGMLQuantizationType[kind]
            stored = _rounded(array, number)
            errors.append(_error(target, kind, array, gguf.dequantize(stored, number)))
            writer.add_tensor(target, stored, raw_dtype=number)
            progress.advance()
    require_limits(form, errors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(counts)


# Trial steps of a block, over the one that reaches its largest number. llama.cpp takes 1 alone and
# has 30 % more squared error on Gemma-3-270M; nineteen trials have 0.4 % less.
_TRIALS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)


def _rounded(values_NK: Floats, number: Any) -> npt.NDArray[Any]:
    """``values_NK`` as llama.cpp stores the type ``number``, one of gguf's enumeration."""
    import gguf

    if number == gguf.GGMLQuantizationType.Q4_0:
        return _q4_0(values_NK)
    stored: npt.NDArray[Any] = gguf.quantize(values_NK, number)
    return stored


def _q4_0(values_NK: Floats) -> npt.NDArray[np.uint8]:
    """``values_NK`` in llama.cpp's Q4_0: of each block a scale in fp16, and 32 codes of 4 bits.

    The scale is the least-squares one for the best of a few roundings.
    """
    blocks = values_NK.reshape(-1, _BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    best = np.full((len(blocks), 1), np.inf, np.float32)
    scales, codes = np.zeros((len(blocks), 1), np.float16), np.zeros(blocks.shape, np.uint8)
    for trial in _TRIALS:
        step = largest * np.float32(trial / -8)
        tried = np.clip(np.rint(blocks / np.where(step == 0, 1, step)), -8, 7)
        size = np.square(tried).sum(1, keepdims=True)
        fit = (tried * blocks).sum(1, keepdims=True) / np.where(size == 0, 1, size)
        scale = fit.astype(np.float16)
        error = np.square(blocks - scale.astype(np.float32) * tried).sum(1, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        codes = np.where(better, tried + 8, codes).astype(np.uint8)
    half = _BLOCK // 2
    packed = codes[:, :half] | (codes[:, half:] << 4)
    return np.hstack([scales.view(np.uint8), packed]).reshape(len(values_NK), -1)


def _error(name: str, kind: str, values: Floats, stored: Floats) -> WeightError:
    """What the codes of a tensor, read back to ``stored``, differ by from its ``values``."""
    if kind in _BITS:
        return WeightError(name, _BITS[kind], unlike_rows(values, stored))
    return WeightError(name, "not rounded", unlike(values, stored))


_OUTER = ("token_embd.weight", "output.weight")
_POSITIONS = "position_embd.weight"


def stored_type(form: str, target: str, shape: tuple[int, ...]) -> str:
    """Type of llama.cpp's tensor ``target`` in ``form``; vectors and positions stay in fp32."""
    if len(shape) < 2 or target == _POSITIONS:
        return "F32"
    body, outer, _ = _TYPES[form]
    kind = outer if target in _OUTER else body
    return kind if kind == "F16" or shape[-1] % _BLOCK == 0 else "F16"


def tensor_bytes(form: str, target: str, shape: tuple[int, ...]) -> int:
    """Bytes of llama.cpp's tensor ``target`` of ``shape`` in ``form``."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[stored_type(form, target, shape)]]
    return int(math.prod(shape) // block * size)


def arch_number(arch: str) -> Any:
    """gguf's number of llama.cpp's architecture ``arch``."""
    from gguf import MODEL_ARCH_NAMES

    return next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)


def _tensors(model: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names of the stored tensors, and what loads each in fp32."""
    from safetensors import safe_open

    tied = config.get("tie_word_embeddings", True)
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                buffer = name.endswith((".attn.bias", ".attn.masked_bias"))  # of old gpt2 files
                if not buffer and not (tied and name == "lm_head.weight"):
                    yield name, lambda file=file, name=name: _load(file, name)


def _load(file: Path, name: str) -> Floats:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return np.asarray(opened.get_tensor(name).float().numpy(), np.float32)
