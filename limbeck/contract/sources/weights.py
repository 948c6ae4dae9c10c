"""Whether a path holds weights that Limbeck reads: safetensors or GGUF, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from limbeck.contract.errors import ModelError
from limbeck.contract.files import require_content
from limbeck.contract.recipe.mistakes import did_you_mean
from limbeck.contract.sources.places import read_object

# Quantised forms that transformers loads on a CPU; it dequantises fp8 and mxfp4 at once.
_FORMS = ("bitsandbytes", "fp8", "mxfp4")


def check_weights(path: Path) -> None:
    """Raise `ModelError` unless ``path`` is a GGUF file or a model folder with safetensors."""
    if path.is_file():
        if path.suffix == ".gguf":
            _require_one_file(path)
            require_content(path)
            with path.open("rb") as content:
                if content.read(4) != b"GGUF":
                    raise ModelError(
                        f"{path}: no GGUF file, which begins with GGUF; download it again."
                    )
            return
        raise ModelError(
            f"{path}: not a model; expected a .gguf file or a folder with safetensors weights."
        )
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such file or folder{did_you_mean(path)}; check the path in the recipe."
        )
    if strange := [p.name for p in path.iterdir() if not (p.is_file() or p.is_dir())]:
        # transformers would wait for a pipe without end
        raise ModelError(f"{path}: {strange[0]} is a pipe, device or broken link; remove it.")
    adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path}: no config.json; expected a folder as `save_pretrained` writes it."
            + (
                " It holds an adapter: name its base as the model, and this folder as adapter. Of "
                "an encoder, merge both with peft's `merge_and_unload`, and name the result."
                if adapter
                else _hint(path.glob("snapshots/*/config.json"))
            )
        )
    if adapter:
        raise ModelError(
            f"{path}: a model and an adapter in one folder; transformers would load both. Move the "
            "adapter's files (adapter_*) elsewhere, and name it as adapter if it is not merged yet."
        )
    if not any(path.glob("*.safetensors")):
        pickles = [
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern)
        ]
        if pickles:
            raise ModelError(
                f"{path}: {pickles[0]} is a pickle, which can run code when it is opened; Limbeck "
                "reads safetensors and GGUF only. Load it where you trust it and "
                "`save_pretrained(…)` it again, which writes safetensors."
            )
        hint = "".join(
            f" {file.name} is a GGUF file: name that file, with kind: gguf."
            for file in sorted(path.glob("*.gguf"))[:1]
        )
        raise ModelError(f"{path}: no weights; expected *.safetensors beside config.json.{hint}")
    _require_whole(path)
    for file in (*path.glob("*.safetensors"), *path.glob("tokenizer*")):
        require_content(file)
    stored_form(path)


def _hint(configs: Iterable[Path]) -> str:
    """Where the model is that the folder of a hub's cache holds."""
    return "".join(f" {file.parent} is one." for file in sorted(configs)[:1])


_PART = re.compile(r"(?P<name>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")  # as llama-gguf-split writes


def _require_one_file(file: Path) -> None:
    """Raise `ModelError` for a part of a GGUF file: transformers reads one file only."""
    found = _PART.fullmatch(file.name)
    if found is not None and int(found["count"]) > 1:
        name = found["name"]
        raise ModelError(
            f"{file}: one of {int(found['count'])} parts of a GGUF file. Join them, and name the "
            f"joined file: llama-gguf-split --merge {name}-00001-of-{found['count']}.gguf "
            f"{name}.gguf"
        )


def _require_whole(folder: Path) -> None:
    """Raise `ModelError` unless the files are there from which transformers reads a model."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return
    if not index.is_file():
        found = min(path.name for path in folder.glob("*.safetensors"))
        raise ModelError(
            f"{folder}: neither model.safetensors nor {index.name}, which lists the files of a "
            f"model in parts (found: {found}). Copy or download the folder again."
        )
    listed = read_object(index)
    named = listed.get("weight_map")
    if not isinstance(named, dict) or not isinstance(listed.get("metadata"), dict):
        raise ModelError(
            f"{index}: expected two objects, metadata and weight_map, without which transformers "
            "reads no model in parts. Copy or download the file again."
        )
    names = sorted(set(map(str, named.values())))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder}: {missing[0]} is missing, one of {len(missing)} of the {len(names)} files "
            f"that {index.name} lists. Copy or download the folder again."
        )


def _plain_type(folder: Path) -> str | None:
    """The number type of a model's first weight if all of them are plain numbers, else None.

    Every quantised form has codes of 8 or 32 bits beside its scales.
    """
    from safetensors import SafetensorError, safe_open

    types: list[str] = []
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "np") as file:
                types += [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError):  # named when the weights are read
        return None
    return types[0] if types and set(types) <= {"F64", "F32", "F16", "BF16"} else None


def stored_form(folder: Path) -> str | None:
    """The quantised form of a model's weights: int8, nf4, fp4, fp8 or mxfp4; None for plain ones.

    Raises `ModelError` for a form that is not read, such as GPTQ and AWQ.
    """
    config = read_object(folder / "config.json")
    found = config.get("quantization_config", config.get("quantization"))
    if not isinstance(found, dict):
        return None
    if {"bits", "group_size"} <= found.keys() and "quant_method" not in found:
        raise ModelError(
            f"{folder}: its weights are stored in MLX's form of {found['bits']} bits, which "
            "transformers cannot read. Name the model that it was made from, or dequantise it: "
            "mlx_lm.convert --dequantize."
        )
    method = found.get("quant_method")
    if method is None and (found.get("load_in_8bit") or found.get("load_in_4bit")):
        method = "bitsandbytes"  # as older files have it
    if method not in ("fp8", "mxfp4") and (plain := _plain_type(folder)) is not None:
        raise ModelError(
            f"{folder}: config.json has a quantization_config ({method or 'without quant_method'}),"
            f" but the weights are plain numbers of type {plain}, as those of a merged model are. "
            "Take quantization_config out of config.json."
        )
    if method not in _FORMS:
        raise ModelError(
            f"{folder}: its weights are stored as {method}; Limbeck reads plain weights, GGUF, "
            f"{', '.join(_FORMS)}. Name the model that it was made from."
        )
    if method != "bitsandbytes":
        return str(method)
    return str(found.get("bnb_4bit_quant_type", "fp4")) if found.get("load_in_4bit") else "int8"
