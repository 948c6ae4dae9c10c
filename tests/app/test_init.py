"""`limbeck init`: the student is the best that fits, and what is written runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner, Result

from compress.data.blocks import load_blocks
from compress.data.documents import documents
from limbeck.app import run as pipeline
from limbeck.app.cli import app
from limbeck.app.init.choice import choose_student, cuts, sizes_of
from limbeck.app.init.inputs import _fields
from limbeck.app.plan import form_sizes
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import DatasetText, load_recipe
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.texts import text_files
from limbeck.contract.sources.tokenizer import load_tokenizer
from tests.pico import make_model
from tests.servers.logprob_server import LogprobServer

LEGAL = "models/Legal"
SIZES: dict[str, Any] = {
    "max_position_embeddings": 256,
    "num_hidden_layers": 6,
    "vocab_size": 258,
    "scale": 0.05,
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(
        tmp_path / "models" / "Legal", seed=1, hidden_size=256, intermediate_size=512, **SIZES
    )
    make_model(
        tmp_path / "models" / "medical", seed=2, hidden_size=192, intermediate_size=512, **SIZES
    )
    words = " ".join(f"word{i % 97} of line {i}" for i in range(4000))
    (tmp_path / "text.txt").write_text(words)


def init(target: float, *more: str) -> Result:
    given = ["--teacher", "models/Legal", "--teacher", "models/medical", "--data", "text.txt"]
    return CliRunner().invoke(app, ["init", *given, "--target-mb", str(target), *more])


def test_the_student_is_the_best_that_fits(tmp_path: Path) -> None:
    found = []
    for target in (10.0, 2.2, 1.6, 1.3):
        result = init(target, "--out", f"for-{target}.yaml")
        assert result.exit_code == 0, result.output
        recipe = load_recipe(tmp_path / f"for-{target}.yaml")
        form = recipe.export.forms[-1].kind
        assert form_sizes(recipe)[form] <= target * 1e6
        assert len(recipe.text.splitlines()) <= 15
        assert recipe.text.startswith(f"# Written by `limbeck init` for {target:g} MB. Student: ")
        assert [t.name for t in recipe.teachers] == ["legal", "medical"]
        assert recipe.gates.max_size_mb == target
        assert recipe.student.model_dump()["base"]["path"].name == "medical"  # the smaller one
        # The verdict is on size and on what it costs in quality.
        gates = recipe.gates
        assert gates.max_loss_vs_best_teacher == 0.02
        # Of a cut it is said, here and in the file, that the loss cannot be expected to be met.
        said = "A cut heals slowly, and max_loss_vs_best_teacher will likely fail"
        assert (said in result.stdout) == (said in recipe.text) == (recipe.student.kind == "shrink")
        assert "distil: no merge can hold legal" in result.stdout  # of another shape
        assert gates.max_quantization_loss == {"int8-weight": 0.01, "int4-weight": 0.05}[form]
        found.append((recipe.student.kind, form))
    assert found[:2] == [("lora", "int8-weight"), ("lora", "int4-weight")]
    assert [kind for kind, _ in found[2:]] == ["shrink", "shrink"]


def test_a_cut_keeps_the_most_that_fits_in_either_form(tmp_path: Path) -> None:
    assert init(1.2, "--out", "cut.yaml").exit_code == 0
    recipe = load_recipe(tmp_path / "cut.yaml").resolved()
    tree, base = (
        {name: recipe[name] for name in ("name", "data", "training")},
        recipe["student"]["base"],
    )
    sizes = {str(student): (sizes_of(tree, student), student) for student, _ in cuts(tree, base)}
    most = 0.97 * 1.2
    fitting = [found for found in sizes.values() if min(found[0].values()) <= most]
    assert 0 < len(fitting) < len(sizes)
    planned, student = max(fitting, key=lambda found: found[0]["int8-weight"])
    chosen = choose_student(tree, [base], target_mb=1.2)
    assert chosen.student == student
    assert chosen.form == ("int8-weight" if planned["int8-weight"] <= most else "int4-weight")


def test_what_cannot_be_is_reported_and_nothing_is_written(tmp_path: Path) -> None:
    result = init(0.01)
    assert result.exit_code == 2
    assert "no student of that size from these models; the smallest is " in result.stderr
    assert init(10, "--data", "gone.txt").exit_code == 2
    assert (
        "no such folder, .gguf file, recipe, or hub id"
        in init(10, "--student", "models/gone/x").stderr
    )
    typo = init(10, "--student", "models/leagl")
    assert "--student models/leagl: no such folder" in typo.stderr
    assert "did you mean models/Legal?" in typo.stderr
    hub = init(10, "--student", "owner/leagl")  # no folder of the owner's name: taken for a hub id
    assert "--student owner/leagl: no folder of that name here, and as a model" in hub.stderr
    assert (
        "gone is no folder that can be written to" in init(10, "--out", "gone/recipe.yaml").stderr
    )
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert "latin.txt: not UTF-8 text" in init(10, "--data", "latin.txt").stderr
    (tmp_path / "table.csv").write_text("id,name\n1,a\n")
    assert "its rows have id, name, and it is unclear" in init(10, "--data", "table.csv").stderr
    (tmp_path / "empty").mkdir()
    assert "--data empty: no file with text there" in init(10, "--data", "empty").stderr
    assert not (tmp_path / "recipe.yaml").exists()
    (tmp_path / "recipe.yaml").write_text("mine")
    assert "is already there" in init(10).stderr
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_columns_of_an_arrow_file_are_those_of_its_schema(tmp_path: Path) -> None:
    """Text that a dictionary stands for is text, and so are views of it, which polars writes."""
    notes = pyarrow.array(["a", "b"]).dictionary_encode()
    views = pyarrow.array(["a", "b"], pyarrow.string_view())
    table = pyarrow.table({"notes": notes, "views": views, "size": [1, 2]})
    path = tmp_path / "rows.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    assert _fields(path) == {"notes": "text", "views": "text", "size": "int64"}
    path.write_bytes(b"of mine")
    with pytest.raises(DataError, match=r"--data .*rows\.arrow: not an Arrow file"):
        _fields(path)


def test_the_tokenizer_of_a_server_is_no_recipe() -> None:
    found = init(10, "--teacher", "http://x/v1=pico.yaml")
    assert found.exit_code == 2
    assert "pico.yaml is a recipe; name a folder or hub id with the tokenizer that" in found.stderr


def test_models_of_other_kinds_are_told_apart(tmp_path: Path) -> None:
    other = make_model(tmp_path / "models" / "v1.5-other", hidden_size=64, **SIZES)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = (
        tokenizer["model"]["vocab"][x] for x in "ba"
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    # The smallest of them is the student's base, unless another one is named.
    for student, others in ((), ["legal", "medical"]), (("--student", LEGAL), ["v1.5-other"]):
        result = init(10, "--teacher", "models/v1.5-other", *student)
        assert result.exit_code == 0
        named = r"teacher (\S+): another tokenizer; aligned with the student's"
        assert re.findall(named, result.stderr) == others
        (tmp_path / "recipe.yaml").unlink()
    written = (other / "tokenizer.json").read_text()
    words = tokenizer | {"model": {"type": "WordPiece", "vocab": tokenizer["model"]["vocab"],
                                   "unk_token": "a", "continuing_subword_prefix": "##",
                                   "max_input_chars_per_word": 100}}  # fmt: skip
    (other / "tokenizer.json").write_text(json.dumps(words))
    result = init(10, "--teacher", "models/v1.5-other", "--student", LEGAL)
    assert result.exit_code == 2
    assert "teacher v1.5-other: its tokenizer is WordPiece" in result.stderr
    (other / "tokenizer.json").write_text(written)
    config = json.loads((other / "config.json").read_text()) | {
        "architectures": ["BertForSequenceClassification"]
    }
    (other / "config.json").write_text(json.dumps(config))
    assert (
        "BertForSequenceClassification does not write text"
        in init(10, "--teacher", "models/v1.5-other").stderr
    )
    # An adapter is a teacher on the base that it names.
    adapter = tmp_path / "adapters" / "v2.1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "models/medical"}')
    assert init(10, "--teacher", "adapters/v2.1").exit_code == 0
    teacher = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["teachers"][2]
    base = {"kind": "local", "path": str(tmp_path / "models/medical")}
    assert teacher == {"name": "v2.1", "model": base, "adapter": str(adapter)}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a b", "id": "c"}, {"kind": "jsonl", "field": "text"}),
        ({"body": "a b", "id": 3}, {"kind": "jsonl", "field": "body"}),
        ({"messages": [{"role": "user", "content": "a"}]}, {"kind": "chat"}),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            {"kind": "chat", "field": "conversations"},
        ),
        (
            {"question": "a", "answer": "b"},
            {"kind": "chat", "field": "answer", "prompt": "question"},
        ),
        (
            {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": []},
            {"kind": "chat", "field": "chosen"},
        ),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            {"kind": "chat", "field": "output", "prompt": "instruction"},
        ),
        ({"title": "a", "body": "b"}, "its rows have title, body, and it is unclear"),
        ({"text": ["a"]}, r"its rows have text \(list\), and it is unclear which is the text"),
        (7, "line 2: int, where an object was expected"),
        (["a"], "not JSON: Extra data; expected one array, or one object a line"),
    ],
)
def test_rows_are_told_by_the_first_of_them(
    row: Any, form: dict[str, str] | str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"\n{json.dumps(row)}\n" * 500)
    result = init(10, "--data", "rows.jsonl")
    if isinstance(form, str):
        assert result.exit_code == 2
        assert re.search(form, result.stderr)
        return
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["data"]["domains"][1]["text"]["format"] == form
    mistakes = list(preflight(load_recipe(tmp_path / "recipe.yaml")))
    assert not [m for m in mistakes if "plain text" in m]


@pytest.mark.parametrize("kind", ["saved", "splits", "hub"])
def test_a_folder_with_a_dataset_is_read_as_one(tmp_path: Path, kind: str) -> None:
    """As `datasets` saves it, and as a hub keeps it, beside cards and other files."""
    rows = pyarrow.table({"text": ["a few words " * 9] * 500})
    folder, split = tmp_path / "set", None if kind == "saved" else "train"
    for part in ("train", "test") if kind == "splits" else ("train",):
        place = folder / part if kind == "splits" else folder
        place.mkdir(parents=True, exist_ok=True)
        with pyarrow.ipc.new_stream(place / "data-0.arrow", rows.schema) as stream:
            stream.write_table(rows)
        state = {"_data_files": [{"filename": "data-0.arrow"}], "_split": part}
        (place / "state.json").write_text(json.dumps(state))
    if kind == "splits":
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    if kind == "hub":
        shutil.rmtree(folder)
        (folder / "data").mkdir(parents=True)
        for part in ("train", "test"):
            pyarrow.parquet.write_table(rows, folder / f"data/{part}-00000-of-00001.parquet")
    (folder / "README.md").write_text("# card")
    result = init(10, "--data", "set")
    assert result.exit_code == 0, result.output
    recipe = load_recipe(tmp_path / "recipe.yaml")
    source = recipe.data.domains[1].text
    assert isinstance(source, DatasetText)
    assert [source.split, source.format.kind] == [split, "rows"]
    files = text_files(source, folder=recipe.folder)
    texts = [text for file in files for text in documents(file, source.format)]  # type: ignore[arg-type]
    assert texts == rows["text"].to_pylist()
    assert preflight(recipe) == []


def test_little_text_is_not_read_over_and_over(tmp_path: Path) -> None:
    def tokens(text: str) -> int:
        (tmp_path / "recipe.yaml").unlink(missing_ok=True)
        (tmp_path / "text.txt").write_text(text)
        assert init(10).exit_code == 0
        return int(yaml.safe_load((tmp_path / "recipe.yaml").read_text())["training"]["tokens"])

    lines = ("word " * 119 + "end.\n") * 10  # each a piece
    texts = (lines, "word " * 4000, "word " * 200_000)
    assert [tokens(text) for text in texts] == [20 * 1024, 48 * 1024, 200 * 1024]


def test_too_little_text_is_refused_and_just_enough_becomes_blocks(tmp_path: Path) -> None:
    few = "word " * 56
    (tmp_path / "text.txt").write_text(few)
    refused = init(10)
    assert refused.exit_code == 2
    assert (
        "--data text.txt: too little text: found 1 of at least 10 rows, or pieces of up to 1024"
        in refused.stderr
    )
    assert "a single document needs about 10240 characters" in refused.stderr
    assert not (tmp_path / "recipe.yaml").exists()
    # Rows that are shorter than a block are joined, or not one block would be full.
    for name, text in (
        ("text.txt", few * 40),
        ("rows.jsonl", '{"text": "a few words of a row"}\n' * 60),
    ):
        out = f"{name}.yaml"
        data = ["--data", name] if name == "rows.jsonl" else []
        (tmp_path / name).write_text(text)
        assert init(10, *data, "--out", out).exit_code == 0
        recipe = load_recipe(tmp_path / out)
        assert recipe.data.packing == ("stream" if data else "document")
        blocks = load_blocks(recipe, load_tokenizer(tmp_path / "models" / "medical"))
        assert all(len(domain.train_ids) and len(domain.heldout) for domain in blocks)


@pytest.mark.slow  # test_every_recipe_runs_to_its_verdict_shrunk does the same with other recipes
def test_what_is_written_runs_to_a_verdict(tmp_path: Path) -> None:
    assert init(10).exit_code == 0
    few = [
        "training.tokens=2048",
        "bench.minutes=0.05",
        "bench.min_blocks=3",
        "data.heldout.blocks=2",
    ]
    report = pipeline.run(
        load_recipe(tmp_path / "recipe.yaml", overrides=few), out=tmp_path / "run"
    )
    (size,) = (gate for gate in report.verdict.gates if gate.name == "max_size_mb")
    assert size.status == "pass"
    asked = {"max_size_mb", "max_loss_vs_best_teacher", "max_quantization_loss"}
    assert {gate.name for gate in report.verdict.gates} == asked


@pytest.mark.parametrize(
    ("given", "domain", "count"),
    [
        ("texts", "texts", 3),
        ("texts/*.txt", "texts", 2),
        ("texts/a [2024] notes.txt", "a-2024-notes", 1),
        ("~notes.txt", "notes", 1),
        ("texts/**/*.txt", "texts", 3),
    ],
)
def test_data_is_a_folder_a_glob_or_a_file_of_any_name(
    tmp_path: Path, given: str, domain: str, count: int
) -> None:
    words = (tmp_path / "text.txt").read_text()
    for name in ("a [2024] notes.txt", "b.txt", "deeper/c.txt", ".hidden", "../~notes.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(words)
    result = CliRunner().invoke(
        app, ["init", "--teacher", "models/medical", "--data", given, "--target-mb", "10"]
    )
    assert result.exit_code == 0, result.output
    recipe = load_recipe(tmp_path / "recipe.yaml")
    ((name, text),) = recipe.texts()
    assert name == domain
    found = text_files(text, folder=recipe.folder)
    assert len(found) == count
    assert all(path.read_text() == words for path in found)


def test_data_of_several_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "x"}\n')
    result = init(10, "--data", "texts")
    assert result.exit_code == 2
    assert "found files of several kinds: b.jsonl (jsonl), a.txt (text)" in result.stderr


def test_the_base_of_an_adapter_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": "owner/medical", "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    given = ["init", "--teacher", "adapter", "--data", "text.txt", "--target-mb", "10"]
    for base in ("models/medical", "owner/medical=models/medical"):
        (tmp_path / "recipe.yaml").unlink(missing_ok=True)
        result = CliRunner().invoke(app, [*given, "--base", base])
        assert result.exit_code == 0, result.output
        (teacher,) = load_recipe(tmp_path / "recipe.yaml").teachers
        assert teacher.model.model_dump()["path"] == tmp_path / "models" / "medical"
        assert teacher.adapter == tmp_path / "adapter"
    (tmp_path / "recipe.yaml").unlink()
    result = CliRunner().invoke(app, [*given, "--base", "models/gone"])
    assert "--base models/gone: no config.json of a model there" in result.stderr
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert "--teacher adapter: is an adapter on owner/medical" in result.stderr
    assert "add --base owner/medical=PATH" in result.stderr
    config["base_model_name_or_path"] = None  # type: ignore[assignment]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, given)
    assert "names no base model; add --base PATH" in result.stderr


def test_a_block_is_no_longer_than_a_teacher_reads(tmp_path: Path) -> None:
    sizes = SIZES | {"max_position_embeddings": 72}
    make_model(tmp_path / "models" / "short", hidden_size=32, intermediate_size=64, **sizes)
    teachers = ["--teacher", "models/short", "--teacher", "models/medical"]
    given = ["init", *teachers, "--data", "text.txt", "--target-mb", "10"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert load_recipe(tmp_path / "recipe.yaml").data.block == 64


def test_a_teacher_may_be_behind_a_server(tmp_path: Path) -> None:
    with LogprobServer(tmp_path / "models" / "Legal") as server:
        found = init(40, "--teacher", f"{server.url}=models/Legal")
        assert found.exit_code == 0, found.stderr
        tree = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
        tokenizer = {"kind": "local", "path": str(tmp_path / "models" / "Legal")}
        assert tree["teachers"][2] == {
            "name": "big",
            "model": {"kind": "server", "url": server.url, "model": "big", "tokenizer": tokenizer},
        }
        preflight(load_recipe("recipe.yaml"))
        (tmp_path / "recipe.yaml").unlink()
        assert init(40, "--teacher", f"{server.url}#big=models/Legal").exit_code == 0
        (tmp_path / "recipe.yaml").unlink()
        for teacher, problem in {
            server.url: f"write {server.url}=TOKENIZER",
            f"{server.url}#gone=models/Legal": "no model 'gone'; it has big",
            f"{server.url}=models/Leagl": "did you mean models/Legal?",
            "http://127.0.0.1:9=models/Legal": "no OpenAI-compatible server answers there",
        }.items():
            found = init(40, "--teacher", teacher)
            assert found.exit_code in (2, 3)
            assert problem in found.stderr
        served = ["init", "--teacher", f"{server.url}=models/Legal", "--data", "text.txt"]
        alone = CliRunner().invoke(app, [*served, "--target-mb", "40"])
        assert "name one with --student" in alone.stderr
        student = init(40, "--student", server.url)
        assert "only a --teacher may be behind a server" in student.stderr
    assert not (tmp_path / "recipe.yaml").exists()
