"""Load a transformers folder; a weight that is missing from its files is an error.

All stages load models here. The caller gives the classes, so torch and transformers are not
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.files import parse_json

_WRAPPERS = ("_orig_mod.", "module.")
# Models for pictures and text, of which transformers says only that they answer pictures. Read
# without a picture they are language models; tests/wild holds each to transformers.
WRAPPERS = frozenset({
    "idefics3", "internvl", "lfm2_vl", "llava", "llava_onevision", "mistral3", "qwen2_5_vl",
    "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
})  # fmt: skip
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

Fresh = Callable[
    [Any, str], bool
]  # of the model and the name of a weight: whether the folder may lack it


def know_wrapper(model_type: object) -> None:
    """Let `AutoModelForCausalLM` make a model of `WRAPPERS`, as it makes Gemma 3's."""
    if model_type not in WRAPPERS:
        return
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = CONFIG_MAPPING[str(model_type)]
    AutoModelForCausalLM.register(
        config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config], exist_ok=True
    )


def rounding(quantize: str, number: Any, device: Any) -> dict[str, Any]:
    """Options of `load_pretrained` for weights in `int8` or `nf4`, computed in type ``number``."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "int8",
        load_in_4bit=quantize == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=number,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _leaving_narrow_weights(model: Any) -> Any:
    """``model``, of which bitsandbytes does not rearrange weights that do not fill its blocks.

    It rearranges 4-bit weights when they are first used, with AVX512-BF16, and stops at such ones.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (
            module.in_features % 64 or module.out_features % 32
        ):
            module.support_avx512bf16_for_cpu = False
    return model


