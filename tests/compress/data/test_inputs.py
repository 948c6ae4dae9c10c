"""Models and tokenizers that the distillation is given: right, refused, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.models.body import Body, head_of
from compress.models.language import (
    byte_tokenizer,
    cast_frozen,
    load_model,
    model_folder,
    random_model,
)
from compress.models.students import with_lora
from limbeck.contract.errors import DataError, EnvironmentalError, ModelError
from limbeck.contract.recipe import LoraStudent, RandomModel
from limbeck.contract.sources.tokenizer import require_same_tokenizer
from tests.compress.test_compress import TINY, tiny
from tests.pico import make_model


def test_different_tokenizers_are_refused_with_count_and_examples(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    byte_tokenizer().save_pretrained(tmp_path / "a")
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "hello": 1}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "b"
    )
    for folder in ("a", "b"):
        random_model(TINY, vocab_size=257, seed=0, where="t").save_pretrained(tmp_path / folder)
    with pytest.raises(
        ModelError,
        match=r"257 of 258 tokens have another id or are missing "
        r"\('.*' is .* in x and .* in y; .*; .*\)",
    ):
        require_same_tokenizer({"x": tmp_path / "a", "y": tmp_path / "b"})
    teachers = [
        {"name": n, "model": {"kind": "local", "path": str(tmp_path / n)}} for n in ("a", "b")
    ]
    with pytest.raises(
        ModelError, match=r"teacher b: its tokenizer is WordLevel.*cannot be aligned"
    ):
        compress.distill(recipe=tiny(tmp_path, teachers=teachers), out=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def folder_without(path: Path, *files: str) -> Path:
    byte_tokenizer().save_pretrained(path)
    random_model(TINY, vocab_size=257, seed=0, where="t").save_pretrained(path)
    for file in files:
        (path / file).unlink()
    return path


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("model.safetensors", None, r"no weights; expected \*.safetensors"),
        (
            "model.safetensors",
            "pytorch_model.bin",
            r"pytorch_model.bin is a pickle.*safetensors and GGUF only",
        ),
        ("config.json", None, "no config.json"),
        ("tokenizer.json", None, "no tokenizer; expected tokenizer.json beside config.json"),
    ],
)
def test_unusable_teacher_folders_are_refused(
    tmp_path: Path, remove: str, add: str | None, message: str
) -> None:
    folder = folder_without(tmp_path / "model", remove)
    if add:
        (folder / add).write_bytes(b"\x80\x04.")
    recipe = tiny(tmp_path, teachers=[{"name": "a", "model": {"kind": "local", "path": "model"}}])
    with pytest.raises(ModelError, match=message):
        compress.distill(recipe=recipe, out=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_incomplete_weights_are_never_made_up(tmp_path: Path) -> None:
    """Transformers fills what is missing with random numbers; what is tied to something that is
    there is not missing.
    """
    folder = tmp_path / "model"
    config = {**TINY, "tie_word_embeddings": False}

    def written(config: dict[str, Any], body: bool = False) -> Path:
        model: Any = random_model(config, vocab_size=257, seed=0, where="t")
        (model.model if body else model).save_pretrained(folder)
        return folder

    with pytest.raises(
        ModelError,
        match=r"model: .*lacks 1 of its weights \(for example lm_head.weight\)\. Save the whole",
    ):
        load_model(written(config, body=True))
    load_model(written(TINY, body=True))  # its head is the embedding
    path = written(config) / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"num_hidden_layers": 3}))
    with pytest.raises(
        ModelError,
        match=r"lacks 9 of its weights \(for example model.layers.2.input_layernorm.weight, ",
    ):
        load_model(folder)
    path.write_text(json.dumps(saved | {"intermediate_size": 40}))
    with pytest.raises(
        ModelError,
        match=r"6 of its weights do not fit .*down_proj.weight is 32x48, expected 32x40; .*config",
    ):
        load_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ModelError,
        match=r"model: its weights cannot be read \(.*\); copy or download the folder again",
    ):
        load_model(folder)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_an_adapter_that_was_cut_short_is_named(tmp_path: Path) -> None:
    base = RandomModel(kind="random", config=TINY, seed=1)
    model = load_model(model_folder(base, folder=tmp_path))
    with_lora(model, LoraStudent(kind="lora", base=base, rank=4), 0).save_pretrained(
        tmp_path / "adapter"
    )
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    teacher = {"name": "a", "model": base.model_dump(mode="json"), "adapter": "adapter"}
    with pytest.raises(ModelError, match=r"this adapter's weights cannot be read .*deserializing"):
        compress.distill(recipe=tiny(tmp_path, teachers=[teacher]), out=tmp_path / "student")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_adapters_know_that_gpt2_stores_its_weights_turned(tmp_path: Path) -> None:
    """Left to find out by itself PEFT warns, which is an error here."""
    folder = make_model(tmp_path / "gpt2", model_type="gpt2", n_embd=32, n_head=2)
    config = LoraStudent(kind="lora", base=RandomModel(kind="random", config={}), rank=4)
    adapted = with_lora(load_model(folder), config, 0)
    shapes = {n: p.shape for n, p in adapted.named_parameters() if "lora_A" in n and "c_fc" in n}
    assert {tuple(shape) for shape in shapes.values()} == {(4, 32)}
    with pytest.raises(
        ModelError, match=r"student.targets: .* Linear layers of this model: .*c_attn"
    ):
        with_lora(load_model(folder), config.model_copy(update={"targets": ("q_proj",)}), 0)


def test_other_bad_inputs(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentalError, match="torch sees no GPU here"):
            compress.distill(
                recipe=tiny(tmp_path, training={"device": "cuda"}), out=tmp_path / "student"
            )
    with pytest.raises(ModelError, match="no such file or folder"):
        compress.distill(
            recipe=tiny(
                tmp_path, teachers=[{"name": "a", "model": {"kind": "gguf", "path": "x.gguf"}}]
            ),
            out=tmp_path / "s",
        )
    (tmp_path / "empty").mkdir()
    adapter = [{"name": "a", "model": {"kind": "random", "config": TINY}, "adapter": "empty"}]
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        compress.distill(recipe=tiny(tmp_path, teachers=adapter), out=tmp_path / "s")
    with pytest.raises(
        ModelError, match=r"student.targets: .* Linear layers of this model: .*q_proj"
    ):
        compress.distill(
            recipe=tiny(tmp_path, student={"targets": ["nowhere"]}), out=tmp_path / "s"
        )
    domains = [{"name": "x", "text": {"kind": "files", "paths": ["missing.txt"]}}]
    with pytest.raises(DataError, match="no such file"):
        compress.distill(recipe=tiny(tmp_path, data={"domains": domains}), out=tmp_path / "s")
    with pytest.raises(ModelError, match="no model_type"):
        compress.distill(
            recipe=tiny(tmp_path, teachers=[], student={"base": {"kind": "random", "config": {}}}),
            out=tmp_path / "s",
        )


def test_heads_respect_logit_scale_and_soft_cap() -> None:
    for config, scale, cap in (
        ({**TINY, "model_type": "granite", "logits_scaling": 4.0}, 0.25, None),
        (
            {**TINY, "model_type": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 16},
            1.0,
            3.0,
        ),
    ):
        model = random_model(config, vocab_size=257, seed=0, where="t").eval()
        head = head_of(model)
        assert (head.scale, head.softcap) == (scale, cap)
        ids = torch.arange(9)[None]
        hidden, _ = Body(model).states(ids)
        torch.testing.assert_close(
            head.logits(hidden), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft 0.21.2 with transformers 5.23
def test_frozen_matrices_cast_once_give_the_same_bits(tmp_path: Path) -> None:
    """A LoRA student under bf16 autocast: states and gradients do not change when its frozen
    matrices are cast before.
    """
    from compress.models.students import build_model

    recipe = tiny(tmp_path, student={"dropout": 0.0})
    folder = model_folder(recipe.student.base, folder=tmp_path)
    ids = torch.randint(0, 257, (2, 16))
    found = []
    for cast in (False, True):
        model, _, _ = build_model(recipe, folder=folder, calibration=[], device=torch.device("cpu"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        if cast:
            cast_frozen(model, torch.bfloat16)
            frozen = [p for n, p in model.named_parameters() if "base_layer.weight" in n]
            assert len(frozen) == 14
            assert all(p.dtype == torch.bfloat16 for p in frozen)
            assert Body(model).head.weight_Vd.dtype == torch.float32  # tied with the embedding
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = Body(model).states(ids)
        hidden.float().square().sum().backward()
        found.append([hidden, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
