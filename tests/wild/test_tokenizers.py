"""Tokenizers of one vocabulary that read a text in two ways, held to transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import compress
from compress.aligned import AlignedStates
from compress.data.packing import Piece, special_prefix, tokenise
from compress.models.language import require_same_tokenizer
from compress.teachers.live import Teachers
from compress.teachers.pairs import pair_teachers
from export.folder.clients import tokenizer_config, write_client_files
from export.graphs import form_files
from limbeck.contract.errors import ArtifactError, DataError, ModelError
from limbeck.contract.models.tokens import read_tokenizer
from limbeck.contract.sources.teacher_tokens import compare_tokenizers
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.runtime.text import Text, load_text
from tests.compress.test_compress import tiny
from tests.pico import CHAT, make_model, make_tokenizer, pico_recipe
from tests.tokenizers import END, byte_level, piece_level
from tests.wild.cases.adapters import load, make_base, teacher

TEXT = "the cat sat on the mat, and the Dog sat on the log; 1234 5678"


def starting(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """With ``token`` before every text."""
    tokenizer.add_special_tokens([token])
    ids = [(token, tokenizer.token_to_id(token))]
    single = f"{token} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def lowering(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def spaced(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def model_with(folder: Path, tokenizer: Tokenizer) -> Path:
    make_base(folder, tied=True, vocab_size=max(340, tokenizer.get_vocab_size()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (byte_level(), starting(byte_level(), "<bos>")),  # as Qwen and DeepSeek-R1-Distill-Qwen
        (starting(byte_level(), "<bos>"), byte_level()),
        (starting(byte_level(), "<s>"), starting(byte_level(), "<bos>")),
        (byte_level(), lowering(byte_level())),
        (byte_level(), spaced(byte_level())),
        (byte_level(), byte_level(digits=True)),
    ],
    ids=["bos", "no bos", "another bos", "lower-cased", "prefix space", "digits"],
)
def test_a_teacher_reads_a_text_as_its_own_tokenizer_writes_it(
    tmp_path: Path, own: Tokenizer, theirs: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    student, folder = model_with(tmp_path / "own", own), model_with(tmp_path / "theirs", theirs)
    ids = torch.tensor([AutoTokenizer.from_pretrained(student)(TEXT)["input_ids"]])
    right = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    pair = pair_teachers(student, {"t": folder})[0]
    assert pair is not None
    teachers = Teachers(
        [teacher("t", folder, None)],
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        pairs=[pair],
    )
    (found,), _ = teachers.states(ids)
    assert isinstance(found, AlignedStates)
    assert found.alignment.texts == right.tolist()
    hidden = load(folder)(input_ids=right, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found.hidden_RMd, hidden, rtol=1e-4, atol=1e-4)
    recipe = pico_recipe(
        teachers=[{"name": "t", "model": {"kind": "local", "path": str(folder)}}],
        student={"kind": "lora", "base": {"kind": "local", "path": str(student)}},
    )
    assert "another tokenizer" in str(*compare_tokenizers(recipe))


@pytest.mark.parametrize("kind", ["no tokenizer.json", "a class that drops it"])
def test_a_first_token_that_tokenizer_json_does_not_show_is_seen_before_training(
    tmp_path: Path, kind: str
) -> None:
    """transformers builds some tokenizers by their class, and by tokenizer_config.json."""
    own = model_with(tmp_path / "own", byte_level())
    folder = tmp_path / "theirs"
    if kind == "no tokenizer.json":
        bos = byte_level()
        model_with(folder, bos)
        (folder / "tokenizer.json").unlink()
        assert isinstance(bos.model, models.BPE)
        bos.model.save(str(folder))
        fields = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": END}
    else:
        model_with(folder, starting(byte_level(), "<bos>"))
        own = model_with(tmp_path / "own", starting(byte_level(), "<bos>"))
        fields = {"tokenizer_class": "GPTNeoXTokenizer"}
    changed(folder, **fields)
    first = [AutoTokenizer.from_pretrained(one)("a")["input_ids"][0] for one in (own, folder)]
    assert first[0] != first[1]
    recipe = pico_recipe(
        teachers=[{"name": "t", "model": {"kind": "local", "path": str(folder)}}],
        student={"kind": "lora", "base": {"kind": "local", "path": str(own)}},
    )
    assert "another tokenizer" in str(*compare_tokenizers(recipe))


def test_encoders_of_one_vocabulary_that_lower_case_and_that_do_not_are_refused(
    tmp_path: Path,
) -> None:
    for name, tokenizer in (("cased", byte_level()), ("uncased", lowering(byte_level()))):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / name)
    require_same_tokenizer({"x": tmp_path / "cased", "y": tmp_path / "cased"})
    with pytest.raises(ModelError, match="x and y have the same tokens, but tokenise a text diff"):
        require_same_tokenizer({"x": tmp_path / "cased", "y": tmp_path / "uncased"})


def shipped(model: Path, folder: Path) -> Text:
    """The tokenizer of ``model`` as an export writes it."""
    load_tokenizer(model).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(folder)))
    return load_text(folder)


def test_a_conversation_with_tools_has_the_template_that_transformers_takes(tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "model", make_tokenizer()
    with_tools = "{% for tool in tools %}{{ tool.function.name }};{% endfor %}" + CHAT
    tokenizer.chat_template = {"default": CHAT, "tool_use": with_tools}
    make_model(folder)
    tokenizer.save_pretrained(folder)
    own = tmp_path / "own"
    load_tokenizer(folder).save_pretrained(own)
    shutil.copy(folder / "config.json", own)
    out = tmp_path / "out"
    out.mkdir()
    write_client_files(own, out, graphs=[], shipped=form_files(out, "fp32"), genai=None)
    messages = [{"role": "user", "content": "q"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for files in (True, False):  # older clients read tokenizer_config.json alone
        if not files:
            shutil.rmtree(out / "additional_chat_templates")
            (out / "chat_template.jinja").unlink()
        text, client = load_text(out), AutoTokenizer.from_pretrained(out)
        for tools in (None, [tool]):
            options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True}
            right = tokenizer.apply_chat_template(messages, **options)["input_ids"]
            assert text.chat(messages, tools) == right
            assert client.apply_chat_template(messages, **options)["input_ids"] == right
    assert "f;" in tokenizer.decode(right)


def test_chat_templates_by_name_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    texts = {"default": CHAT, "tool_use": "{{ tools }}" + CHAT}
    listed = [{"name": name, "template": text} for name, text in texts.items()]
    for written in (texts, listed):
        changed(tmp_path / "model", chat_template=written)
        right = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert right.get_chat_template(tools=[{}]) == texts["tool_use"]
        found = load_text(tmp_path / "model")
        assert [found.template, found.tool_template] == list(texts.values())


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_merges_are_not_left_out_at_random(tmp_path: Path) -> None:
    """tokenizer.json keeps the BPE dropout of a training; transformers draws anew at each call."""
    tokenizer = byte_level()
    right = tokenizer.encode(TEXT).ids
    tokenizer.model.dropout = 0.9  # type: ignore[attr-defined]
    model_with(tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT)["input_ids"] != right
    (found,) = tokenise([Piece(TEXT)], load_tokenizer(tmp_path / "model"))
    assert found.ids.tolist() == right
    assert load_text(tmp_path / "model").encode(TEXT) == right
    assert pair_teachers(tmp_path / "model", {"t": tmp_path / "model"})[0] is None


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Removed",
                               "invert": False}},
            "Exception: Oniguruma error",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}},
         "PanicException"),
    ],
)  # fmt: skip
def test_what_tokenizers_cannot_read_is_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], part: dict[str, Any], says: str
) -> None:
    """A panic of its Rust code is no `Exception`."""
    folder = model_with(tmp_path / "model", byte_level())
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | part))
    for read in (load_tokenizer, lambda folder: read_tokenizer(folder / "tokenizer.json")):
        with pytest.raises(ModelError, match=f"no tokenizer that can be read .{says}"):
            read(folder)
    with pytest.raises(ArtifactError, match=r"tokenizer.json: no tokenizer"):
        load_text(folder)
    capfd.readouterr()  # Rust tells of the panic itself


@pytest.mark.parametrize("split", [True, False])
def test_names_of_special_tokens_are_read_alike_in_training_and_in_prompts(
    tmp_path: Path, split: bool
) -> None:
    folder = model_with(tmp_path / "model", byte_level())
    changed(folder, split_special_tokens=split)
    text = f"a{END}b"
    right = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert (len(right) > 3) == split
    (found,) = tokenise([Piece(text)], load_tokenizer(folder))
    assert found.ids.tolist() == right
    assert shipped(folder, tmp_path / "shipped").encode(text) == right


@pytest.mark.parametrize("config", [{}, {"added_tokens_decoder": {}}])
def test_a_tokenizer_without_tokenizer_json_is_read_as_transformers_reads_it(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder, tokenizer = tmp_path / "model", byte_level()
    folder.mkdir()
    assert isinstance(tokenizer.model, models.BPE)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    fields = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | config))
    right = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    own = load_tokenizer(folder)
    (found,) = tokenise([Piece(TEXT)], own)
    assert [*special_prefix(own), *found.ids] == right
    assert shipped(folder, tmp_path / "shipped").encode(TEXT) == right


def test_a_sentencepiece_tokenizer_is_no_other_than_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model_with(tmp_path / name, piece_level())
    assert pair_teachers(tmp_path / "a", {"b": tmp_path / "b"})[0] is None


@pytest.mark.parametrize(
    ("template", "bos", "same"),
    [(CHAT, END, True), (CHAT + " ", END, False), ("{{ bos_token }}" + CHAT, "<bos>", False)],
    ids=["one template", "two templates", "another token in the template"],
)
def test_tokens_before_a_text_do_not_matter_to_conversations(
    tmp_path: Path, template: str, bos: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tool calls can only be learned from a teacher that reads the student's tokens."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    own = model_with(tmp_path / "own", starting(byte_level(), "<bos>"))
    theirs = byte_level()
    theirs.add_special_tokens(["<bos>"])
    folder = model_with(tmp_path / "theirs", theirs)
    (own / "chat_template.jinja").write_text(CHAT if bos == END else template)
    (folder / "chat_template.jinja").write_text(template)
    changed(own, bos_token=END)
    changed(folder, bos_token=bos)
    text = {"kind": "files", "paths": ["chat.jsonl"], "format": {"kind": "chat"}}
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "t", "model": {"kind": "local", "path": str(folder)}}],
        student={"kind": "lora", "base": {"kind": "local", "path": str(own)}},
        data={"domains": [{"name": "chat", "text": text}], "block": 64},
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 40))
    assert ("another tokenizer" not in str(*compare_tokenizers(recipe))) == same
    assert (pair_teachers(own, {"t": folder}, plain=False)[0] is None) == same
    assert pair_teachers(own, {"t": folder})[0] is not None
    if same:
        made = compress.distill(recipe=recipe, out=tmp_path / "student")
        # The template shows no calls: what is learned is the end of the turn, which has no bytes.
        assert made.result["teachers"]["t"]["bits_per_byte"] == {}
    else:
        with pytest.raises(DataError, match="an answer calls tools"):
            compress.distill(recipe=recipe, out=tmp_path / "student")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"auto_map": {"AutoTokenizer": ["tok.Own", None]}, "tokenizer_class": "Own"},
         r"code of its own \(auto_map in tokenizer_config.json\), which Limbeck never runs"),
        ({"tokenizer_class": "GemmaTokenizerFast"}, "no tokenizer that can be read"),
    ],
    ids=["its own code", "a class of another tokenizer"],
)  # fmt: skip
def test_a_tokenizer_that_fails_at_its_first_text_is_named_when_it_is_loaded(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    changed(tmp_path, **fields)
    with pytest.raises(Exception, match=r"custom code|Unk token"):
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)("a b")
    with pytest.raises(ModelError, match=says):
        load_tokenizer(tmp_path)
