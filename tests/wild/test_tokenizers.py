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
from compress.data.chat import chat_template
from compress.data.packing import Piece, special_prefix, tokenise
from compress.teachers.live import Teachers
from compress.teachers.pairs import pair_teachers
from export.folder.clients import tokenizer_config, write_client_files
from export.graphs import form_files
from limbeck.contract.errors import ArtifactError, DataError, ModelError
from limbeck.contract.models.tokens import read_tokenizer
from limbeck.contract.sources.teacher_tokens import compare_tokenizers
from limbeck.contract.sources.tokenizer import load_tokenizer, require_same_tokenizer
from limbeck.runtime.text import Text, load_text
from tests.compress.test_compress import tiny
from tests.pico import CHAT, make_model, make_tokenizer, pico_recipe
from tests.tokenizers import BERT, END, byte_level, encoder_tokenizer, piece_level
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
        begins = starting(byte_level(), "<bos>")
        begins.normalizer = normalizers.NFC()  # which the class has too
        model_with(folder, begins)
        own = model_with(tmp_path / "own", begins)
        fields = {"tokenizer_class": "GPTNeoXTokenizer"}
    changed(folder, **fields)
    first = [AutoTokenizer.from_pretrained(one)("a")["input_ids"][0] for one in (own, folder)]
    assert first[0] != first[1]
    recipe = pico_recipe(
        teachers=[{"name": "t", "model": {"kind": "local", "path": str(folder)}}],
        student={"kind": "lora", "base": {"kind": "local", "path": str(own)}},
    )
    assert "another tokenizer" in str(*compare_tokenizers(recipe))


@pytest.mark.parametrize("declared", [None, "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
def test_a_class_that_cuts_texts_otherwise_than_the_file_is_named(
    tmp_path: Path, declared: str | None
) -> None:
    """transformers 5 reads every tokenizer of a qwen2 by Qwen's rules, whatever the file says."""
    folder = make_model(tmp_path / "model", model_type="qwen2", vocab_size=340)
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=END).save_pretrained(folder)
    changed(folder, tokenizer_class=declared)
    by_class = AutoTokenizer.from_pretrained(folder)
    right = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert by_class(TEXT)["input_ids"] != right
    if declared == "PreTrainedTokenizerFast":
        assert load_tokenizer(folder).backend_tokenizer.encode(TEXT).ids == right
        return
    with pytest.raises(ModelError, match=r"as Qwen2Tokenizer, .* in other places than the file"):
        load_tokenizer(folder)
    by_class.save_pretrained(folder)
    found = load_tokenizer(folder).backend_tokenizer.encode(TEXT).ids
    assert found == by_class(TEXT)["input_ids"]


_QWEN = (  # as Qwen's tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "behavior": "MergedWithPrevious", "invert": False}


@pytest.mark.parametrize(
    ("model_type", "name", "tokenizer", "changed"),
    [
        ("llama", "LlamaTokenizer", piece_level(prepends=True), {"pre_tokenizer": None}),
        ("gemma2", "GemmaTokenizer", piece_level(),
         {"pre_tokenizer": _SPLIT | {"pattern": {"String": " "}}}),
        ("qwen2", "LlamaTokenizerFast", byte_level(),  # as of DeepSeek-R1-Distill-Qwen
         {"normalizer": {"type": "NFC"},
          "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
              _SPLIT | {"behavior": "Isolated", "pattern": {"Regex": _QWEN}},
              {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
               "use_regex": False}]}}),
        ("gpt_neox", "GPTNeoXTokenizer", byte_level(), {"normalizer": {"type": "NFC"}}),
        ("llama", "GPT2Tokenizer", byte_level(digits=True), {}),  # as of SmolLM2
        ("roberta", "RobertaTokenizer", byte_level(), {}),
    ],
)  # fmt: skip
def test_files_as_their_classes_write_them_are_read(
    tmp_path: Path, model_type: str, name: str, tokenizer: Tokenizer, changed: dict[str, Any]
) -> None:
    tree = json.loads(tokenizer.to_str()) | changed
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    special = {"bos_token": "<bos>", "unk_token": "<unk>"} if tree["model"]["unk_token"] else {}
    config = {"tokenizer_class": name, "eos_token": END} | special
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    right = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert load_tokenizer(tmp_path).backend_tokenizer.encode(TEXT).ids == right