def load_pretrained(
    auto: Any,
    folder: Path | str,
    *,
    what: str = "a causal language model",
    fresh: Fresh | None = None,
    **options: Any,
) -> Any:
    """``auto.from_pretrained(folder)`` from local safetensors, without remote code.

    Raises `ModelError` if files cannot be read, or if weights are missing or have another shape:
    transformers would fill those at random and only warn. It also raises it if a stored weight is
    NaN or infinite. Weights that are ``fresh`` may be random. ``what`` names the model in errors.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    where = Path(folder, options["gguf_file"]) if "gguf_file" in options else folder
    config = Path(folder, "config.json")
    if config.is_file():
        know_wrapper(parse_json(config.read_text("utf-8")).get("model_type"))
    try:
        model, found = auto.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except SafetensorError as error:
        raise ModelError(
            f"{where}: its weights cannot be read ({error}); copy or download the folder again."
        ) from error
    except ImportError as error:
        says = " ".join(str(error).split())
        remedy = (
            "Take attn_implementation out of its config.json."
            if "attention" in says.lower()
            else "Install what is missing, and try again."
        )
        raise ModelError(f"{where}: {says} {remedy}") from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        LookupError,
        OSError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        raise ModelError(
            f"{where}: transformers cannot load it as {what}: {type(error).__name__}: {error}"
        ) from error

    _require_all(found, where, what=what, is_fresh=lambda n: fresh is not None and fresh(model, n))
    if "gguf_file" in options:
        require_finite(where, model.state_dict().items())
    else:
        _require_no_rest(Path(folder), set(found["unexpected_keys"]))
        _require_finite_files(Path(folder), unused=found["unexpected_keys"])
    _record_untied_head(model)
    return _leaving_narrow_weights(model)


def _require_all(
    found: Mapping[str, Any], where: Path | str, *, what: str, is_fresh: Callable[[str], bool]
) -> None:
    """Raise `ModelError` if weights are missing or have another shape.

    ``found`` is what transformers says of its loading.
    """
    wrong = sorted(entry for entry in found["mismatched_keys"] if not is_fresh(entry[0]))
    if wrong:
        shown = "; ".join(
            f"{name} is {_shape(stored)}, expected {_shape(wanted)}"
            for name, stored, wanted in wrong[:3]
        )
        raise ModelError(
            f"{where}: {len(wrong)} of its weights do not fit its configuration ({shown}); "
            "take the config.json that was saved with them."
        )
    missing = sorted(name for name in found["missing_keys"] if not is_fresh(name))
    if missing:
        raise ModelError(_lacking(missing, found["unexpected_keys"], f"{where}: as {what}"))


def _require_no_rest(folder: Path, unused: set[str]) -> None:
    """Raise `ModelError` for a stored part of a layer whose weight is used without it.

    transformers leaves out such a scale of quantised weights, a bias or an adapter's matrix, and
    only warns.
    """
    if not unused:
        return
    used = stored_names(folder) - unused
    for name in sorted(unused):
        parts = name.split(".")
        layers = [".".join(parts[:count]) for count in range(1, len(parts))]
        layer = next((layer for layer in layers if f"{layer}.weight" in used), None)
        if layer is None:
            continue
        remedy = (
            "It is an adapter's: merge the adapter with `merge_and_unload`, and save the model."
            if "lora_" in name
            else "Take the config.json that was saved with these weights; if they are quantised, "
            "it has a quantization_config."
        )
        raise ModelError(
            f"{folder}: its files have {name}, which its config.json does not provide for, so "
            f"{layer}.weight alone is another model. {remedy}"
        )


def _lacking(missing: Sequence[str], stored: Iterable[str], who: str) -> str:
    """Why weights are missing, as far as the unused names among the ``stored`` ones tell."""
    lacks = f"{who} it lacks {len(missing)} of its weights (for example {', '.join(missing[:3])})"
    tail = missing[0].partition(".")[2]
    if wrapped := next((n for n in stored if n.startswith(_WRAPPERS)), None):
        prefix = wrapped.partition(".")[0]
        return (
            f"{lacks}. Its files have {wrapped} instead: the model was saved with its wrapper "
            f"({prefix}), of torch.compile or of several processes. Save the model inside: "
            f"model.{prefix}.save_pretrained(…)."
        )
    if inner := next((n for n in sorted(stored) if n.endswith(tail)), None):
        return (
            f"{lacks}. Its files have {inner} instead: they hold a larger model than its "
            "config.json says. Take that model's own config.json, or save the part for text "
            "alone, with its configuration."
        )
    return (
        f"{lacks}. Save the whole model again, its head included, with the configuration that "
        "belongs to it."
    )


def require_finite(where: Path | str, tensors: Iterable[tuple[str, Any]]) -> None:
    """Raise `ModelError` naming the first of the named ``tensors`` that is NaN or infinite.

    A sum is NaN or infinite if one of its terms is, so each tensor is read only once. All of
    SmolLM2-135M in fp32 take 0.13 s of processor time.
    """
    import torch

    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor  # torch sums no float8
        if bool(values.sum(dtype=torch.float32).isfinite()):
            continue
        if wrong := int((~values.isfinite()).sum()):  # else only the sum was too large
            raise ModelError(
                f"{where}: {wrong} of the {values.numel()} numbers of {name} are NaN or infinite. "
                "Download the file again, or take a checkpoint from before its training diverged."
            )


def stored_names(folder: Path) -> set[str]:
    """Names of the tensors in the files that transformers reads."""
    from safetensors import safe_open

    found: set[str] = set()
    for name in _files(folder):
        with safe_open(folder / name, "np") as file:
            found |= set(file.keys())
    return found


def _files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    index = parse_json((folder / _INDEX).read_text("utf-8"))
    return sorted(set(index["weight_map"].values()))


def _require_finite_files(folder: Path, *, unused: Iterable[str]) -> None:
    """`require_finite` of the files that transformers reads, ``unused`` tensors left out."""
    from safetensors import safe_open

    for name in _files(folder):
        with safe_open(folder / name, "pt") as file:
            used = sorted(set(file.keys()) - set(unused))
            require_finite(folder / name, ((key, file.get_tensor(key)) for key in used))


def _record_untied_head(model: Any) -> None:
    """Record in the configuration that the head is not tied to the embedding.

    transformers keeps a stored head that differs from the embedding. A copy saved from here would
    otherwise lose that head to the embedding when it is loaded again.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config = model.config
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = False


def unused_pooler(_model: Any, name: str) -> bool:
    """`Fresh` for encoders that only give token states: the pooler behind them is unused."""
    return name.startswith("pooler.")


def _shape(size: Any) -> str:
    return "x".join(map(str, size)) or "a number"
