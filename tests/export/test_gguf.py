"""GGUF files of tiny random models, read back by transformers and by llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from export.gguf import write
from export.gguf.architecture import ARCHITECTURES, architecture, whole_config
from export.gguf.check import open_reader
from export.gguf.tokenizer import require_known
from export.gguf.write import write_gguf
from export.plan import form_bytes
from limbeck.app.products import mistakes
from limbeck.app.trust.pack import pack
from limbeck.contract.errors import ArtifactError, ModelError, ParityError
from limbeck.contract.recipe.export import GgufQ8Form
from limbeck.contract.results.onnx import OnnxResult
from limbeck.runtime.decoder import Decoder
from tests.factory import Factory
from tests.pico import make_model, pico_recipe

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # rows of whole blocks of 32
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **WIDE,
        "num_hidden_layers": 7,  # the sixth reads the whole text
        "sliding_window": 8,
        "head_dim": 256,  # transformers reads no other attention scale from a GGUF file
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "scale": 0.1,
    },
    # transformers reads neither n_inner nor n_positions from a GGUF file
    "gpt2": {"hidden_size": 64, "n_inner": 256, "max_position_embeddings": 1024},
    "llama": {**WIDE, "tie_word_embeddings": True},
    "mistral": {**WIDE, "sliding_window": None},
    "qwen2": {**WIDE, "tie_word_embeddings": True},
    "qwen3": {**WIDE, "head_dim": 128},  # the only one that transformers reads
}
ODD = {  # what only some models of an architecture have
    "llama with biases, unequal widths and a llama3 rope": (
        "llama",
        {
            "hidden_size": 48,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3 with a linear rope": (
        "qwen3",
        {**WIDE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "more rows than tokens": ("llama", {**WIDE, "vocab_size": 288}),
}
IDS = np.random.default_rng(3).integers(0, 256, 40)


def written(folder: Path, model_type: str, form: str, **sizes: Any) -> tuple[Path, Path]:
    """A random model and its GGUF file."""
    model = make_model(folder / "model", model_type=model_type, **sizes)
    file = folder / "gguf/model.gguf"
    write_gguf(model, file, form, name="tiny", metadata={"limbeck.form": form})
    return model, file


def logits(model: Any) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(torch.from_numpy(IDS[None])).logits[0].numpy()
    return found


def read_back(file: Path) -> Any:
    """The model as transformers reads it, its configuration included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' reader
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()


