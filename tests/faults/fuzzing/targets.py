"""What is fuzzed: every file that Limbeck reads and others may have written or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.app.run import RUN, open_run
from limbeck.contract.artifact import MANIFEST, find_artifact, open_artifact, write_artifact
from limbeck.contract.data.examples import Examples, load_examples, save_examples
from limbeck.contract.data.heldout import (
    load_calibration,
    load_heldout,
    save_calibration,
    save_heldout,
)
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import JsonLines, ParquetRows, load_any_recipe
from limbeck.contract.sources.models import require_fits, require_language_model
from tests import ROOT
from tests.faults.fuzzing.fuzz import Target
from tests.pico import make_blocks, pico_recipe


def _artifact(folder: Path) -> None:
    recipe = pico_recipe()
    with write_artifact(folder / "a", kind="x", key="k", parents={}, recipe=recipe) as draft:
        (draft.folder / "one").write_text("1")
        draft.result = {"task": "causal-lm", "nll": {"a": 1.5}}


def _open(folder: Path) -> None:
    artifact = open_artifact(folder / "a")
    assert isinstance(artifact.digest, str)
    assert isinstance(artifact.result, dict)
    assert isinstance(artifact.created, str)
    find_artifact(folder / "a", kind="x", key="k")


def _claim(folder: Path) -> None:
    with open_run(pico_recipe(), folder / "run"):
        pass


def _examples(folder: Path) -> None:
    rows = Examples(np.ones((2, 3), np.int32), np.array([3, 1], np.int32), np.zeros(2, np.int32))
    save_examples(folder / "x", rows)


def _calibration(folder: Path) -> None:
    save_calibration(folder / "x", [np.array([3, 1, 2], np.int32)] * 3)


_LINES = [{"text": f"line {n}", "more": [1, {"x": None}]} for n in range(5)]


def _json_lines(folder: Path) -> None:
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _LINES))


def _parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": [line["text"] for line in _LINES]}), folder / "x.parquet"
    )


def _documents(folder: Path) -> Any:
    from compress.data.documents import documents

    if (folder / "x.parquet").exists():
        return list(documents(folder / "x.parquet", ParquetRows(kind="parquet")))
    return list(documents(folder / "x.jsonl", JsonLines(kind="jsonl")))


def _tokenizer(folder: Path) -> None:
    from tests.pico import make_tokenizer

    make_tokenizer().save_pretrained(folder)


def _read_tokenizer(folder: Path) -> None:
    from limbeck.contract.sources.tokenizer import load_tokenizer

    load_tokenizer(folder)


_CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 258, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def _config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(_CONFIG))


def _read_config(folder: Path) -> None:
    from compress.models.language import folder_config

    require_language_model(folder)
    require_fits(folder, block=64)
    folder_config(folder)


def _adapter(folder: Path) -> None:
    from safetensors.numpy import save_file

    (folder / "adapter").mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4,
        "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "rank_pattern": {"q": 2},
        "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": np.zeros((4, 32), np.float32),
        f"{layer}.lora_B.weight": np.zeros((32, 4), np.float32),
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def _read_adapter(folder: Path) -> None:
    from limbeck.contract.models.adapter_files import adapter_facts

    assert isinstance(adapter_facts(folder / "adapter").shares_base, bool)


def _recipe(folder: Path) -> None:
    (folder / "x.yaml").write_bytes((ROOT / "recipes" / "pico.yaml").read_bytes())


def _read_recipe(folder: Path) -> None:
    load_any_recipe(folder / "x.yaml")


def _gguf(folder: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(258)
    writer.add_tensor("token_embd.weight", np.zeros((258, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(folder: Path) -> None:
    from compress.models.language import folder_config

    folder_config(folder / "x.gguf")


def _onnx(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "n"])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "n"])])  # fmt: skip
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "x.onnx")


def _read_onnx(folder: Path) -> None:
    from limbeck.runtime.session import open_session

    open_session(folder / "x.onnx", threads=1)


def _certificate(folder: Path) -> None:
    from serve_bench.judge.certificate import FORMAT

    keys = ("artifact", "bench", "data", "figures", "machine", "protocol", "versions")
    (folder / "certificate.json").write_text(json.dumps({"format": FORMAT} | {k: {} for k in keys}))


def _read_certificate(folder: Path) -> None:
    from serve_bench.judge.certificate import read_certificate

    read_certificate(folder)


_BODIES: tuple[dict[str, Any], ...] = (
    {
        "prompt": "abc", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["x"],
        "stream": True, "stream_options": {"include_usage": True}, "logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
            "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}},
    },
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}],
        "tool_choice": "auto", "max_tokens": 2, "logprobs": True, "top_logprobs": 1,
    },
)  # fmt: skip
_served: list[Any] = []  # the server of this process, which ends with it


def _bodies(folder: Path) -> None:
    from tests.factory import Factory
    from tests.serve_bench.serve.asking import serving

    _served.append(serving(Factory(folder / "tiny").exported().path))
    _served.append(_served[0].__enter__())
    (folder / "x").write_text("\n".join(json.dumps({"model": "pico"} | body) for body in _BODIES))


def _post(folder: Path) -> None:
    """Send each line to both endpoints. Raises `DataError` when the server refuses them all."""
    from tests.serve_bench.serve.asking import bare

    refused = ""
    answered = 0
    for body in (folder / "x").read_bytes().split(b"\n"):
        for path in ("/v1/completions", "/v1/chat/completions"):
            status, _, answer = bare(_served[1], "POST", path, body)
            assert status in (200, 400, 404, 413), (status, path, answer)
            assert status == 200 or set(answer["error"]) >= {"message", "type", "code"}, answer
            answered += status == 200
            refused = refused or ("" if status == 200 else answer["error"]["message"])
    assert bare(_served[1], "GET", "/health")[0] == 200
    if not answered:
        raise DataError(refused)


QUICK = (
    Target("manifest", f"a/{MANIFEST}", _artifact, _open),
    Target("run.json", f"run/{RUN}", _claim, _claim),
    Target("held-out text", "x", lambda f: save_heldout(f / "x", make_blocks()),
           lambda f: load_heldout(f / "x")),
    Target("examples", "x", _examples, lambda f: load_examples(f / "x")),
    Target("calibration", "x", _calibration, lambda f: load_calibration(f / "x")),
)  # fmt: skip
TARGETS = (
    *QUICK,
    Target("JSON lines", "x.jsonl", _json_lines, _documents),
    Target("Parquet", "x.parquet", _parquet, _documents),
    Target("certificate", "certificate.json", _certificate, _read_certificate),
    Target("tokenizer.json", "tokenizer.json", _tokenizer, _read_tokenizer),
    Target("recipe", "x.yaml", _recipe, _read_recipe),
    Target("adapter_config.json", "adapter/adapter_config.json", _adapter, _read_adapter),
    Target("adapter's tensors", "adapter/adapter_model.safetensors", _adapter, _read_adapter),
    Target("config.json", "config.json", _config, _read_config),
    Target("GGUF header", "x.gguf", _gguf, _read_gguf),
    Target("ONNX graph", "x.onnx", _onnx, _read_onnx),
    Target("request bodies", "x", _bodies, _post),
)
