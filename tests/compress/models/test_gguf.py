"""GGUF files of other programs are the models that they were written from.

The right logits are those of transformers on the model before it was written, and llama.cpp's.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import TokenType
from transformers import AutoConfig, AutoModelForCausalLM

from compress.models.gguf_config import gguf_config
from compress.models.language import folder_config, load_model, model_folder
from export.folder.ends import end_tokens
from export.gguf.architecture import as_llama_cpp
from export.gguf.llama_cpp import LlamaCpp
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import GgufModel
from tests.pico import make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
IDS = np.random.default_rng(3).integers(0, 256, 40)
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
_OFFSET = ("gemma2", "gemma3", "nemotron")  # llama.cpp's norms multiply by the weight alone
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
_HEAD32 = {"attention.key_length": 32, "attention.value_length": 32}
_LONG = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
_WINDOWS = {"head_dim": 32, "sliding_window": 8, "num_hidden_layers": 7}
_WINDOW_KEYS = _HEAD32 | {"attention.sliding_window": 8}


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | fields}


# By name: transformers' architecture, llama.cpp's, fields of the model, further metadata (None:
# left out), and further tensors.
CASES: dict[str, tuple[Any, ...]] = {
    "llama, a rope divided": (
        "llama", "llama", rope(rope_type="linear", factor=2.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    "llama, by a factor alone": (
        "llama", "llama", rope(rope_type="linear", factor=4.0), {"rope.scaling.factor": 4.0}),
    "llama, by an old key": (
        "llama", "llama", rope(rope_type="linear", factor=2.0), {"rope.scale_linear": 2.0}),
    "llama, by nothing": (
        "llama", "llama", rope(), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama, yarn": ("llama", "llama", rope(**_YARN), _YARN_KEYS),
    "llama, yarn with its own scale": (
        "llama", "llama", rope(**_YARN, attention_factor=1.5 * (1 + 0.1 * math.log(4))),
        _YARN_KEYS | {"rope.scaling.attn_factor": 1.5}),
    "llama, heads of their own each, not counted": (
        "llama", "llama", {"num_key_value_heads": 4}, {"attention.head_count_kv": None}),
    "llama, biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, no base of the rope": ("llama", "llama", rope(), {"rope.freq_base": None}),
    "llama, a window wider than the context": (
        "llama", "llama", {}, {"attention.sliding_window": 4096}),
    "llama, factors of 1": ("llama", "llama", {}, {}, {"rope_freqs.weight": [1.0] * 8}),
    "qwen2, yarn": ("qwen2", "qwen2", rope(**_YARN, rope_theta=1e6), _YARN_KEYS),
    "qwen2, heads not counted": (
        "qwen2", "qwen2", {"num_key_value_heads": 4}, {"attention.head_count_kv": None}),
    "qwen3, narrow heads": ("qwen3", "qwen3", {"head_dim": 32}, _HEAD32),
    "qwen2_moe": (
        "qwen2_moe", "qwen2moe", _EXPERTS | {"shared_expert_intermediate_size": 64},
        _EXPERT_KEYS | {"expert_shared_feed_forward_length": 64}),
    "qwen3_moe": (
        "qwen3_moe", "qwen3moe", _EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
        _EXPERT_KEYS | _HEAD32),
    "gemma2": (
        "gemma2", "gemma2",
        _WINDOWS | {"query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0,
                    "attn_logit_softcapping": 3.0},
        _WINDOW_KEYS | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3, a rope divided": (
        "gemma3_text", "gemma3",
        _WINDOWS | {
            "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        _WINDOW_KEYS | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
                        "rope.freq_base": 1e6}),
    "phi3, a part of each head turned": (
        "phi3", "phi3", rope(partial_rotary_factor=0.5),
        {"rope.dimension_count": 8, "rope.scaling.original_context_length": 64}),
    "phi3, longrope": (
        "phi3", "phi3",
        {"original_max_position_embeddings": 16} | rope(
            rope_type="longrope", long_factor=_LONG, short_factor=[1.0] * 8,
            original_max_position_embeddings=16, attention_factor=1.2),
        {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.2},
        {"rope_factors_long.weight": _LONG, "rope_factors_short.weight": [1.0] * 8}),
    "starcoder2": ("starcoder2", "starcoder2", rope(rope_theta=1e6) | {"norm_epsilon": 1e-3}, {}),
    "stablelm": (
        "stablelm", "stablelm", rope(partial_rotary_factor=0.5, rope_theta=1e5),
        {"rope.dimension_count": 8, "use_parallel_residual": False}),
    "nemotron": (
        "nemotron", "nemotron",
        rope(partial_rotary_factor=0.5) | {"norm_eps": 1e-3, "head_dim": 16},
        {"rope.dimension_count": 8}),
}  # fmt: skip
QUICK = ("llama, a rope divided", "llama, yarn", "llama, biases", "phi3, longrope", "gemma2")
EACH = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


def written(file: Path, model: Any, arch: str, keys: dict[str, Any], more: Any = ()) -> Path:
    """The model as convert_hf_to_gguf.py writes it, with ``keys`` and tensors that are given.

    A key that begins with a slash is not the architecture's.
    """
    writer, config = gguf.GGUFWriter(file, arch), model.config
    epsilon = next(name for name in _EPSILONS if hasattr(config, name))
    kind = "layer_norm_rms_epsilon" if epsilon == "rms_norm_eps" else "layer_norm_epsilon"
    of_rope = config.rope_parameters
    said = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.{kind}": getattr(config, epsilon),
        "rope.freq_base": float(of_rope.get("rope_theta", 0)),
    } | keys
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in said.items():
        if value is not None:
            name = key[1:] if key.startswith("/") else f"{arch}.{key}"
            adders.get(type(value), writer.add_bool)(name, value)
    vocabulary = make_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["\ue000 \ue001"])
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(257)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        value = tensor.numpy()
        layer = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(value, 2, 1), strict=True):
                writer.add_tensor(f"{layer}.ffn_{part}_exps.weight", np.ascontiguousarray(half))
            continue
        if name.endswith("experts.down_proj"):
            target = f"{layer}.ffn_down_exps.weight"
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        if arch in _OFFSET and "norm" in name and name.endswith("weight"):
            value = value + 1
        elif arch == "llama":
            value = as_llama_cpp(arch, name, value, config.to_dict())
        writer.add_tensor(target, np.ascontiguousarray(value))
    for name, values in dict(more).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def case(name: str, folder: Path) -> tuple[Any, Path]:
    """The model of a case, with random weights, and its file."""
    model_type, arch, fields, keys, *more = CASES[name]
    torch.manual_seed(1)
    made = AutoConfig.for_model(model_type, **SIZES | fields)
    model = AutoModelForCausalLM.from_config(made).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # of norms and biases
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model, written(folder / "a.gguf", model, arch, keys, *more)


def logits(model: Any) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(torch.from_numpy(IDS[None])).logits[0].numpy()
    return found


def read(file: Path) -> Any:
    return load_model(model_folder(GgufModel(kind="gguf", path=file), folder=file.parent))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore")  # of transformers' reader
@pytest.mark.parametrize("name", EACH)
def test_a_file_is_read_as_the_model_that_it_was_written_from(tmp_path: Path, name: str) -> None:
    model, file = case(name, tmp_path)
    right = logits(model)
    found = read(file)
    assert np.abs(logits(found) - right).max() < 1e-4 * np.abs(right).max()
    of_file, of_folder = folder_config(file).to_dict(), found.config.to_dict()
    for field in ("head_dim", "rope_parameters", "sliding_window", "num_key_value_heads"):
        assert of_file.get(field) == of_folder.get(field)  # `plan` sees what a run computes


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_reads_that_model_too(tmp_path: Path, name: str) -> None:
    """So the files above are such as other programs write."""
    pytest.importorskip("cyllama", reason="llama.cpp is not installed")
    model, file = case(name, tmp_path)
    right = logits(model)
    with closing(LlamaCpp(file, 64)) as theirs:
        assert np.abs(theirs.logits(IDS) - right).max() < 0.02 * np.abs(right).max()


def small(**fields: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | fields)).eval()


@pytest.mark.parametrize(
    ("size", "asked"),
    [
        (128, {"factor": 8.0, "rope_theta": 5e5}),  # Llama 3.1
        (64, {"factor": 32.0, "rope_theta": 5e5}),  # Llama 3.2
        (64, {"factor": 4.0, "low_freq_factor": 2.0, "rope_theta": 1e4}),
        (64, {"factor": 4.0, "high_freq_factor": 2.0, "rope_theta": 1e4}),
        (8, {"factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 5e5}),
        (16, {"factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}),
        (4, {"factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_factors_of_a_llama3_rope_give_the_rope_back(
    tmp_path: Path, size: int, asked: dict[str, Any]
) -> None:
    """A file holds what each frequency is divided by, as transformers computes it here."""
    whole = {
        "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    } | asked  # fmt: skip
    model = small(head_dim=size, rope_parameters=whole)
    turns = model.model.rotary_emb.inv_freq.double()
    plain = asked["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    keys = {"rope.dimension_count": size, "attention.key_length": size}
    keys["attention.value_length"] = size
    more = {"rope_freqs.weight": (plain / turns).numpy()}
    file = written(tmp_path / "a.gguf", model, "llama", keys, more)
    found = AutoModelForCausalLM.from_config(config := gguf_config(file))
    torch.testing.assert_close(found.model.rotary_emb.inv_freq.double(), turns, rtol=1e-5, atol=0)
    if size > 16 and whole["low_freq_factor"] == 1:
        assert config.rope_parameters == whole
    assert np.abs(logits(read(file)) - (right := logits(model))).max() < 1e-4 * right.max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("keys", "more", "says"),
    [
        ({"attention.sliding_window": 8}, {}, "attention.sliding_window = 8, which cannot be read"),
        ({"logit_scale": 8.0}, {}, "logit_scale = 8.0, which cannot be read"),
        ({"rope.dimension_count": 8}, {}, "rope.dimension_count = 8, which cannot be read"),
        ({"rope.scaling.type": "longrope"}, {}, "rope.scaling.type = longrope"),
        ({"attention.value_length": 32}, {}, "attention.value_length = 32"),
        ({}, {"rope_freqs.weight": [1, 3, 1, 2, 7, 1, 1, 1]}, "that no rope of transformers gives"),
        ({}, {"blk.0.attn_q_norm.weight": [2.0] * 16}, "1 of its tensors have no place"),
        ({}, {"blk.1.attn_q.bias": [2.0] * 64}, "1 of its tensors have no place"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    file = written(tmp_path / "a.gguf", small(), "llama", keys, more)
    with pytest.raises(ModelError, match=rf"a\.gguf: .*{says}.*Name the folder of the model"):
        read(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", [{}, {"eot": 30, "eom": 31}, {"eot": 256}])
def test_an_answer_ends_where_llama_cpp_ends_it(tmp_path: Path, ends: dict[str, int]) -> None:
    """Llama 3.1's files name the ends of a turn and of a tool's call beside that of a text."""
    keys = {f"/tokenizer.ggml.{name}_token_id": number for name, number in ends.items()}
    file = written(tmp_path / "a.gguf", small(), "llama", keys)
    folder = model_folder(GgufModel(kind="gguf", path=file), folder=tmp_path)
    found = end_tokens(folder)
    assert found == list(dict.fromkeys([256, *ends.values()]))
    pytest.importorskip("cyllama", reason="llama.cpp is not installed")
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    vocabulary = llama_cpp.LlamaModel(str(file), llama_cpp.LlamaModelParams()).get_vocab()
    assert [number for number in range(258) if vocabulary.is_eog(number)] == sorted(found)


def other(file: Path, arch: str, kind: str) -> Path:
    """A file that is no model: an adapter or a part of a model for pictures."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.filterwarnings("ignore")
def test_files_that_are_no_whole_model_are_named(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.gguf", small(), "llama", {}).read_bytes()
    cut, head = tmp_path / "cut.gguf", tmp_path / "head.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    head.write_bytes(whole[:100])
    for file, says in (
        (cut, "transformers cannot read this GGUF file.*Download the file again"),
        (head, "no GGUF file that can be read.*Download the file again"),
        (
            other(tmp_path / "lora.gguf", "llama", "adapter"),
            "its type is adapter.*merge an adapter",
        ),
        (other(tmp_path / "mmproj.gguf", "clip", "mmproj"), "its type is mmproj.*the model itself"),
    ):
        with pytest.raises(ModelError, match=rf"{file.name}: .*{says}"):
            read(file)
    with pytest.raises(ModelError, match=r"cannot read its configuration.*Download the file again"):
        folder_config(cut)