@pytest.mark.parametrize("form", ["gguf-f16", "gguf-q8_0", "gguf-q4_0"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_reads_the_weights_within_the_rounding(
    tmp_path: Path, model_type: str, form: str
) -> None:
    model, file = written(tmp_path, model_type, form, **SIZES[model_type])
    loaded, original = read_back(file), AutoModelForCausalLM.from_pretrained(model).eval()
    stored = loaded.state_dict()
    for name, value in original.state_dict().items():
        largest = float(value.abs().max())
        # Half a step of the largest block (127 steps to each side, or 11 bits), and what the step
        # itself loses as a 16-bit number. In 4 bits the largest number of a block may be cut too.
        step = {"gguf-f16": largest / 1024, "gguf-q8_0": largest / 127, "gguf-q4_0": largest / 3}
        off = float((stored[name] - value).abs().max())
        assert off <= (0.55 * step[form] if value.dim() > 1 else 1e-6), name
    if form == "gguf-f16":
        scale = float(np.abs(logits(original)).max())
        assert np.abs(logits(loaded) - logits(original)).max() < 0.01 * scale


def test_four_bits_lose_less_than_in_llama_cpps_own_rounding() -> None:
    """gguf reads both; its `quantize` is llama.cpp's rounding to nearest."""
    values = np.random.default_rng(1).normal(size=(64, 96)).astype(np.float32)
    values[3], values[5, :32] = 0, 1e-9
    kind = gguf.GGMLQuantizationType.Q4_0
    stored, theirs = write._rounded(values, kind), gguf.quantize(values, kind)
    assert (stored.shape, stored.dtype) == (theirs.shape, theirs.dtype)
    ours_off, theirs_off = (
        np.square(gguf.dequantize(codes, kind) - values).reshape(-1, 32).sum(1)
        for codes in (stored, theirs)
    )
    assert (ours_off <= 1.001 * theirs_off + 1e-12).all()
    assert ours_off.sum() < 0.9 * theirs_off.sum()
    assert not gguf.dequantize(stored, kind)[3].any()


@pytest.mark.parametrize(
    ("model_type", "sizes"), [*SIZES.items(), *ODD.values()], ids=[*SIZES, *ODD]
)
def test_llama_cpp_computes_what_torch_computes(
    tmp_path: Path, model_type: str, sizes: dict[str, Any]
) -> None:
    model, file = written(tmp_path, model_type, "gguf-f16", **sizes)
    with closing(open_reader(file, model, tokens=len(IDS))) as reader:
        found = reader.logits(IDS)
    assert reader.runtime == "llama.cpp"
    expected = logits(AutoModelForCausalLM.from_pretrained(model).eval())
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def with_tokenizer(folder: Path, kind: str) -> Any:
    """Train a tokenizer of a ``kind`` that llama.cpp knows on this file, beside a model."""
    from tokenizers import Regex, decoders, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    from export.gguf.tokenizer import _LLAMA3

    split = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", "")}
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")  # of a base that was a GGUF file
    special = ["<s>", "<|end|>"]
    if kind == "spm":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet: list[str] = []
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
        cuts = {
            "gpt-2": [],
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "smollm of gguf": [digits],
        }.get(kind, [pre_tokenizers.Split(Regex(split.get(kind, "")), "isolated")])
        regex = kind not in split
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(Path(__file__).read_text("utf-8").splitlines(True), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")
    made.chat_template = "{{ messages[0]['content'] }}"
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "smollm of gguf", "llama-bpe", "qwen2", "spm"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / "model", **WIDE, vocab_size=700)
    tokenizer = with_tokenizer(model, kind)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "gguf-q8_0", name="tiny", metadata={})
    texts = [
        "def written(folder: Path) -> str:\n    return 'x' * 2048\n\n",
        "It's 12345 o'clock;  don't   wait\t… grüße <|end|> 日本",
    ]
    with closing(open_reader(file, model, tokens=8)) as reader:
        assert reader.encode is not None
        for text in texts:
            assert reader.encode(text, True) == tokenizer(text)["input_ids"]
    template = GGUFReader(file).fields["tokenizer.chat_template"].contents()
    assert template == tokenizer.chat_template


def test_files_lie_beside_the_graphs_and_are_scored(tiny: Factory, tmp_path: Path) -> None:
    forms = ["fp32", "int8-weight", "gguf-q8_0", "gguf-f16"]
    onnx = tiny.exported("llama", forms)
    result = OnnxResult.of(onnx)
    assert result.shipped == "int8-weight"
    assert not result.failed
    assert set(result.ggufs) == {"gguf-q8_0", "gguf-f16"}
    eight, half = result.ggufs["gguf-q8_0"], result.ggufs["gguf-f16"]
    assert onnx.manifest["files"][eight.file]["bytes"] == eight.bytes < half.bytes
    assert 0 < half.parity["kl"] < eight.parity["kl"] < 0.03
    assert eight.file in (onnx.path / "README.md").read_text("utf-8")

    with pytest.raises(ArtifactError, match=f"gguf-q8_0 is a GGUF file, {eight.file}; run it with"):
        Decoder(onnx.path, form="gguf-q8_0")

    packed = pack(onnx.path, out=tmp_path / "one", form="gguf-q8_0")
    names = {p.relative_to(packed.folder).as_posix() for p in packed.folder.rglob("*.*")}
    assert eight.file in names
    assert not any(name.endswith(".onnx") for name in names)
    shipped = pack(onnx.path, out=tmp_path / "two")
    assert not list(shipped.folder.rglob("*.gguf"))


def test_a_plan_knows_the_size(tmp_path: Path) -> None:
    for model_type, sizes in SIZES.items():
        model, file = written(tmp_path / model_type, model_type, "gguf-q8_0", **sizes)
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        planned = form_bytes(empty, GgufQ8Form(kind="gguf-q8_0"))
        assert abs(planned - file.stat().st_size) < 12_000, model_type  # metadata and tokens


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt_neox"}, "of a gpt_neox model"),
        ({"model_type": "mistral"}, "sliding window of 4096 tokens"),
        ({"model_type": "llama", "hidden_act": "relu"}, "activation relu"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "layer's number"),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
            },
            "rope of kind yarn",
        ),
        (
            {
                "model_type": "qwen2",
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                },
            },
            "partial rope",
        ),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "unscaled attention"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention bias"),
        ({"model_type": "qwen2", "head_dim": 64}, "heads of 2048 numbers in layers of 4096 there"),
        ({"model_type": "gemma3_text", "attention_bias": True}, "attention bias"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 64}, "attention scale 64 "),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "both directions"),
        (
            {
                "model_type": "gemma3_text",
                "num_hidden_layers": 6,
                "layer_types": ["full_attention", *["sliding_attention"] * 5],
            },
            "other order of windows than one full layer in 6",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
                },
            },
            "rope_theta 50000.0 in layers with a window",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        architecture(whole_config(config))


