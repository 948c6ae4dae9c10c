"""`limbeck pack --layout triton`: the configuration against Triton's own schema and the graph."""

from __future__ import annotations

import importlib.util
import traceback
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.contract.artifact import Artifact, open_artifact
from tests.factory import Factory

KINDS = {"int64": "INT64", "float": "FP32", "float16": "FP16"}
TYPES = {f"tensor({name})": f"TYPE_{kind}" for name, kind in KINDS.items()}


def pack(made: Artifact, out: Path, *options: str) -> Result:
    words = ["pack", str(made.path), "--out", str(out), "--layout", "triton", *options]
    return CliRunner().invoke(app, words)


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's own classes. The package around this module wants grpc."""
    place = distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(place))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda tiny: tiny.exported(), 0),
        (lambda tiny: tiny.exported_encoder(task="classification"), 32),
        (lambda tiny: tiny.exported_encoder(task="embedding"), 32),
    ],
    ids=["language", "classifier", "embedding"],
)
def test_the_configuration_is_what_the_graph_takes_and_gives(
    make: Any, batch: int, tiny: Factory, schema: Any, tmp_path: Path
) -> None:
    made = make(tiny)
    done = pack(made, tmp_path / "models")
    assert done.exit_code == 0, (done.stderr, traceback.format_exception(done.exception))
    open_artifact(tmp_path / "models", kind="triton")  # every hash is checked
    (folder,) = (p for p in (tmp_path / "models").iterdir() if p.is_dir())
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.name == folder.name
    assert (config.backend, config.max_batch_size) == ("onnxruntime", batch)
    assert config.HasField("dynamic_batching") == bool(batch)

    session = onnxruntime.InferenceSession(folder / "1" / config.default_model_filename)
    pairs = (config.input, session.get_inputs()), (config.output, session.get_outputs())
    for ours, theirs in pairs:
        found = {
            t.name: (schema.DataType.Name(t.data_type), ([-1] if batch else []) + [*t.dims])
            for t in ours
        }
        assert found == {
            t.name: (TYPES[t.type], [d if isinstance(d, int) else -1 for d in t.shape])
            for t in theirs
        }
    classes = made.result["classes"]
    labels = [t.label_filename for t in config.output if t.label_filename]
    assert labels == (["labels.txt"] if classes else [])
    if classes:
        assert (folder / "labels.txt").read_text().splitlines() == classes
    assert (folder / "client" / "tokenizer.json").is_file()


def test_a_client_can_generate_with_the_cache_that_comes_back(
    tiny: Factory, schema: Any, tmp_path: Path
) -> None:
    """Feed `present` back as `past_key_values`, as docs/serving.md tells clients to do."""
    from limbeck.runtime.decoder import Decoder

    made = tiny.exported()
    pack(made, tmp_path / "models")
    (folder,) = (p for p in (tmp_path / "models").iterdir() if p.is_dir())
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    session = onnxruntime.InferenceSession(folder / "1" / config.default_model_filename)
    prompt, tokens = list(range(5, 12)), list[int]()
    cache = {
        t.name: np.zeros([1, *(0 if d < 0 else d for d in t.dims[1:])], np.float32)
        for t in config.input
        if t.name.startswith("past_key_values")
    }
    given = prompt
    for step in range(6):
        seen = len(prompt) + step
        feeds = {"input_ids": np.array([given]), "attention_mask": np.ones((1, seen), np.int64)}
        answers = session.run(None, feeds | cache)
        outputs = dict(zip((t.name for t in config.output), answers, strict=True))
        given = [int(outputs["logits"][0, -1].argmax())]
        tokens += given
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
    assert tokens == list(Decoder(made.path, threads=1).generate(prompt, 6))


def test_what_triton_cannot_hold_is_refused(tiny: Factory, tmp_path: Path) -> None:
    unknown = pack(tiny.exported(), tmp_path / "models", "--form", "fp8")
    assert unknown.exit_code == 2
    assert not (tmp_path / "models").exists()
