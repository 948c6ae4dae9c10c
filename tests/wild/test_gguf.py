"""GGUF files of other makers: their tokenizers read text as the models' own do.

The right ids are those of the tokenizers that the files are written from.
"""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from compress.data.packing import special_prefix
from compress.models.gguf import gguf_tokenizer
from compress.models.language import model_folder
from export.gguf.llama_cpp import LlamaCpp
from export.gguf.write import write_gguf
from limbeck.app.init.inputs import model_source
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import GgufModel
from limbeck.contract.sources.digests import model_digest
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.runtime.text import load_text
from tests.pico import make_model, pico_recipe
from tests.tokenizers import END, byte_level, permute, piece_level
from tests.wild.test_tokenizers import TEXT, starting

BOS = "<bos>"
# GPT-2 splits these elsewhere: spaces before digits, long numbers, capitals after an apostrophe.
TEXTS = [
    TEXT,
    "x =  5",
    "a|b <= $1+2^3, (`c`)!? ... ok...",
    "der Ärger, ʔaŋ, ა, é\u0301 ｎ：ｎ",
    "def f(x):\n    1\n  2\t3",
    "in 12345 years, WE'RE 3.5%  ",
    "日本 １２",
]
LLAMA3 = TikTokenConverter().pattern  # transformers takes it for Llama 3's own files


def splitting(*rules: str | pre_tokenizers.PreTokenizer, whole_words: bool = False) -> Tokenizer:
    """A byte-level tokenizer that splits text by each of ``rules``, a pattern or a part of
    tokenizers. ``whole_words`` need no merges."""
    tree = json.loads(byte_level().to_str())
    if whole_words:
        tree["model"]["merges"] = tree["model"]["merges"][:-10]
    tree["model"]["ignore_merges"] = whole_words
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    parts = [
        pre_tokenizers.Split(Regex(rule), behavior="isolated") if isinstance(rule, str) else rule
        for rule in rules
    ]
    if not any(isinstance(part, pre_tokenizers.ByteLevel) for part in parts):
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