@pytest.mark.parametrize(
    ("over", "cuts", "named"),
    [
        ({"byte_fallback": True}, pre_tokenizers.Digits(), r"of a tokenizer with \['Digits'\]"),
        ({}, None, r"the way it cuts text \(not at all\)"),
        ({}, pre_tokenizers.Split(" ", "isolated"), r"the way it cuts text \(Split\)"),
        ({}, pre_tokenizers.Digits(), r"the way it cuts text \(Digits\)"),
        ({"ignore_merges": True}, pre_tokenizers.ByteLevel(), r"cuts text \(bytes\)"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_know_are_refused(
    over: dict[str, Any], cuts: Any, named: str
) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **over))
    if cuts is not None:
        tokenizer.pre_tokenizer = cuts
    with pytest.raises(ModelError, match=rf"{named}.* Leave the gguf forms out of export.forms"):
        require_known(json.loads(tokenizer.to_str()))


def test_validate_refuses_before_training(tmp_path: Path) -> None:
    base: dict[str, Any] = {"kind": "random", "config": {"model_type": "gpt_neox"}}
    recipe = pico_recipe(
        student={"kind": "lora", "base": base}, export={"forms": ["fp32", "gguf-q8_0"]}
    )
    assert any("no GGUF can be written of a gpt_neox" in line for line in mistakes(recipe))
    for kind, sizes, named in (
        ("gemma3_text", {"layers": 4}, "no model of 4 layers, none of which reads the whole text"),
        ("gemma3_text", {"layers": 6}, None),
        ("qwen2", {"hidden_size": 32}, "no heads of 64 numbers in layers of 32 there"),
        ("llama", {"hidden_size": 32, "kv_heads": 1}, None),
    ):
        base["config"] = {"model_type": kind, **WIDE, **_HEADS} | (
            {"query_pre_attn_scalar": 16, "num_hidden_layers": 7} if kind == "gemma3_text" else {}
        )
        recipe = pico_recipe(
            student={"kind": "shrink", "base": base} | sizes,
            export={"forms": ["fp32", "gguf-q8_0"]},
        )
        found = [line for line in mistakes(recipe) if "GGUF" in line]
        assert len(found) == bool(named)
        assert named is None or named in found[0]
    with pytest.raises(ModelError, match="Unigram tokenizer"):
        require_known({"model": {"type": "Unigram"}})


def test_a_wrong_file_is_not_kept(tiny: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.gguf import write

    def swapped(arch: str, tensor: str, value: Any, config: Any) -> Any:
        return -value if "down_proj" in tensor else value

    monkeypatch.setattr(write.known, "as_llama_cpp", swapped)
    onnx = tiny.exported("llama", ["fp32", "gguf-f16"], seed=5)
    result = OnnxResult.of(onnx)
    assert not result.ggufs
    assert "does not compute what the student computes" in result.failed["gguf-f16"]
    assert not list(onnx.path.rglob("*.gguf"))


@pytest.mark.parametrize("form", ["gguf-q8_0", "gguf-q4_0"])
def test_a_wrong_scale_is_found_in_the_weights(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 4 bits the logits of a sound file are as far off as those of this one."""
    written(tmp_path / "sound", "llama", form, **SIZES["llama"])
    real, narrow = write._rounded, (WIDE["hidden_size"], WIDE["intermediate_size"])
    monkeypatch.setattr(
        write, "_rounded", lambda a, kind: real(a * 2 if a.shape == narrow else a, kind)
    )
    with pytest.raises(ParityError, match=r"ffn_down.weight: 1\S* of its size, limit 0.5"):
        written(tmp_path / "broken", "llama", form, **SIZES["llama"])


def test_without_llama_cpp_transformers_reads_a_file_back(
    tiny: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "cyllama" else real(name, *more),
    )
    onnx = tiny.exported("qwen3", ["fp32", "gguf-q8_0"])
    made = OnnxResult.of(onnx).ggufs["gguf-q8_0"]
    assert made.runtime == "transformers"
    assert 0 < made.parity["kl"] < 0.03
