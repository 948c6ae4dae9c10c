"""A LoRA student beside its base: one graph, a file for each student, and the same answers as
torch's.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import compress
from export import export_student, verify_parity
from export.round.smooth import find_boundaries
from limbeck.contract.artifact import Artifact, open_artifact, write_artifact
from limbeck.contract.data.heldout import CALIBRATION, HELDOUT, save_calibration, save_heldout
from limbeck.contract.errors import ArtifactError, RecipeError
from limbeck.runtime.decoder import Decoder
from tests.compress.test_compress import tiny
from tests.pico import make_blocks, make_model, pico_recipe
from tests.wild.cases.adapters import peft_logits

FORMS = ["fp32", "int8-dynamic", {"kind": "int8-weight", "block_size": 16}]
PROMPT = list(range(40, 52))


def make_lora_student(path: Path, base: Path, *, seed: int, **config: Any) -> Artifact:
    """A student artifact as the compress stage writes it for LoRA, with a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    options = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
        | config
    )
    with warnings.catch_warnings():  # see export.adapters
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    with write_artifact(path, kind="student", key=f"lora {seed}", parents={}) as draft:
        model.save_pretrained(draft.folder / "adapter")
        model.merge_and_unload().save_pretrained(draft.folder / "model")
        AutoTokenizer.from_pretrained(base).save_pretrained(draft.folder / "model")
        save_heldout(draft.folder / HELDOUT, make_blocks())
        save_calibration(
            draft.folder / CALIBRATION, [b.input_ids[0] for b in make_blocks(seed=1).values()]
        )
        draft.result = {"nll": {}, "base": str(base)}
    return open_artifact(path)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """Two students of one base, exported apart from it: one tied to every linear layer, one to some
    of a packed product.
    """
    root = tmp_path_factory.mktemp("adapters")
    base = make_model(root / "base", tie_word_embeddings=True)
    students = [
        make_lora_student(root / "a", base, seed=1),
        make_lora_student(
            root / "b",
            base,
            seed=2,
            r=2,
            target_modules=["q_proj", "v_proj", "down_proj"],
            use_rslora=True,
        ),
    ]
    recipe = pico_recipe(export={"forms": FORMS, "adapters": "separate"})
    return [
        export_student(student=s.path, out=root / f"onnx-{s.path.name}", recipe=recipe)
        for s in students
    ]


def torch_model(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")


def torch_logits(model: Path, prompt: list[int]) -> Any:
    with torch.inference_mode():
        return torch_model(model)(torch.tensor([prompt])).logits[0, -1].numpy()


def test_with_its_adapter_it_is_the_student_and_without_it_the_base(two: list[Artifact]) -> None:
    for exported in two:
        for form in exported.result["forms"].values():
            assert form["parity"]["failures"] == form["parity_base"]["failures"] == []
            assert exported.result["adapter"]["file"] in form["files"]
        root, name = exported.path.parent, exported.path.name.removeprefix("onnx-")
        own = Decoder(exported.path, form="fp32").prefill([PROMPT])[0]
        np.testing.assert_allclose(
            own, torch_logits(root / name / "model", PROMPT), atol=1e-4
        )  # merged by peft
        alone = Decoder(exported.path, form="fp32", adapter="none").prefill([PROMPT])[0]
        np.testing.assert_allclose(alone, torch_logits(root / "base", PROMPT), atol=1e-4)
        assert np.abs(own - alone).max() > 1
    assert set(verify_parity(two[0].path)) == {"fp32", "int8-dynamic", "int8-weight"}


def test_packed_layers_that_the_builder_splits_get_an_adapter_each(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", model_type="phi3")
    targets = ["qkv_proj", "gate_up_proj", "o_proj"]
    student = make_lora_student(tmp_path / "student", base, seed=1, target_modules=targets)
    recipe = pico_recipe(export={"forms": ["fp32"], "adapters": "separate"})
    exported = export_student(student=student.path, out=tmp_path / "onnx", recipe=recipe)
    assert exported.result["backend"]["name"] == "genai"
    own = Decoder(exported.path, form="fp32").prefill([PROMPT])[0]
    np.testing.assert_allclose(own, torch_logits(student.path / "model", PROMPT), atol=1e-4)


@pytest.mark.parametrize(
    ("tied", "changes"),
    [(False, {"tie_word_embeddings": True}), (True, {"dtype": "bfloat16"})],
    ids=["a head that its configuration calls tied", "fp32 weights that it calls bf16"],
)
def test_a_base_whose_configuration_is_wrong_is_what_transformers_makes_of_it(
    tmp_path: Path, tied: bool, changes: dict[str, Any]
) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=tied)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with warnings.catch_warnings():  # of peft, on the head
        warnings.simplefilter("ignore", UserWarning)
        student = make_lora_student(tmp_path / "student", base, seed=1)
    recipe = pico_recipe(export={"forms": ["fp32"], "adapters": "separate"})
    exported = export_student(student=student.path, out=tmp_path / "onnx", recipe=recipe)
    assert exported.result["backend"]["name"] == "genai"
    theirs = peft_logits(base, student.path / "adapter", torch.tensor([PROMPT]))[0, -1]
    ours = Decoder(exported.path, form="fp32").prefill([PROMPT])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("adapters", ["merged", "separate"])
def test_a_half_base_in_shards_is_exported_with_what_was_learned_on_it(
    tmp_path: Path, adapters: str
) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    model = torch_model(base).to(torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "t", "model": {"kind": "local", "path": str(base)}}],
        student={"base": {"kind": "local", "path": str(base)}, "init": "base"},
        training={"tokens": 64},
    )
    student = compress.distill(recipe=recipe, out=tmp_path / "student")
    exporting = pico_recipe(export={"forms": ["fp32"], "adapters": adapters})
    exported = export_student(student=student.path, out=tmp_path / "onnx", recipe=exporting)
    theirs = peft_logits(base, student.path / "adapter", torch.tensor([PROMPT]))[0, -1]
    ours = Decoder(exported.path, form="fp32").prefill([PROMPT])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_one_base_serves_both(two: list[Artifact]) -> None:
    files = [exported.path / exported.result["adapter"]["file"] for exported in two]
    weights = [(exported.path / "onnx/model_quantized.onnx_data").read_bytes() for exported in two]
    assert weights[0] == weights[1]
    # The first graph has an input for all that the second student changes.
    for form in ("fp32", "int8-weight"):
        borrowed = Decoder(two[0].path, form=form, adapter=files[1])
        np.testing.assert_allclose(
            borrowed.prefill([PROMPT]), Decoder(two[1].path, form=form).prefill([PROMPT]), atol=1e-4
        )
        assert list(borrowed.generate(PROMPT, 5)) == list(
            Decoder(two[1].path, form=form).generate(PROMPT, 5)
        )
    with pytest.raises(ArtifactError, match=r"takes other inputs"):
        Decoder(two[1].path, form="fp32", adapter=files[0])


