"""Files and folders as people name and fill them."""

from __future__ import annotations

import csv
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.data.blocks import conversations, load_blocks
from compress.data.documents import documents
from compress.data.packing import Piece, special_prefix, tokenise
from limbeck.app.plan import plan_recipe
from limbeck.app.products import mistakes
from limbeck.contract.errors import DataError, ModelError, RecipeError
from limbeck.contract.models.tokens import tokenizer_size
from limbeck.contract.recipe import (
    ChatRows,
    DatasetText,
    FileText,
    JsonLines,
    ParquetRows,
    PlainText,
    PythonStrings,
    Recipe,
    Rows,
)
from limbeck.contract.sources.hub import hub_config, hub_snapshot
from limbeck.contract.sources.models import require_fits
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.texts import text_files
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.runtime.text import load_text
from tests.pico import make_model, make_tokenizer, pico_recipe

# Text files --------------------------------------------------------------------------------------


def found(root: Path, *paths: str, **fields: Any) -> list[str]:
    source = FileText.model_validate({"kind": "files", "paths": paths, **fields})
    return [path.relative_to(root).as_posix() for path in text_files(source, folder=root)]


def test_a_literal_name_comes_before_a_glob_and_folders_give_their_files(tmp_path: Path) -> None:
    for name in ("my [2024] notes.txt", "my 2 notes.txt", "a[b]/x.txt", "a[b]/y.md",
                 "a[b]/.hidden", "rows/1.jsonl", "rows/deep/2.jsonl",
                 "rows/readme.md"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    assert found(tmp_path, "my [2024] notes.txt") == ["my [2024] notes.txt"]
    assert found(tmp_path, "my [12] notes.txt") == ["my 2 notes.txt"]
    assert found(tmp_path, "a[b]/*.txt") == ["a[b]/x.txt"]
    assert found(tmp_path, str(tmp_path / "a[b]")) == ["a[b]/x.txt", "a[b]/y.md"]
    assert found(tmp_path, "rows", format={"kind": "jsonl"}) == [
        "rows/1.jsonl",
        "rows/deep/2.jsonl",
    ]
    assert found(tmp_path, "rows/**/*.jsonl") == ["rows/1.jsonl", "rows/deep/2.jsonl"]
    with pytest.raises(
        DataError,
        match=r"mi \[2024\] notes.txt: no such file, did you mean .*my \[2024\] notes.txt\?",
    ):
        found(tmp_path, "mi [2024] notes.txt")
    for hopeless in ("a\0b", "x" * 5000):
        with pytest.raises(DataError, match="no such file"):
            found(tmp_path, hopeless)


def test_a_file_counts_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    """Read twice, a text would be both trained on and held out. Two links in a circle have names
    without end."""
    for name in ("text/a.txt", "text/sub/b.txt", "elsewhere/c.txt", ".hidden/d.txt", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    links = {
        "text/loop": ".",
        "text/sub/up": "..",
        "text/a again.txt": "a.txt",
        "text/far": "../elsewhere",
        "text/.dots": "../elsewhere",
        "more": "text",
        "text/self": "self",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    right = ["a.txt", "b.txt", "c.txt"]
    for paths in (
        ["text/**/*.txt"],
        ["text/**"],
        ["text"],
        ["text", "more/**/*.txt", "text/sub/../a.txt"],
    ):
        source = FileText.model_validate({"kind": "files", "paths": paths})
        places = [path.resolve() for path in text_files(source, folder=tmp_path)]
        assert len(places) == 3
        assert sorted(place.name for place in places) == right
    # A glob may enter the folder itself by another name; a link to itself is none.
    by_name = ["text/far/c.txt", "text/loop/a again.txt", "text/loop/sub/b.txt"]
    assert found(tmp_path, "text/*/**/*.txt") == by_name
    assert found(tmp_path, "**/sub/*.txt") == ["more/sub/b.txt"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "set" / "b.jsonl").symlink_to("a.jsonl")
    saved = DatasetText.model_validate({"kind": "datasets", "path": "set"})
    assert text_files(saved, folder=tmp_path) == [tmp_path / "set" / "a.jsonl"]
    assert found(tmp_path, "*/*.txt") == ["elsewhere/c.txt", "more/a again.txt"]


def test_an_array_is_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    for indent in (None, 2):
        (tmp_path / "a.jsonl").write_text(json.dumps(rows, indent=indent))
        assert list(documents(tmp_path / "a.jsonl", JsonLines(kind="jsonl"))) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('["one"]\n["two"]\n')
    with pytest.raises(DataError, match=r"b.jsonl: not JSON: Extra data; expected one array"):
        list(documents(tmp_path / "b.jsonl", JsonLines(kind="jsonl")))


def test_tables_are_read_as_spreadsheets_write_them(tmp_path: Path) -> None:
    """Cells with commas, quotes and line ends; a mark of UTF-8 before them, as Excel has it."""
    rows = [{"id": "1", "text": "hello"}, {"id": "2", "text": 'x, "y"\n\tz  '}]
    form = Rows(kind="rows")
    for name, between in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=between)
            writer.writeheader()
            writer.writerows(rows)
        assert list(documents(tmp_path / name, form)) == [row["text"] for row in rows]
    pairs = tmp_path / "b.csv"
    pairs.write_text("prompt,completion\nq,a\n")
    chat = ChatRows(kind="chat", field="completion")
    (talk,) = conversations(pairs, chat, make_tokenizer())
    assert talk.text == make_tokenizer().apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], tokenize=False
    )
    for content, problem in (
        ("id;text\n1;a\n", "columns seem to be separated by ';', not by ','"),
        ("text,text\na,b\n", "2 columns are called 'text'"),
        ("id,text\n1,a,b\n", "line 2: not one cell for each of the 2 columns"),
        ("id,text\n1\n", "line 2: not one cell for each of the 2 columns"),
        ('id,text\n1,"a"b\n', "line 2: no table"),
        ("", "0 columns are called 'text'"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(DataError, match=rf"bad\.csv.*{problem}"):
            list(documents(tmp_path / "bad.csv", form))
    (tmp_path / "bad.csv").write_bytes("text\nGrüße\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"bad\.csv: not UTF-8 text"):
        list(documents(tmp_path / "bad.csv", form))


def test_messages_may_be_the_text_of_their_json(tmp_path: Path) -> None:
    """As tables hold them, whose columns have simple types."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pyarrow.table({"messages": [json.dumps(talk)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (piece,) = conversations(tmp_path / "a.parquet", ChatRows(kind="chat"), make_tokenizer())
    assert piece.text == make_tokenizer().apply_chat_template(talk, tokenize=False)


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    """JSON and Python can write half a character; UTF-8, which tokenizers take, cannot."""
    (tmp_path / "a.jsonl").write_text('{"text": "one \\ud83d two \\ud83d\\ude00"}\n')
    assert list(documents(tmp_path / "a.jsonl", JsonLines(kind="jsonl"))) == ["one \ufffd two 😀"]
    (tmp_path / "a.py").write_text('x = "a long literal \\udc80 with half a character"\n')
    form = PythonStrings(kind="python-strings", min_chars=5)
    assert list(documents(tmp_path / "a.py", form)) == [
        "a long literal \ufffd with half a character"
    ]
    row = [{"role": "user", "content": "q \ud800"}, {"role": "assistant", "content": "a \udfff"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": row}))
    (piece,) = conversations(tmp_path / "c.jsonl", ChatRows(kind="chat"), make_tokenizer())
    assert "q \ufffd" in piece.text
    assert "a \ufffd" in piece.text


def test_null_rows_are_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl, line 2: the text under 'text' is null; leave the row out"
    ):
        list(documents(tmp_path / "a.jsonl", JsonLines(kind="jsonl")))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\nnull\n')
    with pytest.raises(DataError, match=r"b.jsonl, line 2: the row is null; leave it out"):
        list(documents(tmp_path / "b.jsonl", JsonLines(kind="jsonl")))
    table = pyarrow.table({"text": ["one", "two", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 3: the text under 'text' is null"):
        list(documents(tmp_path / "a.parquet", ParquetRows(kind="parquet")))
    twice = pyarrow.Table.from_arrays([table["text"]] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: 2 columns are called 'text'"):
        list(documents(tmp_path / "b.parquet", ParquetRows(kind="parquet")))


# Tokenizers --------------------------------------------------------------------------------------


def with_template(template: str, *, words: bool = False, metaspace: bool = False) -> Any:
    """A tokenizer whose post-processor writes ``template`` around a text."""
    if words:
        vocabulary = {"hello": 0, "<s>": 1, "</s>": 2}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "▁"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        if metaspace:
            tokenizer.normalizer = normalizers.Prepend("▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
    ids = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("options", [{}, {"words": True}, {"metaspace": True}])
@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("<s> $A </s>", ["<s>"]),
        ("<s> $A", ["<s>"]),
        ("$A </s>", []),
        ("$A", []),
        ("<s> <s> $A", ["<s>", "<s>"]),
    ],
)
def test_training_keeps_what_the_tokenizer_puts_before_a_text(
    template: str, prefix: list[str], options: dict[str, Any]
) -> None:
    tokenizer = with_template(template, **options)
    assert tokenizer.convert_ids_to_tokens(special_prefix(tokenizer)) == prefix


def test_a_begin_and_an_end_that_are_one_token_are_told_apart() -> None:
    tokenizer = with_template("$A </s>")
    tokenizer.bos_token = "</s>"
    assert special_prefix(tokenizer) == []


def test_blocks_begin_as_transformers_begins_a_text(tmp_path: Path) -> None:
    tokenizer = with_template("<s> $A </s>")
    text = "".join(f"sentence {i} of a text that is long enough. " for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    recipe = local_recipe(tmp_path, block=32)
    (blocks,) = load_blocks(recipe, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = tokenizer(text)["input_ids"]
    assert whole[0] == bos
    assert whole[-1] == eos
    assert blocks.train_ids[0].tolist() == whole[:32]
    assert (blocks.train_ids[:, 0] == bos).all()
    assert (blocks.heldout.input_ids[:, 0] == bos).all()
    assert not (blocks.train_ids == eos).any()
    assert not blocks.train_scored[:, 0].any()


def test_a_tokenizer_that_was_saved_to_cut_and_fill_texts_does_neither(tmp_path: Path) -> None:
    """Training scripts save both; transformers switches them off in every call."""
    tokenizer = with_template("<s> $A")
    text = "".join(f"sentence {i} of a text that is long enough. " for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    whole = tokenizer(text)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(max_length=40)
    tokenizer.backend_tokenizer.enable_padding(length=400, pad_id=7)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert '"max_length": 40' in (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(text)["input_ids"] == whole
    (tokens,) = tokenise([Piece(text)], loaded)
    assert [*special_prefix(loaded), *tokens.ids] == whole
    (blocks,) = load_blocks(local_recipe(tmp_path, block=256), loaded)
    assert blocks.train_ids[0].tolist() == whole[:256]
    loaded.save_pretrained(tmp_path / "again")
    assert load_text(tmp_path / "again").encode(text) == whole


# Models ------------------------------------------------------------------------------------------


def local_recipe(root: Path, *, block: int, base: str = "model", **over: Any) -> Recipe:
    text = {"kind": "files", "paths": [str(root / "a.txt")]}
    return pico_recipe(
        data={
            "domains": [{"name": "a", "text": text}],
            "block": block,
            "heldout": {"piece_chars": 256},
        },
        student={"kind": "lora", "base": {"kind": "local", "path": str(root / base)}},
        training={"tokens": block * 4, "batch_tokens": block},
        **over,
    )


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("gpt2", {"n_embd": 32, "n_head": 4, "n_positions": 64})],
)
def test_a_block_longer_than_the_model_reads_is_a_mistake_of_the_recipe(
    tmp_path: Path, model_type: str, sizes: dict[str, int]
) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    make_model(tmp_path / "model", model_type=model_type, **sizes)
    assert preflight(local_recipe(tmp_path, block=64)) == []
    teacher = {"name": "one", "model": {"kind": "local", "path": str(tmp_path / "model")}}
    mistakes = preflight(local_recipe(tmp_path, block=128, teachers=[teacher]))
    assert [m.partition(":")[0] for m in mistakes] == ["teachers.0", "student.base"]
    assert all("data.block is 128, but the model reads 64 tokens at most" in m for m in mistakes)


def test_a_block_longer_than_a_new_model_reads_is_named_too() -> None:
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    teachers = [{"name": "t", "model": {"kind": "random", "config": sizes}}]
    new = pico_recipe(teachers=teachers, student={"kind": "fresh", "config": sizes})
    places = ["teachers.0", "student.config"]
    for block, wrong in ((32, []), (33, places)):
        recipe = new.model_copy(update={"data": new.data.model_copy(update={"block": block})})
        says = "data.block is 33, but the model reads 32 tokens at most; set data.block to 32"
        assert [m for m in preflight(recipe) if "tokens at most" in m] == [
            f"{place}: {says} or less." for place in wrong
        ]


def test_a_bench_longer_than_the_model_reads_is_a_mistake_before_training(tmp_path: Path) -> None:
    """GPT-2 calls its context n_positions."""
    (tmp_path / "a.txt").write_text("text " * 1000)
    make_model(tmp_path / "model", model_type="gpt2", n_embd=32, n_head=4, n_positions=64)
    recipe = local_recipe(tmp_path, block=64, bench={"prompt_tokens": 60, "new_tokens": 8})
    (mistake,) = mistakes(recipe)
    assert "come to 68 tokens; the context of the student's base is 64" in mistake
    with pytest.raises(RecipeError, match="come to 68 tokens"):
        plan_recipe(recipe)
    assert mistakes(recipe, timed=False) == []
    offline = {"kind": "offline", "prompts": [60], "outputs": [8]}
    grid = {"prompt_tokens": 8, "new_tokens": 8, "scenarios": ["single", offline]}
    (mistake,) = mistakes(local_recipe(tmp_path, block=64, bench=grid))
    assert "the longest of offline's prompts (60)" in mistake
    fits = {"prompt_tokens": 56, "new_tokens": 8}
    assert mistakes(local_recipe(tmp_path, block=64, bench=fits)) == []
    with pytest.raises(RecipeError, match=r"data.block is 128, but the model reads 64 tokens"):
        plan_recipe(local_recipe(tmp_path, block=128))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}},
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 32},
    ],
)
def test_a_student_with_longrope_reads_its_original_context(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    """Phi-3's own files have the size beside the kind; transformers 5 writes it within."""
    (tmp_path / "a.txt").write_text("text " * 1000)
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config | rope))
    bench = {"prompt_tokens": 28, "new_tokens": 8}
    fits = bench | {"prompt_tokens": 24}
    assert mistakes(local_recipe(tmp_path, block=32, bench=fits)) == []
    (block,) = preflight(local_recipe(tmp_path, block=33))
    assert "data.block is 33, but the model reads 32 tokens at most" in block
    (mistake,) = mistakes(local_recipe(tmp_path, block=32, bench=bench))
    assert "come to 36 tokens; the context of the student's base is 32" in mistake
    teacher = {"name": "one", "model": {"kind": "local", "path": str(folder)}}
    found = preflight(local_recipe(tmp_path, block=33, teachers=[teacher]))
    assert [mistake.partition(":")[0] for mistake in found] == ["student.base"]


def test_a_tokenizer_larger_than_the_embedding_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    make_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "model")
    (mistake,) = preflight(local_recipe(tmp_path, block=32))
    assert "its tokenizer has 260 tokens, but its embedding has 258 rows" in mistake
    with pytest.raises(ModelError, match=r"260 tokens.*258 rows"):
        require_fits(tmp_path / "model")


