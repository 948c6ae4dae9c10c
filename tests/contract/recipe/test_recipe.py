"""Recipes: every mistake is reported at once and says what to change; nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import find_recipe, load_recipe, parse_recipe
from limbeck.contract.recipe.reading import RECIPES, load_yaml, load_yaml_texts
from tests.pico import pico_recipe

MINIMAL = """
name: mine
data:
  domains: [{name: code, text: {kind: stdlib, paths: [abc.py]}}]
  block: 32
student: {kind: lora, base: {kind: random, config: {model_type: llama}}}
training: {tokens: 64, batch_tokens: 32}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def mistakes(tree: dict[str, Any]) -> list[str]:
    """The lines of the error that `tree` raises."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree)
    first, *lines = str(caught.value).splitlines()
    assert first == f"recipe: {len(lines)} mistake{'s' * (len(lines) > 1)}"
    return [line.strip() for line in lines]


def plain(**over: Any) -> dict[str, Any]:
    return pico_recipe().resolved() | over


def teacher(name: str = "t", **over: Any) -> dict[str, Any]:
    return {"name": name, "model": {"kind": "local", "path": "somewhere"}} | over


# Mistakes -----------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once_with_path_and_remedy() -> None:
    found = mistakes(
        {
            "name": "Not A Name",
            "teachers": [
                teacher(quantise="int8"),
                {"name": "b", "model": {"kind": "hubb", "id": "x"}},
            ],
            "data": {
                "domains": [{"name": "code", "text": {"kind": "stdlib"}}],
                "heldout": {"every": "often"},
            },
            "student": {"base": {"kind": "random", "config": {}}},
            "fusion": {"weights": {"kind": "entropy", "sharpness": -1}},
            "traning": {},
        }
    )
    by_path = {line.split(":")[0]: line for line in found}
    assert set(by_path) == {
        "name",
        "teachers.0.quantise",
        "teachers.1.model.kind",
        "data.domains.0.text.paths",
        "data.heldout.every",
        "student",
        "fusion.weights.sharpness",
        "training",
        "traning",
    }
    assert (
        by_path["teachers.0.quantise"]
        == "teachers.0.quantise: unknown key; did you mean `quantize`?"
    )
    assert by_path["teachers.1.model.kind"].startswith(
        "teachers.1.model.kind: found 'hubb', expected one of "
    )
    assert by_path["teachers.1.model.kind"].endswith("did you mean `hub`?")
    assert by_path["data.domains.0.text.paths"].startswith(
        "data.domains.0.text.paths: missing; add it (Paths or globs"
    )
    assert "found 'often'" in by_path["data.heldout.every"]
    assert "it should be a valid integer" in by_path["data.heldout.every"]
    assert by_path["student"] == "student: needs a `kind:` that says which choice this is"
    assert (
        "found -1; it should be greater than 0 (Softmax temperature"
        in by_path["fusion.weights.sharpness"]
    )
    assert by_path["training"] == "training: missing; add it (The loop.)"
    assert by_path["traning"] == "traning: unknown key; did you mean `training`?"


def test_an_unknown_key_without_a_near_one_names_the_known_ones() -> None:
    [line] = mistakes(plain(bench={"zzz": 1}))
    assert line.startswith(
        "bench.zzz: unknown key; remove it; known here: device, min_blocks, minutes, new_tokens"
    )


def test_a_field_of_another_choice_is_unknown() -> None:
    [line] = mistakes(plain(fusion={"weights": {"kind": "uniform", "sharpness": 0.1}}))
    assert line.startswith("fusion.weights.sharpness: unknown key")


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ({"seed": -1}, "seed: found -1; it should be greater than or equal to 0"),
        ({"seed": True}, "seed: found True; it should be a number"),
        (
            {"training": {"learning_rate": True}},
            "training.learning_rate: found True; it should be a number",
        ),
        ({"seed": 1.5}, "seed: found 1.5; it should be a valid integer"),
        ({"name": 5}, "name: found 5; it should be a valid string"),
        ({"data": {"domains": [], "block": 32}}, "data.domains: found []"),
        ({"gates": {"max_size_mb": float("nan")}}, "gates.max_size_mb: found nan"),
        ({"gates": {"max_size_mb": float("inf")}}, "gates.max_size_mb: found inf"),
        ({"gates": None}, "gates: found None"),
        (
            {"export": {"forms": ["fp32", "int3"]}},
            "export.forms.1.kind: found 'int3', expected one of `fp32`, ",
        ),
        ({"export": {"forms": []}}, "export.forms: found []"),
        (
            {"training": {"precision": "fp16"}},
            "training.precision: found 'fp16'; it should be 'auto', 'fp32' or 'bf16' (Number type",
        ),
        ({"features": {"layers": [[0, 1]]}}, "features.layers.0.0: found 0"),
        (
            {"fusion": {"calibration": {"kind": "fit", "bounds": [1]}}},
            "fusion.calibration.bounds.1: missing",
        ),
    ],
)
def test_wrong_types_and_ranges(over: dict[str, Any], expected: str) -> None:
    found = mistakes(plain(**over))
    assert len(found) == 1, found
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ({"teachers": [teacher("a"), teacher("a")]}, "teachers: 'a' is there 2 times"),
        (
            {"training": {"tokens": 100, "batch_tokens": 50}},
            "training.batch_tokens: found 50; it should be a multiple of data.block (32), for "
            "example 32",
        ),
        (
            {"training": {"tokens": 16, "batch_tokens": 32}},
            "training.tokens: found 16; it should be at least one step",
        ),
        (
            {"export": {"forms": ["int8-weight", "fp32"]}},
            "export.forms.0: found 'int8-weight'; put fp32 first",
        ),
        ({"export": {"forms": ["gguf-q8_0"]}}, "export.forms.0: found 'gguf-q8_0'; put fp32 first"),
        (
            {"export": {"forms": ["gguf-f16"], "recover": {"tokens": 64}}},
            "export.forms.0: found 'gguf-f16'; put fp32 first",
        ),
        ({"export": {"forms": ["fp32", "fp32"]}}, "export.forms: 'fp32' is there 2 times"),
        (
            {"student": {"kind": "fresh", "config": {}}},
            "student.kind: a fresh student takes its tokenizer",
        ),
        (
            {"fusion": {"calibration": {"kind": "fit", "bounds": [2, 1]}}},
            "fusion.calibration.bounds: found [2.0, 1.0]",
        ),
        (
            {
                "teachers": [teacher("a")],
                "fusion": {"weights": {"kind": "static", "values": {"b": 1}}},
            },
            "fusion.weights.values: found ['b']; name each teacher once: ['a']",
        ),
        (
            {
                "teachers": [teacher("a")],
                "fusion": {"weights": {"kind": "static", "values": {"a": 0}}},
            },
            "fusion.weights.values: all are 0",
        ),
        (
            {
                "teachers": [teacher("a")],
                "fusion": {"weights": {"kind": "posterior", "prior": {"nowhere": {"a": 1}}}},
            },
            "fusion.weights.prior.nowhere: no domain 'nowhere'; the domains are ",
        ),
        (
            {"gates": {"max_loss_vs_best_teacher": 0}},
            "gates.max_loss_vs_best_teacher: there are no teachers",
        ),
        ({"gates": {"min_decode_speedup": 3}}, "gates.min_decode_speedup: there are no teachers"),
    ],
)
def test_contradictions(over: dict[str, Any], expected: str) -> None:
    found = mistakes(plain(**over))
    assert len(found) == 1, found
    assert found[0].startswith(expected)


# Reading ------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_folder_and_its_text(tmp_path: Path) -> None:
    path = write(tmp_path, "# why\n" + MINIMAL)
    loaded = load_recipe(path)
    assert (loaded.name, loaded.folder, loaded.text) == ("mine", tmp_path, "# why\n" + MINIMAL)
    assert parse_recipe(loaded.resolved()).resolved() == loaded.resolved()


def test_the_digest_is_of_what_is_trained_not_of_what_is_asked_afterwards(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    one = load_recipe(path)
    assert (
        one.digest == load_recipe(path, overrides=["gates.max_size_mb=1", "bench.minutes=9"]).digest
    )
    assert one.digest != load_recipe(path, overrides=["seed=1"]).digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: " + "1:" * 400_000 + "1\n", "line 1, column 7: not valid YAML: '1:1:"),
        ("name: 1:1:1.5\n", "'1:1:1.5' is no number of a field; put it in quotes if it is text"),
        (f"seed: 0x{'F' * 5000}\n", "is no number of a field"),
        ("name: !!map [a]\n", "this value is no map; leave out the type !!map"),
        ("name: !!seq {a: 1}\n", "this value is no seq; leave out the type !!seq"),
        ("name: !!map a\n", "'a' is no map; leave out the type !!map"),
        ("name: a\nname: b\n", "line 2, column 1: not valid YAML: key 'name' is written twice"),
        ("data: {block: 1, block: 2}\n", "key 'block' is written twice"),
        ("name: [a\n", "not valid YAML"),
        ("- a\n", "expected a mapping of recipe fields at the top, found a list"),
        ("", "expected a mapping of recipe fields at the top, found nothing"),
        (
            "x: !!python/object:os.system {}\n",
            "of the type python/object:os.system, which no field takes",
        ),
        (
            "name: {{ foo }}\n",
            "line 1, column 8: not valid YAML: a key cannot be a mapping; put it in quotes",
        ),
        (
            "name: a\n? [a, b]\n",
            "line 2, column 3: not valid YAML: a key cannot be a list; put it in quotes",
        ),
        (
            "name: 2024-13-45\n",
            "line 1, column 7: not valid YAML: '2024-13-45' is of the type timestamp, which "
            "no field takes; put",
        ),
        ("seed: !!int ''\n", "line 1, column 7: not valid YAML: '' is no int"),
        ("seed: !!int one\n", "line 1, column 7: not valid YAML: 'one' is no int"),
        ("seed: !!bool one\n", "line 1, column 7: not valid YAML: 'one' is no bool"),
        (
            "seed: !!timestamp one\n",
            "line 1, column 7: not valid YAML: 'one' is of the type timestamp",
        ),
    ],
)
def test_yaml_mistakes(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "mine.yaml"))
    assert expected in str(caught.value)


def test_aliases_of_single_values_count_as_one_each() -> None:
    aliases = ", ".join(["*x"] * 1000)
    assert load_yaml(f"a: &x 3\nb: [{aliases}]") == {"a": 3, "b": [3] * 1000}


@pytest.mark.parametrize("read", [load_yaml, load_yaml_texts])
def test_half_a_character_is_no_yaml(read: Callable[[str], Any]) -> None:
    """An argument of the command line that is no UTF-8 reaches Python as lone surrogates."""
    with pytest.raises(yaml.YAMLError, match=r"surrogates not allowed|unacceptable character"):
        read("name: \udcff")
    with pytest.raises(RecipeError, match=r"--set name=.*: the value is not valid YAML: "):
        load_recipe("pico", overrides=["name=\udcff"])


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_missing_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match=r"did you mean smollm2/135m-two-experts\?"):
        find_recipe("smollm2/135m-two-expert")
    with pytest.raises(RecipeError, match="`limbeck recipes` lists"):
        find_recipe("zzzzzzzz")


@pytest.mark.parametrize("reference", ["pico", "pico.yaml", "recipes/pico.yaml", "recipes/pico"])
def test_shipped_names(tmp_path: Path, reference: str) -> None:
    assert find_recipe(reference, folder=tmp_path) == RECIPES / "pico.yaml"


def test_a_file_beside_comes_before_a_shipped_name(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL, "pico.yaml")
    assert find_recipe("pico.yaml", folder=tmp_path) == path


# Extends ------------------------------------------------------------------------------------------


def test_extends_merges_key_by_key_and_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", MINIMAL)
    path = write(
        tmp_path,
        "extends: base/mine.yaml\nname: child\ntraining: {learning_rate: 0.5}\n",
        "child.yaml",
    )
    child = load_recipe(path)
    assert (child.name, child.training.learning_rate, child.training.tokens) == ("child", 0.5, 64)
    assert child.folder == tmp_path


def test_extends_replaces_lists_and_choices_of_another_kind_whole(tmp_path: Path) -> None:
    write(
        tmp_path,
        MINIMAL + "teachers: [{name: a, model: {kind: local, path: x}}]\nfusion: {weights: {kind: "
        "entropy, sharpness: 2}}\n",
    )
    same = "extends: mine.yaml\nfusion: {weights: {floor: 0.5}}\n"
    weights = load_recipe(write(tmp_path, same, "same.yaml")).fusion.weights
    assert (
        weights.model_dump() | {"sharpness": 2.0, "floor": 0.5, "kind": "entropy"}
        == weights.model_dump()
    )
    other = (
        "extends: mine.yaml\nfusion: {weights: {kind: uniform}}\nteachers: [{name: b, model: "
        "{kind: local, path: y}}]\n"
    )
    child = load_recipe(write(tmp_path, other, "other.yaml"))
    assert child.fusion.weights.model_dump() == {"kind": "uniform"}
    assert [t.name for t in child.teachers] == ["b"]


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(
        RecipeError, match=r"extends itself \(.*a\.yaml -> .*b\.yaml -> .*a\.yaml\); remove one"
    ):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("value", "found"), [("[a]", "a list"), ("no", "a yes/no"), ("3", "a number")]
)
def test_extends_that_is_no_path(tmp_path: Path, value: str, found: str) -> None:
    with pytest.raises(
        RecipeError, match=f"extends: expected the path of a recipe file, found {found}"
    ):
        load_recipe(write(tmp_path, f"extends: {value}\n{MINIMAL}"))


def test_extends_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it is a folder, and `limbeck init` writes"):
        find_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"gone\.yaml: no such recipe file"):
        load_recipe(write(tmp_path, f"extends: gone.yaml\n{MINIMAL}"))


# --set --------------------------------------------------------------------------------------------


def test_set_changes_fields_of_mappings_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    loaded = load_recipe(
        path,
        overrides=[
            "training.tokens=128",
            "data.domains.0.name=other",
            "gates.max_size_mb=1.5",
            "export.forms=[fp32]",
            "student.base.config.hidden_size=8",
            "description=a=b",
            "training.patience=null",
        ],
    )
    assert loaded.training.tokens == 128
    assert loaded.data.domains[0].name == "other"
    assert loaded.gates.max_size_mb == 1.5
    assert [form.kind for form in loaded.export.forms] == ["fp32"]
    assert loaded.student.model_dump()["base"]["config"]["hidden_size"] == 8
    assert loaded.description == "a=b"
    assert loaded.training.patience is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.tokens", "expected key=value"),
        ("=3", "expected key=value"),
        ("training.tokens=[", "the value is not valid YAML"),
        (
            "name={{ foo }}",
            "the value is not valid YAML: a key cannot be a mapping; put it in quotes",
        ),
        ("name=2024-13-45", "the value is not valid YAML: '2024-13-45' is of the type timestamp"),
        ("data.domains.1.name=x", "'1' is no index of a list of 1"),
        ("data.domains.first.name=x", "'first' is no index"),
        ("data.domains.-1=x", "'-1' is no index"),
        ("name.inner=x", "lies inside a text, which has no fields"),
        ("name.inner.deep=x", "lies inside a text, which has no fields"),
        ("training.tokenss=3", "training.tokenss: unknown key; did you mean `tokens`?"),
        ("training.tokens=many", "training.tokens: found 'many'"),
    ],
)
def test_bad_sets(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL), overrides=[override])
    assert expected in str(caught.value)


# The bench ----------------------------------------------------------------------------------------


def test_scenarios_and_runtimes_by_name_or_with_fields() -> None:
    url = "http://127.0.0.1:8000"
    asked = {
        "scenarios": [
            "single",
            {"kind": "offline", "batches": [1, 4]},
            {"kind": "server", "target": {"kind": "url", "url": url}},
            "cold",
        ],
        "runtimes": ["onnxruntime-genai", {"kind": "openai", "url": url}],
    }
    bench = pico_recipe(bench=asked).bench
    assert bench.scenario("offline").batches == (1, 4)
    assert bench.scenario("server").target.url == url
    assert bench.scenario("cold").repeats == 6
    assert [runtime.kind for runtime in bench.runtimes] == ["onnxruntime-genai", "openai"]
    assert pico_recipe().bench.scenario("cold") is None
    assert pico_recipe(bench=asked).digest == pico_recipe().digest


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        ({"scenarios": ["cold"]}, "bench.scenarios: single is missing"),
        ({"scenarios": ["single", "cold", "cold"]}, "bench.scenarios: 'cold' is there 2 times"),
        ({"scenarios": ["single", "clod"]}, "bench.scenarios.1"),
        ({"scenarios": ["single", {"kind": "cold", "batches": [1]}]}, "bench.scenarios.1"),
        ({"runtimes": [{"kind": "openai", "url": "localhost"}]}, "bench.runtimes.0"),
    ],
)
def test_wrong_scenarios_are_named(bench: dict[str, Any], message: str) -> None:
    assert any(message in line for line in mistakes(plain(bench=bench)))