# What the tokenizer.json of each of these families holds.
FALCON = splitting(
    pre_tokenizers.Punctuation("contiguous"),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    pre_tokenizers.Digits(individual_digits=False),
    "[0-9][0-9][0-9]",
)
BLOOM = splitting(r" ?[^(\s|[.,!?…。，、।۔،])]+")
CODER = splitting(
    "[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[一-龥ࠀ-一가-퟿]+",
    pre_tokenizers.Digits(individual_digits=True),
)
DEEPSEEK3 = splitting(
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def written(
    file: Path, tokenizer: Tokenizer, *, pre: str | None, arch: str = "llama", **keys: Any
) -> Path:
    """A GGUF file of one layer with ``tokenizer``, as other programs write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer, vocabulary = gguf.GGUFWriter(file, arch), tokenizer.get_vocab()
    by_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if (name := keys.pop("name", None)) is not None:
        writer.add_name(name)
    if templates := keys.pop("templates", None):
        writer.add_chat_template([{"name": n, "template": t} for n, t in templates.items()])
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in added else TokenType.NORMAL for t in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(vocabulary[END])
    if BOS in vocabulary and keys.pop("bos_token_id", True):
        writer.add_bos_token_id(vocabulary[BOS])
    for key, value in keys.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    sizes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    sizes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    sizes |= {"blk.0.ffn_norm": (32,), "blk.0.ffn_down": (32, 64)}
    sizes |= {f"blk.0.ffn_{part}": (64, 32) for part in ("gate", "up")}
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("pre", "tokenizer"),
    [
        ("gpt-2", byte_level()),
        ("olmo", byte_level()),
        ("smollm", byte_level(digits=True)),
        ("starcoder", byte_level(digits=True)),
        ("command-r", byte_level(digits=True)),
        ("qwen2", splitting(QWEN2)),
        ("stablelm2", splitting(QWEN2)),
        ("dbrx", splitting(LLAMA3)),
        ("llama-bpe", splitting(LLAMA3, whole_words=True)),
        ("glm4", splitting(LLAMA3, whole_words=True)),
        ("falcon", FALCON),
        ("bloom", BLOOM),
        ("deepseek-coder", CODER),
        ("deepseek-v3", DEEPSEEK3),
        # Its first rule leaves no number of more than three digits to the second one.
        ("minicpm5", splitting(r"\p{N}{1,3}", LLAMA3, whole_words=True)),
    ],
)
def test_a_text_is_split_as_the_name_of_the_pre_tokenizer_says(
    tmp_path: Path, pre: str, tokenizer: Tokenizer
) -> None:
    keys: Any = {"add_bos_token": False}
    read = gguf_tokenizer(written(tmp_path / "a.gguf", tokenizer, pre=pre, **keys))
    for text in TEXTS:
        right = tokenizer.encode(text, add_special_tokens=False)
        assert read.tokenize(text) == right.tokens, text
        assert read.decode(right.ids) == text


@pytest.mark.parametrize(
    ("pre", "keys", "begins"),
    [
        ("llama-bpe", {}, True),  # llama.cpp's rules, where the file does not say
        ("llama3", {}, True),
        ("tekken", {}, True),
        ("lfm2", {"add_eos_token": False}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {}, False),
        ("glm4", {}, False),
        ("qwen2", {"add_bos_token": True}, True),
    ],
)
def test_a_text_begins_as_llama_cpp_begins_it(
    tmp_path: Path, pre: str, keys: Any, begins: bool
) -> None:
    tokenizer = starting(splitting(LLAMA3), BOS)
    right = [tokenizer.token_to_id(BOS)] if begins else []
    text = "the same tokens, wherever it is split"
    read = gguf_tokenizer(written(tmp_path / "a.gguf", tokenizer, pre=pre, **keys))
    read.save_pretrained(tmp_path / "saved")
    for found in (read, load_tokenizer(tmp_path / "saved")):
        assert special_prefix(found) == right
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert found(text)["input_ids"] == [*right, *ids]
        assert len(found) == tokenizer.get_vocab_size()  # each has a row in the embedding


def test_a_sentencepiece_file_begins_a_text_unless_it_says_no(tmp_path: Path) -> None:
    tokenizer = piece_level(prepends=True)
    cases: Any = (({}, [tokenizer.token_to_id(BOS)]), ({"add_bos_token": False}, []))
    for keys, right in cases:
        file = written(tmp_path / "a.gguf", tokenizer, pre="default", **keys)
        read = gguf_tokenizer(file)
        assert special_prefix(read) == right
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
        assert read(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize("beside", [False, True])
def test_chat_templates_keep_their_names(tmp_path: Path, beside: bool) -> None:
    """A file of Command R or Hermes has one for conversations with tools."""
    tokenizer = byte_level()
    for templates in ({"default": "plain", "tool_use": "tools"}, {"tool_use": "tools"}):
        file = written(tmp_path / "a.gguf", tokenizer, pre="gpt-2", templates=templates)
        if beside:
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        gguf_tokenizer(file).save_pretrained(out := tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(out).chat_template == templates
        text = load_text(out)
        assert (text.template, text.tool_template) == (templates.get("default"), "tools")
        shutil.rmtree(out)


SPACES = [
    "  two",
    "\n\nx",
    "the cat<end>sat",
    "<end> the",
    "<s>\n the",
    "<end>\n the</s>  \nthe",
    " ",
]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (None, {}),
        (None, {"add_space_prefix": False}),
        ("Yi", {"add_space_prefix": True, "add_eos_token": True}),
        ("Phi3 mini", {}),  # whose special tokens take the white space behind them
    ],
)
def test_a_sentencepiece_file_has_spaces_where_llama_cpp_has_them(
    tmp_path: Path, name: str | None, keys: dict[str, Any]
) -> None:
    tree = json.loads(piece_level(prepends=keys.get("add_space_prefix", True)).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in ("<s>", "</s>", "<|endoftext|>"):
        number = tree["model"]["vocab"][token] = len(tree["model"]["vocab"])
        tree["added_tokens"].append({"id": number, "content": token, "special": True} | flags)
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    file = written(tmp_path / "a.gguf", tokenizer, pre=None, name=name, **keys)
    gguf_tokenizer(file).save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    texts = [*TEXTS, *SPACES]
    found = [read(text)["input_ids"] for text in texts]
    if name is None:
        assert found == [tokenizer.encode(text).ids for text in texts]
        assert [read.decode(ids, skip_special_tokens=True) for ids in found[:2]] == texts[:2]
    pytest.importorskip("cyllama", reason="llama.cpp is not installed")
    with closing(LlamaCpp(file, 64)) as theirs:
        assert found == [theirs.encode(text, True) for text in texts]


@pytest.mark.parametrize(
    ("pre", "message"),
    [
        ("kimi-k2", "splits text as 'kimi-k2' does .*cannot rebuild"),
        ("default", "splits text as 'default'"),
        (None, "does not say how it splits text .*tokenizer.ggml.pre is missing"),
    ],
)
def test_a_split_that_is_not_known_is_refused_unless_its_tokenizer_lies_beside(
    tmp_path: Path, pre: str | None, message: str
) -> None:
    tokenizer = starting(splitting(r"\p{L}+|\s|."), BOS)
    file = written(tmp_path / "a.gguf", tokenizer, pre=pre)
    with pytest.raises(
        ModelError, match=f"a.gguf: its tokenizer {message}.*tokenizer.json beside this file"
    ):
        gguf_tokenizer(file)
    source = GgufModel(kind="gguf", path=file)
    alone = model_digest(source, folder=tmp_path, products={})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert model_digest(source, folder=tmp_path, products={}) != alone
    read = gguf_tokenizer(file)
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(t).ids for t in TEXTS]
    assert (read.bos_token, read.eos_token) == (BOS, END)
    permute(tokenizer, 3).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"tokenizer.json: not the tokenizer of a.gguf, whose tok"):
        gguf_tokenizer(file)
    tree = json.loads(tokenizer.to_str())
    tree["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"tokenizer.json: what changes and splits text"):
        gguf_tokenizer(file)


def test_a_gpt2_file_from_before_the_names_splits_as_gpt2(tmp_path: Path) -> None:
    tokenizer = byte_level()
    read = gguf_tokenizer(written(tmp_path / "a.gguf", tokenizer, pre=None, arch="gpt2"))
    assert [read.tokenize(t) for t in TEXTS] == [tokenizer.encode(t).tokens for t in TEXTS]


def test_a_token_before_every_text_must_be_named(tmp_path: Path) -> None:
    tokenizer = starting(splitting(LLAMA3), BOS)
    file = written(tmp_path / "a.gguf", tokenizer, pre="llama-bpe", bos_token_id=False)
    with pytest.raises(ModelError, match=r"the file does not say which .*bos_token_id is missing"):
        gguf_tokenizer(file)


def test_a_teacher_of_a_gguf_file_reads_what_its_model_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level(digits=True)
    ends: Any = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], 0)
    model = make_model(tmp_path / "model", vocab_size=330, hidden_size=64, **ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(model)
    write_gguf(model, tmp_path / "a.gguf", "gguf-f16", name="tiny", metadata={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' reader
        folder = model_folder(GgufModel(kind="gguf", path=Path("a.gguf")), folder=tmp_path)
    read = load_tokenizer(folder)
    assert [read(t)["input_ids"] for t in TEXTS] == [tokenizer.encode(t).ids for t in TEXTS]


def test_a_part_of_a_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "big-Q8_0-00002-of-00003.gguf"
    file.write_bytes(b"GGUF")
    source = {"kind": "gguf", "path": str(file)}
    (mistake,) = preflight(pico_recipe(teachers=[{"name": "big", "model": source}]))
    assert "teachers.0" in mistake
    assert "one of 3 parts of a GGUF file" in mistake
    assert "--merge big-Q8_0-00001-of-00003.gguf big-Q8_0.gguf" in mistake
    whole = file.rename(tmp_path / "big-00001-of-00001.gguf")
    source = {"kind": "gguf", "path": str(whole)}
    assert preflight(pico_recipe(teachers=[{"name": "big", "model": source}])) == []


def test_a_file_of_a_hubs_cache_is_read_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the link in a snapshot has the file's name; its tokenizer has no merges."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    blob, link = tmp_path / "hub/blobs/0a1b", tmp_path / "hub/snapshots/c0ffee/tiny.gguf"
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    write_gguf(model, blob, "gguf-f16", name="tiny", metadata={})
    link.symlink_to(blob)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' reader
        found = model_folder(GgufModel(kind="gguf", path=link), folder=tmp_path)
    right = load_tokenizer(model)
    assert load_tokenizer(found)(TEXTS)["input_ids"] == right(TEXTS)["input_ids"]
    assert model_source(str(link), "--teacher")["path"] == str(link)


@pytest.mark.parametrize(
    "pre",
    [
        "gpt-2", "smollm", "stablelm2", "dbrx", "llama-bpe", "tekken", "gpt-4o", None,
        "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "bloom", "viking", "bailingmoe",
        "seed-coder", "exaone-moe", "qwen35", "hunyuan-dense", "poro-chat", "llada-moe",
    ],
)  # fmt: skip
def test_llama_cpp_reads_the_same_tokens(tmp_path: Path, pre: str | None) -> None:
    """Without add_bos_token, in texts where the splits differ; None is a SentencePiece file."""
    pytest.importorskip("cyllama", reason="llama.cpp is not installed")
    tokenizer = piece_level(prepends=True)
    if pre is not None:
        tokenizer = starting(splitting(LLAMA3, whole_words=True), BOS)
    file = written(tmp_path / "a.gguf", tokenizer, pre=pre)
    read = gguf_tokenizer(file)
    with closing(LlamaCpp(file, 64)) as theirs:
        for text in [*TEXTS, "I'M\r\n\r\n  ½ Ⅷ ١٢٣ wORLD", "foo/bar //\n\n\t\tÀÉ 'S"]:
            assert read(text)["input_ids"] == theirs.encode(text, True), text
