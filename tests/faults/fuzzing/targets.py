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
from limbeck.contract.recipe import JsonLines, ParquetRows
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
    from compress.models.language import load_tokenizer

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

    folder_config(folder)


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
    Target("config.json", "config.json", _config, _read_config),
    Target("GGUF header", "x.gguf", _gguf, _read_gguf),
    Target("ONNX graph", "x.onnx", _onnx, _read_onnx),
)
