"""PEFT adapters: read an adapter folder, attach it to a base, merge it for deployment.

All stages load adapters here. An adapter is refused by name if it changes more than the layers of
the model: only peft's own forward pass computes such changes, and no stage calls that pass.
peft and torch are imported where they are needed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.files import parse_json
from limbeck.contract.models.loading import require_finite
from limbeck.contract.models.patterns import require_quick
from limbeck.contract.models.probe import probe_ids, require_equal
from limbeck.contract.models.tokens import tokenizer_size
from limbeck.contract.recipe.mistakes import did_you_mean

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Kinds of peft that replace layers of the model, each held to peft by tests/wild.
_KINDS = frozenset({
    "ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA",
    "LOKR", "LORA", "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA",
    "VERA", "WAVEFT",
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
_MULTIPLES = (8, 16, 32, 64, 128, 256)  # that embeddings are filled up to
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
    from safetensors import SafetensorError, safe_open

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
    try:
        config = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
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
    if (task := config.get("task_type")) in _OTHER_TASKS:
        raise ModelError(
            f"{folder}: this adapter is of a model for another task ({task}), whose head is no "
            "language model's. Name one that was trained with task_type CAUSAL_LM."
        )
    if kind not in _KINDS:
        raise ModelError(
            f"{folder}: adapters of the kind {kind} are not supported: they change more than the "
            "layers of a model. Merge it into its base with peft and name the merged folder as "
            "the model."
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
    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            extra = _not_saved(file.keys())
            names = {name: re.sub(extra, "", name) for name in file.keys()}  # noqa: SIM118
            shapes = {new: tuple(file.get_slice(old).get_shape()) for old, new in names.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: this adapter's weights cannot be read ({error}); copy or "
            "download the folder again."
        ) from None
    if len(shapes) < len(names):
        twice = next(old for old, new in names.items() if old != new and new in names)
        raise ModelError(
            f"{folder / WEIGHTS}: it holds both {twice} and {names[twice]}, which are one weight. "
            "Save the adapter again with `save_pretrained`."
        )
    of_layers = config.get("rank_pattern")
    ranks = [config.get("r"), *(of_layers.values() if isinstance(of_layers, dict) else ())]
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if kind == "LORA" and any(isinstance(rank, int) and rank > largest for rank in ranks):
        raise ModelError(  # peft would make matrices of that size before it reads the weights
            f"{folder / CONFIG}: a rank in it is larger than each of the tensors in {WEIGHTS}; "
            "save the adapter again with `save_pretrained`."
        )
    base = config.get("base_model_name_or_path")
    return AdapterFacts(folder, kind, str(base) if base else None, config, shapes)


def _not_saved(names: Iterable[str]) -> str:
    """Pattern of the parts of a state dict's ``names`` that `save_pretrained` would leave out."""
    inside = next((found[1] for name in names if (found := _NAMED.search(name))), "default")
    # torch.compile wraps the model as _orig_mod.
    return rf"(\.modules_to_save)?\.{re.escape(inside)}(?=\.|$)|(?<![^.])_orig_mod\."


def can_join(model: Any, facts: AdapterFacts) -> bool:
    """Whether an adapter may sit beside others on the base of ``model``, a `PeftModel`."""
    lm = model.get_base_model()
    return facts.shares_base and _wanted_rows(lm, facts) == lm.config.get_text_config().vocab_size


def attach(model: Any, folder: Path, *, name: str = "default") -> Any:
    """Put the adapter of ``folder`` on ``model``, a causal LM or a `PeftModel` with other adapters.

    Embeddings are resized if the adapter adds tokens. Raises `ModelError` unless every tensor of
    the folder has its place in the model, every weight of the adapter is in the folder, and peft
    can run it on this base.
    """
    from peft import PeftConfig, PeftModel, PeftModelForCausalLM
    from safetensors import SafetensorError, safe_open

    facts = adapter_facts(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = list(file.keys())
        require_finite(folder / WEIGHTS, ((name, file.get_tensor(name)) for name in names))
    inside = {_not_saved(names): ""} if facts.shapes.keys() != set(names) else None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    require_quick(folder / CONFIG, facts.config, [name for name, _ in base.named_modules()])
    _resize(base, facts)
    try:
        with warnings.catch_warnings():  # of peft, on what is checked below
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
            _require_known(facts, config)
            config.inference_mode = True
            if not isinstance(model, PeftModel):
                model = PeftModelForCausalLM(model, config, name)
            found = model.load_adapter(str(folder), name, key_mapping=inside)
            model.set_adapter(name)
            if getattr(base, "is_quantized", False):
                _run_twice(model, base)
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,  # of a number in a pattern
        SafetensorError,
        re.error,  # names of layers may be patterns
    ) as error:
        problem = f"{base.config._name_or_path or 'its base'}: {_in_one_line(error)}"
        if getattr(base, "is_quantized", False):
            kind = "DoRA" if facts.config.get("use_dora") else facts.kind
            raise ModelError(
                f"{folder}: peft cannot run this {kind} adapter on the quantised {problem}. Set "
                "quantize: none for this model."
            ) from error
        raise ModelError(
            f"{folder}: this adapter does not fit {problem}. Name the base that it was trained on "
            f"({facts.base}), and compare {CONFIG} with the weights beside it."
        ) from error
    # With a resized embedding, peft writes the modules that it saves twice, under two names.
    unexpected = [
        key
        for key in found.unexpected_keys
        if key.replace(".modules_to_save.", ".") not in facts.shapes.keys() - {key}
    ]
    missing = [key for key in found.missing_keys if "vblora_vector_bank" not in key]
    for keys, problem in (
        (unexpected, "tensors in it have no place in the model"),
        (missing, "of its tensors are not in it"),
    ):
        if keys:
            raise ModelError(
                f"{folder}: this adapter does not fit "
                f"{base.config._name_or_path or 'its base'}: {len(keys)} {problem} "
                f"(for example {keys[0]}). Name the base that it was trained on ({facts.base})."
            )
    return model.eval().requires_grad_(False)


