"""Rows of inputs that differ from the usual ones in one thing, held to transformers and peft."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, RandLoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from compress.data.blocks import conversations
from compress.data.documents import documents
from compress.models.language import load_model, random_model
from limbeck.contract.recipe import ChatRows, Rows
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.contract.sources.weights import check_weights
from serve_bench.worker.runtimes import TorchEager
from tests.pico import make_tokenizer
from tests.wild.cases.adapters import (
    IDS,
    SIZES,
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    teacher,
)
from tests.wild.cases.row import Row, loss, said

_Q = ["q_proj", "v_proj"]
_NAMES = {  # of tensors in an adapter's file: what is replaced
    "an adapter called expert": (r"\.(lora_[AB])\.", r".\1.expert."),
    "torch.compile": (r"^base_model\.model\.", "base_model.model._orig_mod."),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "use_cache: false": {"use_cache": False},
    "torch_dtype of transformers 4": {"torch_dtype": "float16", "dtype": None},
    "rope_scaling with type, as transformers 4.30": {
        "rope_parameters": None, "rope_theta": 5e4,
        "rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_scaling of llama3": {
        "rope_parameters": None, "rope_theta": 5e4, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
    "no architectures, transformers 4.28": {
        "architectures": None, "transformers_version": "4.28.0"},
    "several end tokens, no begin": {"eos_token_id": [256, 257], "bos_token_id": None},
    "pad_token_id: -1": {"pad_token_id": -1},
}  # fmt: skip


def variants(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    yield from _adapters(root / "adapters of other forms")
    yield from _models(root / "models of other forms")
    yield from _tokenizers(root / "tokenizers of other forms")
    yield from _texts(root / "texts of other forms")


def _configs() -> dict[str, Any]:
    """Of adapters; peft warns of some when they are made."""
    return {
        "VeRA without its projections": VeraConfig(
            target_modules=["q_proj"], save_projection=False
        ),
        "RandLora without its bases": RandLoraConfig(target_modules=_Q[:1], save_projection=False),
        "VB-LoRA with its best indices only": VBLoRAConfig(
            target_modules=_Q, vector_length=16, num_vectors=8, topk=2, save_only_topk_weights=True
        ),
        "modules_to_save: [model.norm]": LoraConfig(
            target_modules=_Q, modules_to_save=["model.norm"]
        ),
        "a pattern of targets and one of exclusions": LoraConfig(
            target_modules=r".*layers\.[01]\..*proj", exclude_modules=r".*down_proj"
        ),
        "layers_pattern": LoraConfig(
            target_modules=_Q, layers_to_transform=[1], layers_pattern="layers"
        ),
        "rank_pattern from the first letter on, rslora": LoraConfig(
            target_modules=_Q,
            rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 3},
            alpha_pattern={"layers.1.*q_proj": 5},
            use_rslora=True,
        ),
        "trainable tokens of the embedding and of the head": LoraConfig(
            target_modules=_Q, trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]}
        ),
    }


def _adapters(root: Path) -> Iterator[Row]:
    base = make_base(root / "base", tied=False)

    def row(what: str, adapter: Path, right: Any = None) -> Row:
        theirs = peft_logits(base, adapter) if right is None else right
        (ours,) = our_logits([teacher("one", base, adapter)])
        return Row(f"adapter: {what}", loss(ours), loss(theirs))

    for number, (what, config) in enumerate(_configs().items()):
        yield row(what, make_adapter(base, root / f"{number}", config, seed=number))
    plain = LoraConfig(target_modules=_Q)
    for what, (old, new) in _NAMES.items():
        adapter = make_adapter(base, root / what, plain)
        right = peft_logits(base, adapter)
        _rename(adapter / "adapter_model.safetensors", lambda n, o=old, w=new: re.sub(o, w, n))
        yield row(f"names of {what}, as peft gives them back", adapter, right)
    old_dora = make_adapter(base, root / "dora", LoraConfig(target_modules=_Q, use_dora=True))
    right = peft_logits(base, old_dora)
    _rename(old_dora / "adapter_model.safetensors", lambda n: n.replace("vector.weight", "vector"))
    yield row("DoRA as peft 0.10 named its magnitudes", old_dora, right)
    half = make_adapter(base, root / "half", plain)
    file = half / "adapter_model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file)
    yield row("in bf16", half)
    trainer = make_adapter(base, root / "Übung/checkpoint-500", plain)
    make_tokenizer().save_pretrained(trainer)
    (trainer / "trainer_state.json").write_text("{}")
    (trainer / "optimizer.pt").write_bytes(b"pickle")
    yield row("a Trainer's checkpoint-500, below a folder with an umlaut", trainer)
    blobs, links = root / "hub/blobs", root / "hub/snapshots/c0ffee"
    shutil.copytree(half, blobs)
    links.mkdir(parents=True)
    for path in sorted(blobs.iterdir()):
        (links / path.name).symlink_to(path.rename(blobs / f"{len(path.name):x}{path.stem[-3:]}"))
    yield row("a snapshot of a hub's cache, all of links", links)


def _models(root: Path) -> Iterator[Row]:
    def row(what: str, folder: Path) -> Row:
        (ours,) = our_logits([teacher("one", folder, None)])
        with torch.no_grad():
            return Row(f"model: {what}", loss(ours), loss(load(folder)(input_ids=IDS).logits))

    for number, (what, fields) in enumerate(_CONFIGS.items()):
        folder = make_base(root / f"{number}", tied=False)
        config = json.loads((folder / "config.json").read_text()) | fields
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        yield row(what, folder)
    names: dict[str, Callable[[str], str]] = {
        "weights without their first word": lambda name: name.removeprefix("model."),
        "weights in a wrapper of torch.compile": lambda name: f"_orig_mod.{name}",
    }
    bare, wrapped = (make_base(root / what, tied=True) for what in names)
    _rename(bare / "model.safetensors", names["weights without their first word"])
    yield row("weights without their first word", bare)
    _rename(wrapped / "model.safetensors", names["weights in a wrapper of torch.compile"])
    yield Row(
        "model: weights in a wrapper of torch.compile",
        said(lambda: load_model(wrapped)),
        "random weights, and a warning",
        r"saved with its wrapper .*model\._orig_mod\.save_pretrained",
    )
    for form in ("gptq", "awq", "compressed-tensors"):
        folder = make_base(root / form, tied=True)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": form, "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        yield Row(
            f"model: stored as {form}, of plain weights",
            said(lambda folder=folder: check_weights(folder)),
            said(lambda folder=folder: load(folder)),
            rf"quantization_config \({form}\), but the weights are plain numbers of type F32",
        )
    ends = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], 0)
    gpt = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    for kind, sizes in {"mamba": {"state_size": 8}, "openai-gpt": gpt}.items():
        fields = SIZES | ends | sizes | {"hidden_size": 32, "num_hidden_layers": 2}
        model: Any = random_model(fields | {"model_type": kind}, vocab_size=258, seed=1, where=kind)
        draw = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        model.save_pretrained(root / kind)
        arm = TorchEager(model=str(root / kind), threads=1)
        found = [arm.begin(IDS[:, :6].numpy(), 4)]
        for _ in range(3):
            found.append(arm.step(found[-1]))
        theirs = load(root / kind).generate(
            IDS[:, :6], do_sample=False, max_new_tokens=4, use_cache=False, eos_token_id=None
        )
        yield Row(
            f"bench: {kind}, which keeps no keys and values",
            str(torch.tensor([step.tolist() for step in found]).T.tolist()),
            str(theirs[:, 6:].tolist()),
        )


def _tokenizers(root: Path) -> Iterator[Row]:
    text = "The cat  sat, 12 <one> naïve"

    def row(what: str, folder: Path) -> Row:
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        ids = [*ours.backend_tokenizer.encode(text).ids, ours.eos_token_id]
        return Row(f"tokenizer: {what}", str(ids), str([*theirs(text)["input_ids"], 256]))

    def edited(name: str, **fields: Any) -> Path:
        folder = make_base(root / name, tied=True, vocab_size=300)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    token = {"content": "<one>", "special": True, "lstrip": True, "rstrip": False,
             "single_word": False, "normalized": False}  # fmt: skip
    yield row(
        "a token in added_tokens_decoder alone",
        edited("decoder", added_tokens_decoder={"258": token}),
    )
    yield row("additional_special_tokens", edited("more", additional_special_tokens=["<one>"]))
    yield row(
        "padding on the left, short texts", edited("left", padding_side="left", model_max_length=8)
    )
    yield row(
        "byte level that calls itself Llama's", edited("llama", tokenizer_class="LlamaTokenizer")
    )
    folder = edited("map")
    names = ("eos_token", "bos_token", "pad_token")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "special_tokens_map.json").write_text(json.dumps({n: config[n] for n in names}))
    (folder / "tokenizer_config.json").unlink()
    yield row("special_tokens_map.json alone", folder)


def _texts(root: Path) -> Iterator[Row]:
    root.mkdir()
    tokenizer = make_tokenizer()

    def talk(*turns: str) -> str:
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def read(row: Any, **fields: Any) -> str:
        path, form = root / "rows.jsonl", ChatRows(kind="chat", **fields)
        path.write_text(json.dumps(row))
        return " ".join(piece.text for piece in conversations(path, form, tokenizer))

    alpaca = {"instruction": "say", "input": "hi", "output": "a", "history": [["q", "b"]]}
    asked = {"field": "output", "prompt": "instruction"}
    yield Row(
        "text: Alpaca with input and history", read(alpaca, **asked), talk("q", "b", "say\nhi", "a")
    )
    dolly = {"instruction": "say", "context": "hi", "response": "a"}
    asked = {"field": "response", "prompt": "instruction"}
    yield Row("text: Dolly with a context", read(dolly, **asked), talk("say\nhi", "a"))
    lost = {"question": "who", "context": "it is he", "answer": "he"}
    yield Row(
        "text: a context beside a question",
        said(lambda: read(lost, field="answer", prompt="question")),
        "-",
        "line 1: context beside question would not be learned from; join both",
    )
    bad = {"prompt": "q", "completion": "bad", "label": False}
    yield Row("text: an answer that KTO marks as bad", read(bad, field="completion"), "")
    (root / "a.csv").write_text('\ufeffid,text\r\n1,"a, ""b""\nc"\r\n', "utf-8")
    yield Row(
        "text: a table as Excel saves it",
        str(list(documents(root / "a.csv", Rows(kind="rows")))),
        str(['a, "b"\nc']),
    )


def _rename(file: Path, new: Callable[[str], str]) -> None:
    weights = {new(name): weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
