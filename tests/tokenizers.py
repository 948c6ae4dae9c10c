"""Small tokenizers of every kind that real models have, trained on a few lines."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from limbeck.contract.models.alignment import Pieces

CORPUS = [
    "the cat sat on the mat, and the dog sat on the log; 1234 5678 years of 2024\r\n",
    "thé naïve café: 語言模型 は 日本語 🙂👍🏽 a\u0301e\u0308 fish ﬁsh\n\n\tTabs and   spaces",
] * 4
END = "<end>"


def byte_level(size: int = 330, *, digits: bool = False, words: bool = True) -> Tokenizer:
    """As GPT-2, SmolLM2 and Qwen have it; without ``words`` a token may hold parts of several."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
        if digits
        else level
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[END])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def piece_level(size: int = 400, *, prepends: bool = False, bos: bool = True) -> Tokenizer:
    """As Gemma (or, with ``prepends``, Llama 2) has it: a metaspace, and bytes as a fallback."""
    special = [END, "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepends else replace
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    decoder = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(decoder)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tree = json.loads(tokenizer.to_str())  # the trainer calls every byte special
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    if bos:
        start = tokenizer.token_to_id("<bos>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair=None, special_tokens=[("<bos>", start)]
        )
    return tokenizer


def normalising() -> Tokenizer:
    tokenizer = byte_level(380)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", END], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True}  # fmt: skip
_WORDS = {"type": "Sequence", "pretokenizers": [
    {"type": "WhitespaceSplit"},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}]}  # fmt: skip


def encoder_tokenizer(kind: str) -> dict[str, Any]:
    """tokenizer.json of a BERT (WordPiece) or an XLM-RoBERTa (Unigram), as the hub has it."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzACDEFHILMNOPQSTU0123456789,.:;'-é本日`"})
    if kind == "Unigram":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = [*special, *letters, "\u2581", "\u2581the", "\u2581cat"]
        model: dict[str, Any] = {"vocab": [[one, -float(n)] for n, one in enumerate(pieces)],
                                 "unk_id": 3, "byte_fallback": False}  # fmt: skip
        parts = {"normalizer": None, "pre_tokenizer": _WORDS}
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*special, *letters, *(f"##{one}" for one in letters), "the", "cat"]
        model = {"vocab": {one: n for n, one in enumerate(pieces)}, "unk_token": "[UNK]",
                 "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}  # fmt: skip
        parts = {"normalizer": BERT, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": n, "content": one, "special": True} | flags for n, one in enumerate(special)]
    empty = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    return (
        {"version": "1.0", "added_tokens": added, "model": {"type": kind} | model} | parts | empty
    )


def pieces(tokenizer: Tokenizer, name: str = "teacher") -> Pieces:
    return Pieces(tokenizer, name=name, end=tokenizer.token_to_id(END))


def permute(tokenizer: Tokenizer, shift: int) -> Tokenizer:
    """The same tokenizer with other ids."""
    tree = json.loads(tokenizer.to_str())
    size = len(tree["model"]["vocab"])
    tree["model"]["vocab"] = {t: (i + shift) % size for t, i in tree["model"]["vocab"].items()}
    for token in tree["added_tokens"]:
        token["id"] = (token["id"] + shift) % size
    return Tokenizer.from_str(json.dumps(tree))
