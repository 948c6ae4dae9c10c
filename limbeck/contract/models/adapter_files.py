"""PEFT adapters as they are on disk: configuration and shapes, without the weights.

An adapter is refused by name if it changes more than the layers of the model: only peft's own
forward pass computes such changes, and no stage calls that pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.files import parse_json, require_content
from limbeck.contract.recipe.mistakes import did_you_mean

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Kinds of peft that replace layers of the model, each held to peft by tests/wild.
_KINDS = frozenset({
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT",
    "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
# Kinds that peft merges into no base: texts before the prompt, and routers.
_UNMERGED = frozenset({
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY",
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
})  # fmt: skip
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # peft's names of them
# Options of LoRA that change more than the layers.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Options of LoRA by which an adapter changes the base, or peft allows no second adapter beside it.
_ALONE = (
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "target_parameters",
    "trainable_token_indices",
)
# Starts of LoRA that peft computes at every load, and why the result is not the trained model.
_STARTS = {
    "pissa_niter_": "peft subtracts a random approximation from the base, so every load computes "
    "another model",
    "corda": "peft computes the start from statistics that no adapter holds",
    "loftq": "peft rounds the base again at every load, and only with CUDA",
}
# A state dict has the adapter's name inside, as in lora_A.default.weight. `save_pretrained` leaves
# it out. Files of both kinds are found, and load alike.
_NAMED = re.compile(r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)([^.]+)(?:\.weight)?$")
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # of LoRA: the base stays as it is


@dataclass(frozen=True)
class AdapterFacts:
    """What the files of an adapter say."""

    path: Path
    kind: str  # peft's name of the method, upper case
    base: str | None  # folder or hub id of the model it was trained on
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, named as `save_pretrained` does

    @property
    def shares_base(self) -> bool:
        """Whether several such adapters can share one base in memory and stay independent."""
        config = self.config
        saved = tuple(config.get("modules_to_save") or ())
        return (
            self.kind == "LORA"
            and config.get("bias", "none") == "none"
            and config.get("init_lora_weights") in _PLAIN_STARTS
            and not any(config.get(name) for name in _ALONE)
            and all(
                ".lora_" in name
                or (
                    any(f".{module}." in name for module in saved)
                    and ".original_module." not in name
                )
                for name in self.shapes  # else it overwrites weights of the base
            )
        )


def adapter_facts(folder: Path) -> AdapterFacts:
    """Read an adapter folder, without its weights. Raises `ModelError` if it cannot be used."""
    _require_files(folder)
    config = _read_config(folder)
    _require_supported(folder, config)
    shapes = _read_shapes(folder)
    _require_ranks(folder, config, shapes)
    base = config.get("base_model_name_or_path")
    return AdapterFacts(folder, config["peft_type"], str(base) if base else None, config, shapes)


def _require_files(folder: Path) -> None:
    if folder.is_file():
        raise ModelError(
            f"{folder}: a file; name the folder of the adapter, unpacked from an archive."
        )
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no such folder{did_you_mean(folder)}; check the path of the adapter."
        )
    if not (folder / CONFIG).is_file():
        within = next((path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))), None)
        hint = f" {within} is one: name that folder." if within else ""
        raise ModelError(f"{folder}: no {CONFIG}; expected a PEFT adapter folder.{hint}")
    if (folder / "adapters.safetensors").is_file() and not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: adapters.safetensors is an adapter of mlx-lm, which peft cannot load. Fuse "
            "it with its base (`mlx_lm.fuse --dequantize`), and name the fused folder as the model."
        )
    if not (folder / WEIGHTS).is_file():
        pickle = next(folder.glob("adapter_model.bin"), None)
        raise ModelError(
            f"{folder}: no {WEIGHTS}; "
            + (
                f"{pickle.name} is a pickle, which can run code when it is opened. Load the "
                "adapter where you trust it and save it again: `save_pretrained` writes "
                "safetensors."
                if pickle
                else "expected a PEFT adapter folder with safetensors weights."
            )
        )
    require_content(folder / WEIGHTS)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
        config["peft_type"] = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CONFIG}: cannot be read ({type(error).__name__}: {error}); save the "
            "adapter again with `save_pretrained`."
        ) from None
    saved = config.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ModelError(
            f"{folder / CONFIG}: modules_to_save is {saved!r}, expected a list of names; save the "
            "adapter again with `save_pretrained`."
        )
    return config


def _require_supported(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless the adapter changes nothing but layers, and is what was trained."""
    if (task := config.get("task_type")) in _OTHER_TASKS:
        raise ModelError(
            f"{folder}: this adapter is of a model for another task ({task}), whose head is no "
            "language model's. Name one that was trained with task_type CAUSAL_LM."
        )
    if (kind := config["peft_type"]) not in _KINDS:
        raise ModelError(
            f"{folder}: adapters of the kind {kind} are not supported: they change more than each "
            f"layer for itself. {_remedy(kind)}"
        )
    for option in _REFUSED:
        if config.get(option):
            raise ModelError(
                f"{folder}: adapters with {option} are not supported: they change more than the "
                "layers of a model."
            )
    start = str(config.get("init_lora_weights"))
    if problem := next((why for name, why in _STARTS.items() if start.startswith(name)), None):
        raise ModelError(
            f"{folder}: adapters with init_lora_weights: {start} are not supported: {problem}. "
            "Merge it where it was trained, or save it as a plain adapter there, with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )


def _remedy(kind: str) -> str:
    if kind.upper() in _KINDS:
        return f"In {CONFIG}, peft writes the name in capitals: {kind.upper()}."
    if kind in _UNMERGED:
        return (
            "peft cannot merge it into its base either. Train an adapter of another kind, such as "
            "LORA, or let a server that runs it be the teacher."
        )
    return "Merge it into its base with peft, and name the merged folder as the model."


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors, by the names that `save_pretrained` gives them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            extra = not_saved(file.keys())
            names = {name: re.sub(extra, "", name) for name in file.keys()}  # noqa: SIM118
            shapes = {new: tuple(file.get_slice(old).get_shape()) for old, new in names.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: this adapter's weights cannot be read ({error}); copy or "
            "download the folder again."
        ) from None
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty or not shapes:
        raise ModelError(
            f"{folder / WEIGHTS}: {empty or 'the file'} is empty: one of several processes saved "
            "the part that it had (DeepSpeed ZeRO-3 or FSDP). Gather the weights where it was "
            "trained, for example with stage3_gather_16bit_weights_on_model_save, and save it "
            "again."
        )
    if len(shapes) < len(names):
        twice = next(old for old, new in names.items() if old != new and new in names)
        raise ModelError(
            f"{folder / WEIGHTS}: it holds both {twice} and {names[twice]}, which are one weight. "
            "Save the adapter again with `save_pretrained`."
        )
    return shapes


def _require_ranks(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `ModelError` for a rank that no tensor has.

    peft would make matrices of that size before it reads the weights.
    """
    if config["peft_type"] != "LORA":
        return
    of_layers = config.get("rank_pattern")
    ranks = [config.get("r"), *(of_layers.values() if isinstance(of_layers, dict) else ())]
    known = [rank for rank in ranks if isinstance(rank, int)]
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if max(known, default=0) > largest:
        raise ModelError(
            f"{folder / CONFIG}: a rank in it is larger than each of the tensors in {WEIGHTS}; "
            "save the adapter again with `save_pretrained`."
        )


def not_saved(names: Iterable[str]) -> str:
    """Pattern of the parts of a state dict's ``names`` that `save_pretrained` would leave out."""
    inside = next((found[1] for name in names if (found := _NAMED.search(name))), "default")
    # torch.compile wraps the model as _orig_mod.
    return rf"(\.modules_to_save)?\.{re.escape(inside)}(?=\.|$)|(?<![^.])_orig_mod\."
