"""Short causal attention against torch's own, through whole models: values, gradients, and what it
leaves alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.models import attention
from compress.models.attention import LONGEST, NAME, use_short_attention
from compress.models.language import load_model
from compress.models.students import with_lora
from limbeck.contract.recipe import LoraStudent, RandomModel
from tests.architectures import SIZES
from tests.pico import make_model


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that went to torch's kernel."""
    calls: list[tuple[int, ...]] = []
    original = attention.sdpa_attention_forward

    def spy(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(tuple(query.shape))
        return original(module, query, *rest, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return calls


def gradient(
    model: Any, ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and a loss's gradient at the first key projection (or at the embedding)."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(ids).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    keys = [
        p
        for n, p in model.named_parameters()
        if "k_proj" in n or "c_attn" in n or "query_key_value" in n
    ]
    return logits.detach(), keys[0].grad.clone()


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "granite", "gpt2", "gpt_neox", "smollm3", "opt"]
)
def test_it_is_attention_of_every_architecture(
    model_type: str, tmp_path: Path, fused: list[Any]
) -> None:
    """Its bf16 is as near to fp32 as torch's bf16 is, in value and gradient."""
    model = load_model(
        make_model(tmp_path, model_type=model_type, **SIZES[model_type])
    ).requires_grad_(True)
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    exact, theirs = gradient(model, ids, torch.float32), gradient(model, ids, torch.bfloat16)
    use_short_attention(model)
    ours = gradient(model, ids, torch.bfloat16)
    assert not fused, "it did not run"
    for mine, other, reference in zip(ours, theirs, exact, strict=True):
        scale = reference.norm()
        assert (
            float((mine - reference).norm() / scale)
            < 1.5 * float((other - reference).norm() / scale) + 1e-3
        )


def test_fp32_long_blocks_and_masks_are_torchs(tmp_path: Path, fused: list[Any]) -> None:
    """What it does not handle comes out as without it, bit by bit."""
    folder = make_model(tmp_path, max_position_embeddings=1024, num_key_value_heads=2)
    plain, model = load_model(folder), load_model(folder)
    use_short_attention(model)
    ids = torch.randint(0, 256, (1, LONGEST + 1))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"input_ids": ids[:, :64]}, False),
        ({"input_ids": ids}, True),
        ({"input_ids": ids[:, :40].view(2, 20), "attention_mask": mask}, True),
    ]
    for inputs, bf16 in cases:
        fused.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            torch.testing.assert_close(
                model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0
            )
        assert len(fused) == model.config.num_hidden_layers


def test_sliding_windows_are_kept(tmp_path: Path, fused: list[Any]) -> None:
    """A window shorter than the block comes as a mask, so torch's kernel runs; a longer one makes
    no difference.
    """
    model = load_model(make_model(tmp_path, model_type="mistral", sliding_window=8))
    use_short_attention(model)
    for length, expected in ((7, 0), (9, model.config.num_hidden_layers)):
        fused.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randint(0, 256, (1, length)))
        assert len(fused) == expected


def test_it_is_not_written_into_a_saved_model(tmp_path: Path) -> None:
    """Whoever loads the student gets transformers' default."""
    model = load_model(make_model(tmp_path / "model"))
    use_short_attention(model)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text()
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation
        == "sdpa"
    )
    assert AutoConfig.from_pretrained(tmp_path / "saved")._attn_implementation != NAME


def test_eager_models_stay_eager(tmp_path: Path) -> None:
    """A model that was asked for another implementation keeps it."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), attn_implementation="eager")
    use_short_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_lora_without_casts_gives_the_same_bits(tmp_path: Path) -> None:
    """peft casts what enters an adapter to fp32, and autocast casts it back: leaving both out
    changes nothing.
    """
    folder = make_model(tmp_path)
    config = LoraStudent(kind="lora", base=RandomModel(kind="random", config={}), rank=4)
    ids = torch.randint(0, 256, (2, 16))
    found = []
    for casts in (True, False):
        model = with_lora(load_model(folder), config, 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(1)
                )
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                assert not module.cast_input_dtype_enabled
                module.cast_input_dtype_enabled = casts
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids).logits.float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for with_casts, without in zip(*found, strict=True):
        assert with_casts is not None
        torch.testing.assert_close(with_casts, without, rtol=0, atol=0)