def test_the_command_line_takes_an_adapter(two: list[Artifact]) -> None:
    from typer.testing import CliRunner

    from limbeck.app.cli import app

    def run(*options: str) -> str:
        found = CliRunner().invoke(
            app, ["generate", str(two[0].path), "abcdefgh", "--max-new-tokens", "12", *options]
        )
        assert found.exit_code == 0, found.output
        return found.output

    theirs = str(two[1].path / two[1].result["adapter"]["file"])
    assert len({run(), run("--adapter", "none"), run("--adapter", theirs)}) == 3


def test_packed_products_share_an_input_and_outliers_stay_where_an_adapter_reads(
    two: list[Artifact],
) -> None:
    proto = onnx.load(two[1].path / "onnx/model.onnx", load_external_data=False)
    inputs = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in proto.graph.input
    }
    adapted = sorted(name for name in inputs if name.endswith("lora_B"))
    assert len(adapted) == 4  # two layers of q/k/v as one and down
    assert [inputs[name][1] for name in adapted] == [128, 32, 128, 32] or [
        inputs[n][1] for n in adapted
    ].count(128) == 2
    assert (
        len(find_boundaries(proto)) == 2
    )  # the norms before gate and up, which this adapter leaves alone


def test_genai_takes_the_adapter(two: list[Artifact]) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(two[0].path))
    adapters = genai.Adapters(model)
    adapters.load(str(two[0].path / two[0].result["adapter"]["file"]), "student")
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.set_active_adapter(adapters, "student")
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)[len(PROMPT) :] if token != 256]
    assert theirs == list(Decoder(two[0].path).generate(PROMPT, 20 - len(PROMPT), stop_ids={256}))


def test_the_server_and_the_bench_run_the_student_and_not_its_base(two: list[Artifact]) -> None:
    from serve_bench.serve.engine import Engine, Request
    from serve_bench.worker.runtimes import OnnxRuntimeGenai

    expected = list(Decoder(two[0].path).generate(PROMPT, 4))
    assert expected != list(Decoder(two[0].path, adapter="none").generate(PROMPT, 4))
    engine = Engine(two[0].path, form="int8-weight", threads=1)
    try:
        pieces = list(engine.generate(Request(ids=tuple(PROMPT), max_new_tokens=4)))
    finally:
        engine.close()
    assert [piece.token for piece in pieces if piece.token is not None] == expected
    runtime = OnnxRuntimeGenai(artifact=str(two[0].path), threads=1)
    chosen = [int(runtime.begin(np.array([PROMPT]), room=4)[0])]
    chosen += [int(runtime.step(np.array([0]))[0]) for _ in range(3)]
    assert chosen == expected


def test_what_is_refused(two: list[Artifact], tmp_path: Path) -> None:
    (tmp_path / "no.onnx_adapter").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"cannot read it as an adapter"):
        Decoder(two[0].path, adapter=tmp_path / "no.onnx_adapter")
    other = make_model(tmp_path / "base", seed=9, tie_word_embeddings=True)
    student = make_lora_student(tmp_path / "c", other, seed=3)
    recipe = pico_recipe(export={"forms": ["fp32"], "adapters": "separate"})
    exported = export_student(student=student.path, out=tmp_path / "onnx", recipe=recipe)
    with pytest.raises(ArtifactError, match=r"made for base \d+, this graph is of base \d+"):
        Decoder(
            two[0].path, form="fp32", adapter=exported.path / exported.result["adapter"]["file"]
        )
    merged = export_student(
        student=student.path,
        out=tmp_path / "merged",
        recipe=pico_recipe(export={"forms": ["fp32"]}),
    )
    with pytest.raises(ArtifactError, match=r"this graph takes no adapter"):
        Decoder(merged.path, adapter=exported.path / exported.result["adapter"]["file"])
    with pytest.raises(RecipeError, match=r"export.adapters: adapters are fp32"):
        pico_recipe(export={"adapters": "separate", "provider": "cuda", "forms": ["fp32", "fp16"]})
    with pytest.raises(
        RecipeError,
        match=r"export.adapters: int8-static is calibrated on one student.*; use int8-dynamic",
    ):
        pico_recipe(export={"adapters": "separate", "forms": ["fp32", "int8-static"]})
    with pytest.raises(RecipeError, match=r"export.adapters: a fresh student has no adapter"):
        pico_recipe(
            student={"kind": "fresh", "config": {}},
            export={"adapters": "separate"},
            teachers=[{"name": "t", "model": {"kind": "local", "path": "x"}}],
        )
