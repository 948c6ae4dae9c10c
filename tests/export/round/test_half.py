"""Forms in fp16: what is cast, what stays, and what is refused on which provider."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export import verify_parity
from export.round.half import half
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, EnvironmentalError, QualityError, RecipeError
from limbeck.runtime.decoder import Decoder, GraphDecoder
from serve_bench.serve.batch import open_batch
from serve_bench.serve.engine import Engine
from tests.factory import Factory
from tests.pico import pico_recipe

FORMS = ["fp32", "fp16", {"kind": "int8-weight", "block_size": 16}]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tiny: Factory) -> Artifact:
    return tiny.exported(request.param, FORMS, provider="cuda")


def test_all_but_the_reference_is_in_fp16(exported: Artifact) -> None:
    forms = exported.result["forms"]
    fused = exported.result["backend"]["name"] == "genai"
    assert {name: (f["provider"], f["number_type"]) for name, f in forms.items()} == {
        "fp32": ("cpu", "fp32"),
        "fp16": ("cuda", "fp16"),
        "int8-weight": ("cuda", "fp16"),
    }
    sizes = [
        (exported.path / f"onnx/{stem}.onnx_data").stat().st_size
        for stem in ("model_fp16", "model")
    ]
    assert sizes[0] < 0.55 * sizes[1]
    for name in ("fp16", "int8-weight"):
        assert forms[name]["parity"]["failures"] == []
        assert forms[name]["parity"]["provider"] == "cpu"
        proto = onnx.load(exported.path / forms[name]["graph"], load_external_data=False)
        types = {
            v.name: v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)
        }
        assert types["logits"] == TensorProto.FLOAT
        cache = TensorProto.FLOAT16 if fused else TensorProto.FLOAT
        assert types["past_key_values.0.key"] == types["present.1.value"] == cache
        large = [t for t in proto.graph.initializer if t.external_data and len(t.dims) > 1]
        assert all(t.data_type in (TensorProto.FLOAT16, TensorProto.UINT8) for t in large)
        # A tied head is still one copy.
        entries = [{e.key: e.value for e in t.external_data} for t in large]
        assert len({e["offset"] for e in entries}) < len(entries) or name == "fp16"
    js = json.loads((exported.path / "config.json").read_text())["transformers.js_config"]
    assert js.get("kv_cache_dtype") == ({"fp16": "float16", "q8": "float16"} if fused else None)
    if fused:
        genai = json.loads((exported.path / "genai_config.json").read_text())["model"]["decoder"]
        assert genai["session_options"]["provider_options"] == [
            {"cuda": {"enable_cuda_graph": "0"}}
        ]


def test_the_cpu_computes_it_to_check_it_and_does_not_serve_it(exported: Artifact) -> None:
    prompt = list(range(40, 52))
    ours = GraphDecoder(exported.path / exported.result["forms"]["fp16"]["graph"])
    exact = Decoder(exported.path, form="fp32")
    np.testing.assert_allclose(
        ours.prefill([prompt], room=4), exact.prefill([prompt], room=4), atol=0.05
    )
    np.testing.assert_allclose(ours.step([7]), exact.step([7]), atol=0.05)
    assert verify_parity(exported.path)["int8-weight"]["failures"] == []
    with pytest.raises(EnvironmentalError, match=r"no CUDAExecutionProvider here"):
        Decoder(exported.path)  # for where it was made, which is not here
    with pytest.raises(
        EnvironmentalError, match=r"no kernel for the products of fp16: .*Open the form int8-weight"
    ):
        Decoder(exported.path, form="fp16", provider="cpu")
    if exported.result["backend"]["name"] == "genai":
        with pytest.raises(
            EnvironmentalError,
            match=r"CUDAExecutionProvider has no kernel .* fp32: fused attention",
        ):
            Decoder(exported.path, form="fp32", provider="cuda")


def test_the_engine_refuses_what_is_made_for_a_card_and_serves_its_reference(
    exported: Artifact,
) -> None:
    with pytest.raises(
        ArtifactError, match=r"int8-weight is made for cuda and .*export.provider: cpu, or .* fp32"
    ):
        Engine(exported.path, threads=1)
    engine = Engine(exported.path, form="fp32", threads=1, max_batch=2)
    engine.close()


def test_rows_that_share_a_batch_have_caches_of_the_graphs_own_type(exported: Artifact) -> None:
    graph = exported.path / exported.result["forms"]["int8-weight"]["graph"]
    alone, batch = (
        GraphDecoder(graph, threads=1),
        open_batch(GraphDecoder(graph, threads=1), rows=2, tokens=256),
    )
    assert (alone.cache_type is np.float16) == (exported.result["backend"]["name"] == "genai")
    for prompt in ([40, 41, 42], [50]):
        np.testing.assert_allclose(
            batch.fill(prompt), alone.prefill([prompt], room=1)[0], atol=1e-3
        )
        batch.join()
    np.testing.assert_allclose(batch.step(np.array([7, 8]))[1], alone.step([8])[0], atol=1e-2)


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(
        QualityError, match=r"head: its largest weight is 7e\+04, fp16 ends at 65504"
    ):
        half("head", np.array([[1.0, -7e4]], np.float32))
    assert half("head", np.array([0.1], np.float32)).dtype == np.float16


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (
            {"forms": ["fp32", "fp16"]},
            r"export.forms.1: cpu has no kernel for fp16 .*; use int8-weight",
        ),
        (
            {"forms": ["fp32", "int8-dynamic", "fp16"], "provider": "cuda"},
            r"export.forms.1: cuda has no kernel for int8-dynamic .*; use int8-weight",
        ),
        (
            {"forms": ["fp32"], "provider": "cuda"},
            r"export.forms.0: cuda has no kernel for fp32 .*; use fp16",
        ),
    ],
)
def test_a_form_without_kernels_is_a_mistake_in_the_recipe(
    export: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pico_recipe(export=export)


def test_the_gpu_benchmark_needs_a_card_and_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from tests.benchmarks.serving import bench_gpu

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stop:
            bench_gpu.main()
        assert stop.value.code == 2
        assert "no NVIDIA card" in capsys.readouterr().err
    times = {
        "torch": [(0.2, 0.04), (0.4, 0.02), (0.2, 0.02)],
        "fp16 ort": [(0.1, 0.01), (0.1, 0.01), (0.1, 0.01)],
    }
    found = bench_gpu.summary(times)
    assert found["ms"]["torch"] == {"ttft": 200.0, "tpot": 20.0}
    assert (found["ttft_ratio"], found["tpot_ratio"]) == ({"fp16 ort": 0.5}, {"fp16 ort": 0.5})