@pytest.mark.parametrize("scheme", ["", "first", "always", "never"])
@pytest.mark.parametrize(
    "config", [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_bos_token": False}], ids=str
)
def test_a_first_space_is_read_as_transformers_reads_it(
    tmp_path: Path, scheme: str, config: dict[str, Any]
) -> None:
    """In training, prompts, exports and answers; Llama's files write the space in four ways."""
    tree = json.loads(piece_level(prepends=True).to_str())
    if scheme:
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "split": False}
        tree |= {"normalizer": None, "pre_tokenizer": metaspace | {"prepend_scheme": scheme}}
    model = make_model(tmp_path / "model", vocab_size=500)
    (model / "tokenizer.json").write_text(json.dumps(tree))
    special = {"bos_token": "<bos>", "eos_token": END, "unk_token": "<unk>"}
    fields = {"tokenizer_class": "LlamaTokenizer"} | special | config
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    right, file = AutoTokenizer.from_pretrained(model), read_tokenizer(model / "tokenizer.json")
    words = [t.encode("the", add_special_tokens=False) for t in (right.backend_tokenizer, file)]
    if words[0].ids != words[1].ids:
        with pytest.raises(ModelError, match="in other places than the file"):
            load_tokenizer(model)
        return
    text = shipped(model, tmp_path / "shipped")
    client = AutoTokenizer.from_pretrained(tmp_path / "shipped")
    for given in ("the cat", " the cat", "  the", "\nthe", " ", f"the{END} the", "<bos>the"):
        ids, plain = (right(given, add_special_tokens=add)["input_ids"] for add in (True, False))
        (row,) = tokenise([Piece(given)], load_tokenizer(model))
        assert row.ids.tolist() == plain
        assert text.encode(given) == client(given)["input_ids"] == ids
        assert "".join(text.stream(plain)) == right.decode(plain, skip_special_tokens=True)


_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


@pytest.mark.parametrize(
    ("kind", "changed", "config", "right"),
    [  # ``right``: normalizer of transformers 4, if not the file's; None where the class differs
        ("WordPiece", {}, {}, {}),
        ("WordPiece", {}, {"do_lower_case": False}, {"lowercase": False}),
        ("WordPiece", {"normalizer": BERT | {"lowercase": False}}, {}, {"lowercase": True}),
        ("WordPiece", {"normalizer": BERT | {"lowercase": False}}, {"do_lower_case": False}, {}),
        ("WordPiece", {"normalizer": BERT | {"strip_accents": False}}, {"strip_accents": False},
         {}),
        ("WordPiece", {"normalizer": BERT | {"handle_chinese_chars": False}}, {},
         {"handle_chinese_chars": True}),
        ("WordPiece", {"normalizer": BERT | {"clean_text": False}}, {}, None),
        ("WordPiece", {"normalizer": {"type": "NFC"}}, {}, None),
        ("WordPiece", {"pre_tokenizer": {"type": "WhitespaceSplit"}}, {}, None),
        ("Unigram", {}, {}, {}),
        ("Unigram", {"normalizer": _SPACES}, {}, {}),
        ("Unigram", {"normalizer": {"type": "Lowercase"}}, {}, None),
        ("Unigram", {"pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}}, {}, None),
        ("Unigram", {"model": encoder_tokenizer("Unigram")["model"] | {"unk_id": 1}}, {}, None),
    ],
)  # fmt: skip
def test_classes_of_encoders_are_held_to_the_file_too(
    tmp_path: Path,
    kind: str,
    changed: dict[str, Any],
    config: dict[str, Any],
    right: dict[str, Any] | None,
) -> None:
    """The expected values were compared with transformers 4.57 once, for 356 such folders."""
    tree = encoder_tokenizer(kind)
    name = "XLMRobertaTokenizer" if kind == "Unigram" else "BertTokenizer"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree | changed))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    fields = json.dumps({"tokenizer_class": name} | config)
    (tmp_path / "tokenizer_config.json").write_text(fields)
    if right is None:
        with pytest.raises(ModelError, match=f"as {name}, .* in other places than the file"):
            load_tokenizer(tmp_path)
        AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        load_tokenizer(tmp_path)
        return
    written = tree | changed
    written["normalizer"] = written["normalizer"] and written["normalizer"] | right
    expected = Tokenizer.from_str(json.dumps(written))
    found = load_tokenizer(tmp_path).backend_tokenizer
    for text in ("the Café, the\u200bcat\n of 日本", TEXT):
        ids = [t.encode(text, add_special_tokens=False).ids for t in (found, expected)]
        assert ids[0] == ids[1]


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


def test_chat_templates_without_a_default_and_in_another_coding_are_named(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    changed(tmp_path / "model", chat_template={"rag": CHAT, "tool_use": CHAT})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no default specified"):
        tokenizer.get_chat_template()
    with pytest.raises(DataError, match=r"called rag, tool_use, .*into chat_template\.jinja"):
        chat_template(tokenizer)
    (tmp_path / "model/chat_template.jinja").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ModelError, match=r"chat_template\.jinja: not UTF-8 text"):
        load_text(tmp_path / "model")


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
