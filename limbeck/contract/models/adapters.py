"""PEFT adapters: attach one to a base, merge it for deployment.

All stages load adapters here. peft and torch are imported where they are needed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapter_files import (
    CONFIG,
    WEIGHTS,
    AdapterFacts,
    adapter_facts,
    not_saved,
)
from limbeck.contract.models.loading import require_finite
from limbeck.contract.models.patterns import require_quick
from limbeck.contract.models.probe import probe_ids, require_equal
from limbeck.contract.models.tokens import tokenizer_size

# Names of an embedding or head as it is stored whole, the last two inside a module of peft.
_WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
_MULTIPLES = (8, 16, 32, 64, 128, 256)  # that embeddings are filled up to


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
    inside = {not_saved(names): ""} if facts.shapes.keys() != set(names) else None
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
        raise _misfit(folder, facts, base, error) from error
    _require_matched(folder, facts, base, found)
    return model.eval().requires_grad_(False)


def _misfit(folder: Path, facts: AdapterFacts, base: Any, error: Exception) -> ModelError:
    """What to say of an error that peft raised while it put the adapter on ``base``."""
    problem = f"{base.config._name_or_path or 'its base'}: {_in_one_line(error)}"
    if getattr(base, "is_quantized", False):
        kind = "DoRA" if facts.config.get("use_dora") else facts.kind
        return ModelError(
            f"{folder}: peft cannot run this {kind} adapter on the quantised {problem}. Set "
            "quantize: none for this model."
        )
    return ModelError(
        f"{folder}: this adapter does not fit {problem}. Name the base that it was trained on "
        f"({facts.base}), and compare {CONFIG} with the weights beside it."
    )


def _require_matched(folder: Path, facts: AdapterFacts, base: Any, found: Any) -> None:
    """Raise `ModelError` unless file and model have the same tensors; ``found`` is peft's list."""
    # With a resized embedding, peft writes the modules that it saves twice, under two names.
    unexpected = [
        key
        for key in found.unexpected_keys
        if key.replace(".modules_to_save.", ".") not in facts.shapes.keys() - {key}
        and not _is_stored_twice(key, base, folder / WEIGHTS)
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


def _is_stored_twice(key: str, lm: Any, file: Path) -> bool:
    """Whether a tensor of the head is that of the embedding, as peft stores a tied pair."""
    import torch
    from safetensors import safe_open

    embedding, *head = _places(lm)
    twin = key.replace(f".{head[0]}.", f".{embedding}.", 1) if head else key
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        return (
            twin != key
            and {key, twin} <= names
            and torch.equal(weights.get_tensor(key), weights.get_tensor(twin))
        )


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
        # peft joins no pattern with a list, and forgets which layers a list is meant for.
        if (
            isinstance(config.target_modules, str)
            or config.layers_to_transform is not None
            or config.exclude_modules
        ):
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
    whole = [p for p in places if any(f"base_model.model.{p}.{n}" in facts.shapes for n in _WHOLE)]
    # peft trains a copy of a saved module, so the other of a tied pair gets no new rows from it.
    saved = facts.config.get("modules_to_save") or ()
    copied = {name.rpartition(".")[2] for name in saved}
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    shared = tied and any(place.rpartition(".")[2] not in copied for place in whole)
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
        tail = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if tail in (*_WHOLE, "lora_B.weight"):
            found = max(found, shape[0])
        elif tail == "lora_embedding_A":
            found = max(found, shape[1])
    return found
