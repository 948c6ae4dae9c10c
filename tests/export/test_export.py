"""The export stage on tiny real models: parity, padding, sharing, sizes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from huggingface_hub import ModelCard

import compress
from export import export_student, verify_parity
from export.build.genai import build_genai
from export.check.census import require_quantized, take_census
from export.check.parity import answer, make_cases, measure_parity
from export.folder.clients import write_client_files
from export.graphs import Graphs, form_files
from export.round.blocks import Blockwise, block_size_for, pack_nibbles, quantize_blocks
from export.round.quantize import quantize_columns, quantize_weights
from export.round.scheme import scheme_for
from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.errors import ArtifactError, EnvironmentalError, ModelError
from limbeck.contract.recipe import (
    Int4WeightForm,
    Int8DynamicForm,
    Int8WeightForm,
    fingerprint,
    parse_recipe,
)
from limbeck.runtime.decoder import Decoder, GraphDecoder
from tests.architectures import BASES, WEIGHT8, distillation
from tests.factory import Factory
from tests.pico import make_model, pico_recipe

SHAPES = [
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"tie_word_embeddings": False, "hidden_size": 24}, id="untied, padded blocks"),
    pytest.param(
        {"tie_word_embeddings": True, "hidden_size": 40, "num_key_value_heads": 1},
        id="tied, padded blocks",
    ),
    pytest.param({"model_type": "qwen2", "hidden_size": 64, "num_key_value_heads": 4}, id="qwen2"),
    pytest.param({"model_type": "qwen3", "tie_word_embeddings": True}, id="qwen3"),
    pytest.param(
        {"model_type": "mistral", "sliding_window": 8}, id="mistral, window shorter than the text"
    ),
]

# Most KL in nats; random weights stand rounding worse than trained ones.
QUANTIZED = [
    (Int8WeightForm(kind="int8-weight", block_size=16), 0.01),
    (Int8DynamicForm(kind="int8-dynamic"), 0.04),
    (Int4WeightForm(kind="int4-weight", block_size=16), 0.7),
]


def texts_of(*lengths: int) -> list[Any]:
    draw = np.random.default_rng(7)
    return [draw.integers(0, 256, length) for length in lengths]


@pytest.mark.parametrize("sizes", SHAPES)
def test_every_way_of_feeding_agrees_with_torch(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = make_model(tmp_path / "model", **sizes)
    fp32, _ = build_genai(model, tmp_path, {})
    cases = answer(make_cases(texts_of(40, 33), context=64), model)
    exact = measure_parity("fp32", fp32, cases)
    assert exact["failures"] == []
    assert exact["max_abs"] < 5e-5
    assert {
        "left_padded",
        "left_padded/last",
        "right_padded",
        "one_token",
        "chunks",
        "long",
        "longest",
    } <= exact["cases"].keys()

    for form, worst in QUANTIZED:
        graphs = form_files(tmp_path, form.kind)
        scheme = scheme_for(form, sizes.get("hidden_size", 32))
        assert scheme is not None
        quantize_weights(fp32, graphs, scheme=scheme, metadata={})
        rounded = measure_parity(form.kind, graphs, cases)
        assert 0 < rounded["kl"] < worst
        require_quantized(form.kind, take_census(graphs.last))


@pytest.mark.parametrize(("context", "length", "compared"), [(64, 64, 64), (8192, 512, 128)])
def test_the_longest_case_ends_where_the_context_does(
    context: int, length: int, compared: int
) -> None:
    """Held-out rows are joined up to there, however short each is; of a long context, to 512
    tokens.
    """
    texts, more = texts_of(24, 20), texts_of(*[24] * 30)
    case = make_cases(texts, context=context, more=more)["longest"]
    assert case.ids.shape == (1, length)
    np.testing.assert_array_equal(case.ids[0], np.concatenate([*texts, *more])[:length])
    assert (len(case.columns), case.columns[0], case.columns[-1]) == (compared, 0, length - 1)
    assert make_cases(texts, context=64)["longest"].ids.shape == (
        1,
        64,
    )  # what is shorter is read again


@pytest.mark.parametrize("seed", range(3))
def test_any_mask_gives_torchs_answers(tmp_path: Path, seed: int) -> None:
    """Holes in the prompt, padding on both sides of it, then decoding: a token's logits depend on
    the tokens before it alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "model", seed=seed)
    fp32, _ = build_genai(model, tmp_path, {})
    draw = np.random.default_rng(seed)
    mask = (draw.random((4, 14)) < 0.6).astype(np.int64)
    mask[np.arange(4), draw.integers(0, 9, 4)] = 1  # at least one token in every prompt
    mask[:, 9:] = 1
    ids = draw.integers(0, 256, mask.shape)
    torch_model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    decoder = GraphDecoder(fp32.all)
    found = [decoder.prefill(ids[:, :9], mask[:, :9], room=5)] + [
        decoder.extend(ids[:, [at]]) for at in range(9, 14)
    ]
    for row in range(4):
        tokens = ids[row][mask[row] == 1]
        with torch.inference_mode():
            expected = torch_model(torch.from_numpy(tokens[None])).logits[0].numpy()
        np.testing.assert_allclose(
            np.concatenate(found, 1)[row][mask[row] == 1], expected, atol=5e-5
        )


