"""Graphs of fixed shape: every dimension a number, standard operators, torch's answers, and what
feeds them pads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from export import verify_parity
from limbeck.app import run as pipeline
from limbeck.app.cli import app
from limbeck.app.verify import verify
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, DataError, RecipeError
from limbeck.contract.recipe import load_recipe
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.encoder import Encoder
from limbeck.runtime.text import load_text
from serve_bench.serve.batch import open_batch
from tests.architectures import greedy
from tests.encoders import SMALL as ENCODER_FORMS
from tests.encoders import classifier_recipe, make_examples
from tests.factory import Factory
from tests.pico import pico_recipe

SMALL = {"kind": "int8-weight", "block_size": 16}
BENCH = {"prompt_tokens": 8, "new_tokens": 4}


def dims(graph: Path) -> dict[str, list[Any]]:
    proto = onnx.load(graph, load_external_data=False)
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*proto.graph.input, *proto.graph.output)
    }


def operators(graph: Path) -> set[tuple[str, str]]:
    return {
        (node.domain, node.op_type)
        for node in onnx.load(graph, load_external_data=False).graph.node
    }


def opset(graph: Path) -> int:
    (version,) = (
        entry.version
        for entry in onnx.load(graph, load_external_data=False).opset_import
        if not entry.domain
    )
    return version


# Encoders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [pytest.param("classification", marks=pytest.mark.slow), "embedding"]
)
def test_an_encoder_of_fixed_shape_answers_as_the_free_one(task: str, tiny: Factory) -> None:
    free = tiny.exported_encoder(task=task, forms=ENCODER_FORMS)
    shapes = {"kind": "static", "batch": 5, "length": 40}
    forms = ["fp32", "int8-dynamic", "int8-static"]
    exported = tiny.exported_encoder(task=task, forms=forms, shapes=shapes, opset=21)
    static = Encoder(exported.path, form="fp32")
    assert verify_parity(exported.path).keys() == exported.result["forms"].keys()
    graph = exported.path / "onnx/model.onnx"
    assert opset(graph) == 21 != opset(free.path / "onnx/model.onnx")
    assert dims(graph)["input_ids"] == dims(graph)["attention_mask"] == [5, 40]
    assert all(isinstance(dim, int) and dim for shape in dims(graph).values() for dim in shape)
    assert not {domain for domain, _ in operators(graph)} - {""}
    assert ("", "Shape") not in operators(graph)
    ids, mask = make_examples(rows=12, seed=3).batch(
        slice(None)
    )  # two batches of five, and two rows
    expected = Encoder(free.path, form="fp32").run(ids, mask)
    np.testing.assert_allclose(static.run(ids, mask), expected, atol=1e-5)
    with pytest.raises(DataError, match="reads 40 at most"):
        static.run(np.ones((1, 41)))


def test_a_length_below_what_is_read_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"export.shapes.length: found 39; .* need 40"):
        classifier_recipe(export={"shapes": {"kind": "static", "length": 39}})


# Language models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed(tiny: Factory) -> tuple[Path, Artifact]:
    """A tiny llama for two rows and 32 tokens, and the folder of its student."""
    options: dict[str, Any] = {"backend": "dynamo", "opset": 21}  # not the exporter's own choice
    options |= {"shapes": {"kind": "static", "batch": 2, "length": 32}}
    exported = tiny.exported(forms=["fp32", SMALL, "int8-static"], bench=BENCH, **options)
    return exported.path.parent / "student", exported


def test_a_decoder_of_fixed_shape_has_numbers_alone(fixed: tuple[Path, Artifact]) -> None:
    _, exported = fixed
    assert (
        "transformers.js" not in (exported.path / "README.md").read_text()
    )  # which reads a prompt at once
    facts = exported.result["forms"]["fp32"]
    graph = exported.path / facts["graph"]
    assert opset(graph) == opset(exported.path / facts["all_logits_graph"]) == 21
    found = dims(graph)
    assert (found["input_ids"], found["attention_mask"]) == ([2, 1], [2, 32])
    caches = {name: shape for name, shape in found.items() if "key" in name or "value" in name}
    assert {tuple(shape) for shape in caches.values()} == {
        (2, 2, 31, 16)
    }  # what comes out goes in again
    assert all(isinstance(dim, int) and dim for shape in found.values() for dim in shape)
    assert not {domain for domain, _ in operators(graph)} - {""}
    assert ("", "Shape") not in operators(graph)
    assert exported.result["shapes"] == {"kind": "static", "batch": 2, "length": 32}


def test_a_decoder_of_fixed_shape_generates_what_torch_does(fixed: tuple[Path, Artifact]) -> None:
    student, exported = fixed
    assert verify_parity(exported.path).keys() == {"fp32", "int8-weight", "int8-static"}
    prompt = np.random.default_rng(5).integers(0, 256, 12).tolist()
    expected, _ = greedy(student / "model", prompt)
    decoder = Decoder(exported.path, form="fp32")
    assert list(decoder.generate(prompt, 16)) == expected
    assert list(decoder.generate(prompt, 16)) == expected  # nothing is left of the first
    scorer = Decoder(exported.path, form="fp32", all_logits=True)
    ids = np.random.default_rng(6).integers(0, 256, (3, 9))  # more rows than it takes at once
    scored = scorer.score(ids)
    np.testing.assert_allclose(scored[1:2], scorer.score(ids[1:2]), atol=1e-5)
    np.testing.assert_allclose(scored[:2, -1], decoder.prefill(ids[:2]), atol=1e-5)
    with pytest.raises(DataError, match=r"found 33 tokens .* context is 32"):
        decoder.prefill([prompt], room=21)
    with pytest.raises(DataError, match=r"found 3 rows; this graph was made for 2"):
        decoder.prefill(ids)
    with pytest.raises(ArtifactError, match=r"export.shapes: dynamic"):
        open_batch(decoder, rows=2, tokens=32)


def test_products_of_rows_and_tokens_in_one_axis_are_measured(tiny: Factory) -> None:
    """GPT-2's are; their channels decide which outliers move and where 4 bits round."""
    exported = tiny.exported(
        "gpt2",
        forms=["fp32", SMALL, {"kind": "int4-weight", "block_size": 16, "algorithm": "gptq"}],
        bench=BENCH,
        backend="dynamo",
        shapes={"kind": "static", "batch": 2, "length": 32},
    )
    assert verify_parity(exported.path).keys() == {"fp32", "int8-weight", "int4-weight"}