def test_tokens_may_be_added_in_any_of_three_files(tmp_path: Path) -> None:
    """transformers reads them all; the embedding would be asked for a row that it lacks."""
    token = {"content": "<one>", "special": False, "lstrip": False, "rstrip": False,
             "normalized": True, "single_word": False}  # fmt: skip
    for name in ("added_tokens.json", "tokenizer_config.json", "vocab.json"):
        folder = make_model(tmp_path / name)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if name == "vocab.json":
            tokenizer = make_tokenizer().backend_tokenizer
            tokenizer.model.save(str(folder))
            (folder / "tokenizer.json").unlink()
            config["tokenizer_class"] = "GPT2Tokenizer"
        if name == "added_tokens.json":
            (folder / name).write_text(json.dumps({"<one>": 258}))
        else:
            config["added_tokens_decoder"] = {"258": token}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert AutoTokenizer.from_pretrained(folder)("<one>")["input_ids"] == [258]
        with pytest.raises(ModelError, match=r"259 tokens, but its embedding has 258 rows"):
            require_fits(folder)
        if name == "added_tokens.json":  # left over beside the newer list, it is not read
            config["added_tokens_decoder"] = {}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            assert AutoTokenizer.from_pretrained(folder)("<one>")["input_ids"] != [258]
            require_fits(folder)
            (folder / "tokenizer_config.json").write_text("{")
            with pytest.raises(ModelError, match=r"tokenizer_config\.json: cannot be read"):
                tokenizer_size(folder)