def _run_twice(model: Any, base: Any) -> None:
    """Let a quantised model answer a test batch, and another one.

    peft 0.21.2 has kinds that it attaches to such a base and cannot run. It loses the scales of
    int8 weights on a CPU when DoRA reads them, which the second batch shows.
    """
    import torch

    ids = torch.tensor(_probe_ids(base, model.active_peft_config), device=base.device)
    with torch.inference_mode():
        for _ in range(2):
            model.eval()(input_ids=ids)


def merged(model: Any, *, where: str) -> Any:
    """Base model of the `PeftModel` ``model``, with its active adapter merged in.

    ``model`` is of no use afterwards. If the adapter changes only one of a tied embedding and head,
    the head gets its own matrix. Raises `ModelError` if peft cannot merge the adapter, or if the
    merged model answers a test batch differently.
    """
    import torch

    config = model.active_peft_config
    lm = model.get_base_model()
    ids = torch.tensor(_probe_ids(lm, config), device=lm.device)
    with torch.inference_mode():
        theirs = model(input_ids=ids).logits
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            was_tied = _untie(lm)
            found = model.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{where}: peft cannot merge this adapter: {error}") from error
    if was_tied:
        embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
        tied = torch.equal(embedding.weight, head.weight)
        if tied:  # both have changed alike
            head.weight = embedding.weight
        for config in {id(c): c for c in (found.config, found.config.get_text_config())}.values():
            config.tie_word_embeddings = tied
    with torch.inference_mode():
        ours = found(input_ids=ids).logits
    dtype = next(found.parameters()).dtype
    require_equal(ours, theirs, where=where, what="the base with the adapter merged", dtype=dtype)
    return found