@pytest.mark.slow
def test_a_run_of_fixed_shape_ends_in_a_verdict_and_generates(tmp_path: Path) -> None:
    """The whole job on graphs of one shape: measured, verified, and the command line says what
    torch says.
    """
    few = [
        "training.tokens=1024", "data.heldout.blocks=2",
        "bench={prompt_tokens: 8, new_tokens: 4, minutes: 0.05, min_blocks: 3}",
        "export={forms: [fp32, int8-weight], backend: dynamo, shapes: {kind: static, batch: 1, "
        "length: 128}}",
    ]  # fmt: skip
    run = tmp_path / "run"
    report = pipeline.run(load_recipe("pico", overrides=few), out=run)
    assert report is not None
    assert report.verdict.status in ("pass", "undecided")
    assert verify(run, speed=False) == 0
    made = CliRunner().invoke(
        app, ["generate", str(run), "abcdef", "--max-new-tokens", "12", "--form", "fp32"]
    )
    assert made.exit_code == 0, made.output
    text = load_text(run / "onnx")
    ids, _ = greedy(run / "student/model", text.encode("abcdef"), 12)
    kept = ids[: next((at for at, token in enumerate(ids) if token in text.stop_ids), len(ids))]
    assert made.stdout == "".join(text.stream(iter(kept))) + "\n"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"backend": "genai"}, r"export.shapes: genai leaves no choice.*use backend: dynamo"),
        ({"backend": "auto"}, r"export.shapes: auto leaves no choice.*use backend: dynamo"),
        (
            {"backend": "dynamo", "adapters": "separate"},
            r"export.shapes: adapters, mixed and recover",
        ),
        (
            {"backend": "dynamo", "shapes": {"kind": "static", "length": 31}},
            r"export.shapes.length: found 31; .* need 32",
        ),
    ],
)
def test_what_a_static_graph_cannot_be_is_a_mistake(over: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pico_recipe(export={"shapes": {"kind": "static", "length": 64}} | over, bench=BENCH)


def test_scenarios_of_changing_batches_are_a_mistake() -> None:
    export = {"backend": "dynamo", "shapes": {"kind": "static", "length": 64}}
    with pytest.raises(
        RecipeError, match=r"bench.scenarios: offline runs batches of changing size"
    ):
        pico_recipe(export=export, bench=BENCH | {"scenarios": ["single", "offline"]})


def test_shapes_do_not_decide_the_student() -> None:
    one = pico_recipe()
    other = pico_recipe(
        export={"backend": "dynamo", "shapes": {"kind": "static", "length": 64}}, bench=BENCH
    )
    assert one.distillation() == other.distillation()
    assert json.dumps(one.resolved()) != json.dumps(other.resolved())