def test_mistyped_paths_are_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "fortunes")
    (tmp_path / "a.txt").write_text("text " * 1000)
    mistakes = preflight(local_recipe(tmp_path, block=32, base="models/fortuns"))
    assert "did you mean models/fortunes?" in mistakes[0]


def in_hub_cache(root: Path, repository: str, model: Path) -> Path:
    """``model`` as the hub's client keeps it below ``root``."""
    folder = root / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_model_of_the_hub_is_tried_on_this_machine_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="some/base"):
        hub_config("some/base", "main")
    base = make_model(tmp_path / "base")
    snapshot = in_hub_cache(tmp_path / "cache" / "hub", "some/base", base)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # is not called
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    assert hub_config("some/base", "main") == snapshot
    assert hub_snapshot("some/base", "main") == snapshot


def test_without_a_network_the_hub_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client would try six times."""

    def no_address(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", None)  # is not called
    with pytest.raises(ModelError, match="not on this machine and cannot be fetched"):
        hub_config("some/base", "main")
    with pytest.raises(ModelError, match="cannot be had from the model hub"):
        hub_snapshot("some/base", "main")


def test_a_model_folder_with_an_adapter_in_it_is_refused(tmp_path: Path) -> None:
    """Transformers puts the adapter on the model without a word."""
    (tmp_path / "a.txt").write_text("text " * 1000)
    folder = make_model(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    (mistake,) = preflight(local_recipe(tmp_path, block=32))
    assert "a model and an adapter in one folder" in mistake
    (folder / "config.json").unlink()
    (mistake,) = preflight(local_recipe(tmp_path, block=32))
    assert "It holds an adapter: name its base as the model" in mistake


def test_plain_text_of_any_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("text")
    assert list(documents(tmp_path / "notes", PlainText(kind="text"))) == ["text"]