def join(model: Any, parts: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write to ``out`` one LoRA adapter that adds what ``parts``, with their weights, add.

    Their matrices stand side by side (peft's exact `cat`). ``model`` is the base of them all, and
    of no use afterwards. Raises `ModelError` for an adapter that does not fit it.
    """
    from peft.tuners.lora import LoraLayer

    names = [f"part_{index}" for index in range(len(parts))]
    for name, (folder, _) in zip(names, parts, strict=True):
        model = attach(model, folder, name=name)
    layers = dict(model.get_base_model().named_modules())
    for name in names:
        config = model.peft_config[name]
        config.use_rslora = False  # `cat` has put every scale into the matrices
        if isinstance(config.target_modules, str):  # peft joins no pattern with a list
            config.target_modules = {
                place
                for place, layer in layers.items()
                if isinstance(layer, LoraLayer) and name in layer.scaling
            }
    model.add_weighted_adapter(names, [weight for _, weight in parts], "all", "cat")
    model.save_pretrained(out, selected_adapters=["all"])  # into a folder of its own below
    for path in (out / "all").iterdir():
        path.rename(out / path.name)
    (out / "all").rmdir()
    (out / "README.md").unlink(missing_ok=True)  # peft's empty model card


def _probe_ids(lm: Any, config: Any) -> list[list[int]]:
    """A test batch with the tokens that an adapter trained one by one."""
    text = lm.config.get_text_config()
    own = (
        getattr(config, "trainable_token_indices", None)
        or getattr(config, "token_indices", None)
        or ()
    )
    if isinstance(own, Mapping):
        own = [token for tokens in own.values() for token in tokens]
    context = getattr(text, "max_position_embeddings", None)
    return probe_ids(int(text.vocab_size), context=context, extra=list(own)[:4])


def _untie(lm: Any) -> bool:
    """Untie a shared matrix that the adapter changes; True if the head now has its own copy."""
    import torch

    parts = lm.get_input_embeddings(), lm.get_output_embeddings()
    embedding, head = (_inside(part) for part in parts)
    if parts == (embedding, head) or head is None or head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return True


def _inside(module: Any) -> Any:
    """The module of the base that peft wrapped, or the module itself."""
    while wrapped := getattr(module, "base_layer", None) or getattr(
        module, "original_module", None
    ):
        module = wrapped
    return module


def _in_one_line(error: Exception) -> str:
    """What peft or torch says; of the many shapes that torch lists, the first and their number."""
    shapes = [line for line in str(error).splitlines() if "size mismatch for" in line]
    if not shapes:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    first = shapes[0].partition("size mismatch for ")[2].rstrip(". ")
    return f"{len(shapes)} of its tensors have another shape ({first})"


def _require_known(facts: AdapterFacts, config: Any) -> None:
    """Refuse options that this version of peft would drop with a warning."""
    import peft

    known = {field.name for field in fields(config)} | {"auto_mapping", "peft_version"}
    unknown = sorted(name for name, value in facts.config.items() if value and name not in known)
    if unknown:
        raise ModelError(
            f"{facts.path / CONFIG}: peft {peft.__version__} does not know {', '.join(unknown)}; "
            "install a newer peft, or merge the adapter where it was trained."
        )


def _resize(lm: Any, facts: AdapterFacts) -> None:
    """Give ``lm`` as many embedding rows as the adapter has. Raises `ModelError` if rows lack."""
    places = _places(lm)
    wanted, here = _wanted_rows(lm, facts), int(lm.config.get_text_config().vocab_size)
    path, size = facts.path, tokenizer_size(facts.path)
    if wanted == here:
        if size is not None and size > here:
            raise ModelError(
                f"{path}: the tokenizer beside it has {size} tokens, but the embeddings have "
                f"{here} rows, and those of the new tokens are not in it. Save it again with "
                "model.save_pretrained(…, save_embedding_layers=True)."
            )
        return
    found = f"{path}: its embeddings have {wanted} rows, those of its base {here}"
    if size is None:
        raise ModelError(
            f"{found}: it was trained with other tokens, and there is no tokenizer.json beside it "
            "that has them. Save its "
            f"tokenizer there: tokenizer.save_pretrained('{path}')."
        )
    # Without new tokens, rows are added to fill up to a multiple, as pad_to_multiple_of does.
    is_padding = any(wanted == -(-size // multiple) * multiple for multiple in _MULTIPLES)
    if size > wanted or (wanted > here and size <= here and not is_padding):
        raise ModelError(
            f"{found}, and the tokenizer beside it has {size} tokens; save the tokenizer that it "
            "was trained with there."
        )
    whole = [place for place in places if f"base_model.model.{place}.weight" in facts.shapes
             or f"base_model.model.{place}.base_layer.weight" in facts.shapes]  # fmt: skip
    # peft trains a copy of a saved module, so the other of a tied pair gets no new rows from it.
    saved = facts.config.get("modules_to_save") or ()
    copied = {name.rpartition(".")[2] for name in saved}
    shared = _tied(lm) and any(place.rpartition(".")[2] not in copied for place in whole)
    if wanted > here and not (len(whole) == len(places) or shared):
        missing = [place for place in places if place not in whole]
        raise ModelError(
            f"{found}: the new rows of {' and '.join(missing)} are not in it. Save it again with "
            "model.save_pretrained(…, save_embedding_layers=True)."
        )
    lm.resize_token_embeddings(wanted, mean_resizing=False)


def _places(lm: Any) -> list[str]:
    """Names of embedding and head inside ``lm``."""
    names = {id(module): name for name, module in lm.named_modules()}
    parts = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return [names[id(part)] for part in parts if part is not None and id(part) in names]


def _wanted_rows(lm: Any, facts: AdapterFacts) -> int:
    """Rows of the embedding that the adapter was trained on."""
    rows = max(_rows(facts.shapes, place) for place in _places(lm))
    return rows or int(lm.config.get_text_config().vocab_size)


def _rows(shapes: Mapping[str, tuple[int, ...]], place: str) -> int:
    """Vocabulary rows of the adapter for the embedding or head ``place``; 0 if it has none."""
    prefix = f"base_model.model.{place}."
    found = 0
    for name, shape in shapes.items():
        match name.removeprefix(prefix) if name.startswith(prefix) else "":
            case "weight" | "base_layer.weight" | "lora_B.weight":
                found = max(found, shape[0])
            case "lora_embedding_A":
                found = max(found, shape[1])
    return found


def _tied(lm: Any) -> bool:
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    return head is not None and head.weight is embedding.weight