def test_a_client_that_grows_its_cache_gets_the_same_answers(exported: Artifact) -> None:
    """transformers.js feeds the present of one step as the past of the next."""
    import onnxruntime

    path = exported.path / exported.result["forms"]["fp32"]["graph"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs() if "past" in value.name]
    ids = np.random.default_rng(0).integers(0, 256, (2, 10))
    mask = np.array([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    ours = Decoder(exported.path, form="fp32")
    expected = [ours.prefill(ids[:, :6], mask, room=4)] + [
        ours.step(ids[:, at]) for at in range(6, 10)
    ]
    cache = {name: np.zeros((2, 2, 0, 16), np.float32) for name in names}
    for at, width in ((0, 6), (6, 1), (7, 1), (8, 1), (9, 1)):
        seen = np.concatenate([mask, np.ones((2, at + width - 6), np.int64)], axis=1)
        feeds = {"input_ids": ids[:, at : at + width], "attention_mask": seen, **cache}
        logits, *present = session.run(
            ["logits", *(n.replace("past_key_values", "present") for n in names)], feeds
        )
        cache = dict(zip(names, present, strict=True))
        np.testing.assert_allclose(logits[:, 0], expected.pop(0), atol=1e-5)


def test_tied_weights_are_stored_once(exported: Artifact) -> None:
    forms = exported.result["forms"]
    fp32, int8 = (
        onnx.load(exported.path / forms[f]["graph"], load_external_data=False)
        for f in ("fp32", "int8-weight")
    )
    head = next(node for node in int8.graph.node if "logits" in node.output)
    embedding = next(node for node in int8.graph.node if node.op_type == "GatherBlockQuantized")
    assert head.input[1] == embedding.input[0]
    place = {t.name: {e.key: e.value for e in t.external_data} for t in int8.graph.initializer}
    assert place[head.input[2]]["offset"] == place[embedding.input[2]]["offset"]
    weights = 258 * 32 + 2 * (32 * 128 + 64 * 32 + 3 * 32 * 48)
    rope = 2 * 64 * 8 * 4 + 5 * 32 * 4
    data = exported.path / "onnx/model_quantized.onnx_data"
    assert data.stat().st_size == pytest.approx(weights * (1 + 4 / 32) + rope, rel=0.05)
    assert fp32.graph.input[0].name == "input_ids"


def test_both_graphs_share_one_weights_file_and_agree(exported: Artifact) -> None:
    ids = np.random.default_rng(1).integers(0, 256, (2, 9))
    for form in exported.result["forms"]:
        last, every = (
            Decoder(exported.path, form=form),
            Decoder(exported.path, form=form, all_logits=True),
        )
        np.testing.assert_allclose(
            last.prefill(ids), every.score(ids)[:, -1], atol=1e-5 if form == "fp32" else 2e-2
        )
    located = {
        entry.value
        for graph in (exported.path / "onnx").glob("model_quantized*.onnx")
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert located == {"model_quantized.onnx_data"}


def test_the_cache_has_static_heads_and_the_graph_its_origin(exported: Artifact) -> None:
    student = open_artifact(exported.path.parent / "student")
    for form, facts in exported.result["forms"].items():
        proto = onnx.load(exported.path / facts["graph"], load_external_data=False)
        shapes = [v.type.tensor_type.shape.dim for v in proto.graph.input if "past" in v.name]
        assert all(dims[1].dim_value == 2 and dims[3].dim_value == 16 for dims in shapes)
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        assert metadata["limbeck.student"] == student.digest
        assert metadata["limbeck.recipe"] == pico_recipe().digest
        assert metadata["limbeck.export"] == fingerprint(pico_recipe().resolved()["export"])
        assert json.loads(metadata["limbeck.versions"]) == exported.manifest["versions"]
        versions = exported.manifest["versions"].keys()
        assert {"torch", "onnx"} < versions
        assert versions & {"onnxruntime", "onnxruntime-gpu"}
        assert metadata["limbeck.form"] == form
        assert metadata["limbeck.logits"] == "last"


def test_the_folder_is_what_clients_expect(exported: Artifact) -> None:
    config = json.loads((exported.path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert "chat_template" in config
    assert json.loads((exported.path / "genai_config.json").read_text())["model"]["decoder"][
        "filename"
    ] == ("onnx/model_quantized.onnx")
    card = (exported.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnx\n")
    assert "| letters | 5.000 | 4.500 |" in card
    assert "| teacher one | /models/one |" in card
    assert "| form | letters | numbers |" in card
    assert (
        f"| `int8-weight` | {exported.result['forms']['int8-weight']['bytes'] / 1e6:.1f} |" in card
    )
    assert exported.manifest["parents"] == {
        "student": open_artifact(exported.path.parent / "student").digest
    }
    assert exported.result["shipped"] == "int8-weight"
    assert exported.result["backend"]["why"].startswith("auto: ")


def test_clients_get_the_chat_template_without_the_marks_of_training(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text("a {%- generation -%} b {% endgeneration %} c")
    write_client_files(model, tmp_path, graphs=[], shipped=form_files(tmp_path, "fp32"), genai=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "a {%- if true -%} b {% endif %} c"
    assert (tmp_path / "chat_template.jinja").read_text() == config["chat_template"]


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        pytest.param("lora", True, id="lora-known licence"),
        pytest.param("lora", False, id="lora-unknown licence", marks=pytest.mark.slow),
        pytest.param("shrink", True, id="shrink-known licence", marks=pytest.mark.slow),
        pytest.param("shrink", False, id="shrink-unknown licence"),
    ],
)
def test_the_card_says_what_the_student_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, known: bool
) -> None:
    """Distilled for real, from the hub and from folders that are gone when the card is written;
    read as the hub reads it.
    """
    names = ("base", "one", "two")
    for seed, name in enumerate(names):
        make_model(tmp_path / name, seed=seed, scale=0.2, **BASES["llama"])
        if known or name != "two":
            (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **_: str(tmp_path / repo.split("/")[1])
    )
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} is a number. " * 20}) + "\n" for n in range(40))
    )
    address = "hf://datasets/someone/texts@0a1b/train.jsonl"
    (texts / "dataset_info.json").write_text(
        json.dumps({"license": "cc-by-4.0", "download_checksums": {address: {}}})
    )
    plan = distillation("llama", kind, ["fp32", WEIGHT8]).resolved()
    plan["student"]["base"] = {"kind": "hub", "id": "someone/base"}
    plan["teachers"] = [
        {"name": "one", "model": {"kind": "hub", "id": "someone/one"}},
        {"name": "two", "model": {"kind": "local", "path": str(tmp_path / "two")}},
    ]
    plan["data"]["domains"].append(
        {"name": "rows", "text": {"kind": "datasets", "path": str(texts)}}
    )
    recipe = parse_recipe(plan)
    student = compress.distill(recipe=recipe, out=tmp_path / "student")
    for name in (*names, "texts"):
        shutil.rmtree(tmp_path / name)
    exported = export_student(student=student.path, out=tmp_path / "onnx", recipe=recipe)

    text = (exported.path / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    licence = "apache-2.0" if known else "unknown"
    assert header["license"] == licence
    assert header["base_model"] == "someone/base"
    assert header["datasets"] == ["someone/texts"]
    assert header["pipeline_tag"] == "text-generation"
    assert "int8-weight" in header["tags"]
    assert header["teachers"] == [
        {"name": "one", "model": "hub: id someone/one, revision main", "license": "apache-2.0"},
        {"name": "two", "model": f"local: path {tmp_path / 'two'}", "license": licence},
    ]
    assert header["digests"] == {"recipe": recipe.digest, "student": student.digest}
    card = ModelCard(text).data
    assert card.model_name == recipe.name
    assert [
        (r.task_type, r.dataset_name, r.dataset_type, r.metric_type)
        for r in card.eval_results or ()
    ] == [
        ("text-generation", "code, held out", "code", "nll"),
        ("text-generation", "rows, held out", "someone/texts", "nll"),
    ]
    whose = "the student in torch, before it was rounded to int8-weight"
    assert {r.metric_name for r in card.eval_results or ()} == {f"nats a token, of {whose}"}
    assert f"Of {whose}, and its teachers." in text
    assert [r.metric_value for r in card.eval_results or ()] == pytest.approx(
        [*student.result["nll"].values()], abs=1e-5
    )
    said = "apache-2.0 | its README.md"
    for row in (
        f"| base model | hub: id someone/base, revision main | {said} |",
        f"| teacher one | hub: id someone/one, revision main | {said} |",
        f"| teacher two | local: path {tmp_path / 'two'} | {said if known else 'unknown | '} |",
        f"| text rows | datasets: path {texts} | cc-by-4.0 | dataset_info.json |",
        "| text code | stdlib: paths ['abc.py'] | PSF-2.0 | Python, whose standard library it is |",
        f"| made of teacher two | `{student.manifest['parents']['teacher two']}` |",
    ):
        assert row in text


def test_the_card_of_a_student_that_says_nothing_of_licences(exported: Artifact) -> None:
    text = (exported.path / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "unknown"
    assert header["teachers"] == [{"name": "one", "model": "/models/one", "license": "unknown"}]
    assert not {"base_model", "datasets"} & header.keys()
    assert "| teacher one | /models/one | unknown |  |" in text
    assert "transformers.js (`dtype: q8`)" in text
    assert "optimum-onnx" not in text  # which would take the heads to be 32 / 4 wide; they are 16


def test_genai_generates_the_same_tokens(exported: Artifact) -> None:
    import onnxruntime_genai as genai

    prompt = [10, 200, 33, 47]
    model = genai.Model(str(exported.path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = list(generator.get_sequence(0))[4:]
    ours = list(Decoder(exported.path).generate(prompt, 16, stop_ids={256}))
    assert ours == [int(token) for token in theirs if token != 256]


def test_a_second_export_is_skipped(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.stage.write", None)
    again = export_student(
        student=exported.path.parent / "student", out=exported.path, recipe=pico_recipe()
    )
    assert again.digest == exported.digest


def test_census_says_where_each_node_runs(exported: Artifact) -> None:
    for form in exported.result["forms"].values():
        assert form["census"]["runs_on"].keys() == {"CPUExecutionProvider"}
        runs = form["census"]["runs_on"]["CPUExecutionProvider"]
        assert (
            runs["GroupQueryAttention"] == form["census"]["operators"]["GroupQueryAttention"] == 2
        )
    assert runs["MatMulNBits"] == 11


def test_rounding_to_blocks() -> None:
    weights = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    weights[2, :16] = 0
    for how in (Blockwise(8, 16), Blockwise(8, 16, True), Blockwise(4, 16), Blockwise(4, 16, True)):
        codes, scales, zeros = quantize_blocks(weights, how)
        assert codes.shape == (5, 3, 16)
        assert scales.shape == zeros.shape == (5, 3)
        assert codes.max() < 2**how.bits
        assert how.zero_points or (zeros == 2 ** (how.bits - 1)).all()
        back = (codes.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
        # A zero point is itself rounded, which costs the ends of a block up to half a step more.
        worst = scales * (1 if how.zero_points else 0.5)
        assert (
            np.abs(back.reshape(5, 48)[:, :40] - weights)
            <= np.repeat(worst, 16, axis=1)[:, :40] * 1.001
        ).all()
        assert (back.reshape(5, 48)[:, 40:] == 0).all()
        assert (back[2, 0] == 0).all()
    columns, scale = quantize_columns(weights)
    assert np.abs(columns).max() == 127
    assert (np.abs(columns * scale[:, None] - weights) <= scale[:, None] * 0.501).all()
    assert pack_nibbles(np.array([[1, 2, 15]], np.uint8)).tolist() == [[0x21, 0x0F]]
    assert [block_size_for(width) for width in (576, 768, 96, 48, 24)] == [64, 128, 32, 16, 16]


def test_what_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"no complete artifact here"):
        export_student(student=model, out=tmp_path / "out", recipe=pico_recipe())
    gpt2 = make_model(tmp_path / "gpt2", model_type="gpt2", n_embd=32, n_head=4, n_layer=1)
    with pytest.raises(
        ModelError, match=r"cannot build GPT2LMHeadModel .* use a student of .* llama"
    ):
        build_genai(gpt2, tmp_path, {})


def test_every_form_ships_from_one_folder(tiny: Factory) -> None:
    """int8-dynamic and int4-weight, head in 8 bits and tied, and what a provider without kernels
    says.
    """
    forms = ["fp32", "int8-dynamic", {"kind": "int4-weight", "block_size": 16}]
    exported = tiny.exported(forms=forms, sizes={"scale": 0.02})
    assert exported.result["shipped"] == "int4-weight"
    operators = {
        name: form["census"]["operators"] for name, form in exported.result["forms"].items()
    }
    assert operators["int4-weight"]["MatMulNBits 4-bit block 16"] == 4  # two layers of gate and up
    assert (
        operators["int4-weight"]["MatMulNBits 8-bit block 32"] == 7
    )  # two of q/k/v, out and down, and the head
    assert operators["int8-dynamic"]["MatMulIntegerToFloat int8"] == 6
    assert operators["int8-dynamic"]["QuantizeLinear"] == 4  # gate and up share their input's
    for name in ("int8-dynamic", "int4-weight"):
        facts = exported.result["forms"][name]
        graph = onnx.load(exported.path / facts["graph"], load_external_data=False).graph
        head = next(node for node in graph.node if "logits" in node.output)
        assert (
            head.input[1]
            == next(n for n in graph.node if n.op_type == "GatherBlockQuantized").input[0]
        )
        assert facts["rounding"]["head"] == {"bits": 8, "block": 32, "zero_points": False}
        assert facts["parity"]["failures"] == []
    # A scale a token: what else is in the batch changes nothing.
    ids = np.random.default_rng(3).integers(0, 256, (3, 12))
    decoder = Decoder(exported.path, form="int8-dynamic")
    np.testing.assert_allclose(decoder.prefill(ids)[:1], decoder.prefill(ids[:1]), atol=1e-6)
    assert verify_parity(exported.path).keys() == {"fp32", "int8-dynamic", "int4-weight"}
    with pytest.raises(
        EnvironmentalError,
        match=r"no kernel for the products of int8-dynamic.*form int8-weight there",
    ):
        Decoder(exported.path, form="int8-dynamic", provider="cuda")


@pytest.mark.parametrize(
    ("form", "stem"),
    [
        ("int8-weight", "model_quantized"),
        ("int8-dynamic", "model_int8"),
        ("int4-weight", "model_q4"),
    ],
)
def test_names_are_those_of_transformers_js(tmp_path: Path, form: str, stem: str) -> None:
    assert form_files(tmp_path, form) == Graphs(
        tmp_path / f"onnx/{stem}.onnx",
        tmp_path / f"onnx/{stem}_all_logits.onnx",
        tmp_path / f"onnx/{stem}.onnx_data",
    )
