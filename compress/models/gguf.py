"""GGUF files to plain transformers folders: dequantised weights, and the tokenizer as llama.cpp
reads it.

transformers splits text as GPT-2 does wherever it does not know a pre-tokenizer's name, and it
adds no begin-of-text token where the file does not mention one.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata

from compress.models.gguf_config import UNREADABLE, gguf_config, require_all_read
from limbeck.contract.errors import ModelError
from limbeck.contract.models.loading import load_pretrained
from limbeck.contract.models.tokens import as_written, require_bounded, tokenizers_errors
from limbeck.contract.progress import say
from limbeck.contract.recipe import fingerprint
from limbeck.contract.sources.digests import gguf_digest
from limbeck.contract.sources.gguf import quick_gguf

# What llama.cpp's names of pre-tokenizers (tokenizer.ggml.pre) mean, from its llama-vocab.cpp as of
# llama-cpp-python 0.3.36. A name that is missing here is refused.
_GPT2 = {
    "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0",
    "mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
}  # fmt: skip
_SINGLE_DIGITS = {  # and then as GPT-2
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
}  # fmt: skip
_SAME_SPLIT = {  # names that transformers lacks, and a name that it or `_SPLITS` knows
    "chatglm-bpe": "llama-bpe",
    "glm4": "llama-bpe",
    "glm5": "llama-bpe",
    "stablelm2": "qwen2",
    "hunyuan": "qwen2",
    "solar-open": "qwen2",
    "grok-2": "qwen2",
    "hunyuan-dense": "deepseek-v3",
    "joyai-llm": "deepseek-v3",
    "gpt3-finnish": "bloom",
    "poro-chat": "bloom",
    "bailingmoe2": "bailingmoe",
    "llada-moe": "bailingmoe",
}
_LLAMA3 = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano",
}  # fmt: skip
# Patterns that split text one after the other; each splits the pieces of the one before. None is
# GPT-2's own pattern.
_WORDS_AND_MARKS = (  # of letters with their accents, and of marks
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", _WORDS_AND_MARKS)
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED = (  # cased letters of all but some scripts, as DeepSeek lists them
    "[\\p{Lu}\\p{Ll}\\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\ua7fa"
    "\uab30-\uab68\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001d7cb"
    "\U0001df00-\U0001df1e]]"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPLITS = {
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{_CASED}+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _IDEOGRAPHS,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}"),
    "deepseek-v3": _DEEPSEEK3,
    "falcon": (r"[\p{P}$+<=>^~|`]+", None, "[0-9]{3}"),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, r"\p{N}"),
    "bailingmoe": (
        rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_ENDS}",
    ),
    "seed-coder": (
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_ENDS}",
    ),
    "exaone-moe": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_ENDS}",
    ),
    "minicpm5": (
        r"\p{N}{1,3}",
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_ENDS}",
    ),
}
_ADDS_BOS = {*_LLAMA3, "tekken"}  # where the file does not say tokenizer.ggml.add_bos_token
_WHOLE_WORDS = {
    *_LLAMA3,
    "tekken",
    "glm4",
    "glm5",
    "minicpm5",
}  # a word that is a token needs no merges

_BESIDE = "Put the model's own tokenizer.json beside this file"
_UNREADABLE = (ValueError, OSError, LookupError, RuntimeError, AttributeError, TypeError)
_NORMAL = 1  # type of a token that is part of the vocabulary
_RULES = 5  # raised when a file is read in another way


def gguf_key(file: Path) -> str:
    """Fingerprint of a GGUF file and of the tokenizer.json beside it."""
    return fingerprint({"gguf": gguf_digest(file), "rules": _RULES})


def dequantise(file: Path, out: Path) -> dict[str, Any]:
    """Write the model of a GGUF file into the folder ``out``, in fp32. Raises `ModelError`."""
    say(f"  {file.name}: dequantising to fp32, once, into the cache")
    tokenizer = gguf_tokenizer(file)  # first: it takes less time to refuse
    try:
        # A progress bar that cannot be turned off.
        with quick_gguf(), contextlib.redirect_stderr(io.StringIO()):
            loaded = load_pretrained(
                AutoModelForCausalLM,
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                config=gguf_config(file),
            )
        require_all_read(file, loaded)
    except _UNREADABLE as error:
        raise ModelError(
            f"{file}: transformers cannot read this GGUF file: {error}. {UNREADABLE}"
        ) from error
    config = loaded.config
    # A model loaded from GGUF refuses save_pretrained while it carries this.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    if len(ends := _ends(file)) > 1:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"parameters": model.num_parameters()}


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file: that of the tokenizer.json beside it, or the one inside.

    Raises `ModelError` if the one beside has other tokens, and if transformers would read the one
    inside in another way than llama.cpp does.
    """
    beside, backend = file.parent / "tokenizer.json", None
    metadata = _metadata(file)
    try:
        with quick_gguf():
            architecture, fields, config = get_gguf_tokenizer(str(file))
        if not beside.is_file():
            backend = _inside(architecture, fields)
            if fields["tokenizer_type"] == "llama" and "gemma" not in architecture:
                known = str(metadata.get("general.name")).lower()
                backend = _by_pieces(backend, known, spaced=fields.get("add_prefix_space", True))
    except Exception as error:  # tokenizers raises no class of its own
        raise ModelError(f"{file}: no tokenizer can be read from it: {error}") from error
    start = "tokenizer.chat_template."
    if named := {n.removeprefix(start): t for n, t in metadata.items() if n.startswith(start)}:
        # Such as tool_use; transformers reads the one without a name alone.
        named |= {"default": config["chat_template"]} if config.get("chat_template") else {}
        config["chat_template"] = named
    if backend is None:
        return _own(beside, file, fields, config)
    if fields["tokenizer_type"] == "gpt2":
        name = fields.get("pre_tokenizer_type")
        if name is None and architecture == "gpt2":
            name = "gpt-2"
        _split_as(name, backend, file)
        config.setdefault("add_bos_token", name in _ADDS_BOS)
    if config.get("add_bos_token") and config["bos_token"] is None:
        raise ModelError(
            f"{file}: its tokenizer puts a token before every text, but the file does not say which"
            f" (tokenizer.ggml.bos_token_id is missing). {_BESIDE}, or write that key into it."
        )
    tree = json.loads(backend.to_str())
    # transformers adds an <|endoftext|> of its own, which the model has no row for.
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["id"] < len(fields["tokens"])]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        **{name: value for name, value in config.items() if value is not None},
    )


def _metadata(file: Path) -> dict[str, Any]:
    """What a file says without its arrays. Raises `ModelError` unless it holds a language model."""
    try:
        found: dict[str, Any] = read_gguf_metadata(str(file), ())[0]
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ModelError(f"{file}: no GGUF file that can be read: {error}. {UNREADABLE}") from error
    if "tokenizer.ggml.model" not in found:
        kind = found.get("general.type", found.get("general.architecture"))
        raise ModelError(
            f"{file}: a GGUF file without a tokenizer (its type is {kind}), so no language model. "
            "Name the file of the model itself; merge an adapter into it first."
        )
    return found


def _ends(file: Path) -> list[int]:
    """Tokens at which llama.cpp ends an answer: of a text, of a turn, and of a call of a tool."""
    metadata = _metadata(file)
    found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(end) for end in found if end is not None))


def _inside(architecture: str, fields: dict[str, Any]) -> Any:
    """The tokenizer of ``fields``, as transformers makes it."""
    if "merges" in fields:
        # llama.cpp wants one, so files of tokenizers without any have one of symbols never met.
        known = set(fields["tokens"])
        fields["merges"] = [m for m in fields["merges"] if known.issuperset(m.split(" "))]
    return convert_gguf_tokenizer(architecture, fields)[0]


def _by_pieces(tokenizer: Any, name: str, *, spaced: bool) -> Any:
    """A SentencePiece ``tokenizer`` as llama.cpp and the tokenizer.json of such models have it.

    If ``spaced``, a space comes before every text and behind every special token; transformers puts
    it before the first word of a text alone, whatever the file says. ``name`` is the model's.
    """
    space = "\u2581"
    rules = [normalizers.Replace(" ", space)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space)] * spaced + rules)
    tokenizer.pre_tokenizer = None
    parts = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * spaced)
    if not any(part in name for part in ("phi-3", "phi3")):
        return tokenizer
    tree = json.loads(tokenizer.to_str())  # llama.cpp knows by the name what no file says
    for token in tree["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return Tokenizer.from_str(json.dumps(tree))


def _split_as(name: str | None, tokenizer: Any, file: Path) -> None:
    """Make a byte-level ``tokenizer`` split text as llama.cpp's pre-tokenizer ``name`` does."""
    known = _SAME_SPLIT.get(name or "", name)
    if name in _GPT2:
        splits: tuple[str | None, ...] = (None,)
    elif name in _SINGLE_DIGITS:
        splits = (r"\p{N}", None)
    elif known in _SPLITS:
        splits = _SPLITS[known]
    elif known in GGUF_PRE_TOKENIZER_SPLITS:
        splits = (GGUF_PRE_TOKENIZER_SPLITS[known],)
    else:
        found = (
            f"splits text as {name!r} does (tokenizer.ggml.pre), which Limbeck cannot rebuild"
            if name
            else "does not say how it splits text (tokenizer.ggml.pre is missing)"
        )
        raise ModelError(f"{file}: its tokenizer {found}. {_BESIDE}.")
    level = pre_tokenizers.ByteLevel
    parts = [
        level(add_prefix_space=False)
        if regex is None
        else pre_tokenizers.Split(Regex(regex), behavior="isolated")
        for regex in splits
    ]
    if None not in splits:
        parts.append(level(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.model.ignore_merges = name in _WHOLE_WORDS


def _own(
    path: Path, file: Path, fields: dict[str, Any], config: dict[str, Any]
) -> PreTrainedTokenizerFast:
    """The tokenizer of ``path``; special tokens and template of ``file`` where it lacks them."""
    tokenizer: PreTrainedTokenizerFast
    with tokenizers_errors(path):
        require_bounded(path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent)
    as_written(tokenizer.backend_tokenizer, path)
    vocabulary, kinds = tokenizer.get_vocab(), fields.get("token_type") or []
    by_id = {number: token for token, number in vocabulary.items()}
    for number, (token, kind) in enumerate(zip(fields["tokens"], kinds, strict=True)):
        # Files of SentencePiece models may hold spaces for metaspaces.
        there = by_id.get(number, "")
        if kind == _NORMAL and there.replace(" ", "▁") != token.replace(" ", "▁"):
            raise ModelError(
                f"{path}: not the tokenizer of {file.name}, whose token {number} is {token!r}; here"
                f" it is {there!r}. Put that model's own tokenizer.json there, or move this one."
            )
    if len(tokenizer) > len(fields["tokens"]):
        raise ModelError(
            f"{path}: has {len(tokenizer)} tokens, and {file.name} {len(fields['tokens'])}. Put "
            "that model's own tokenizer.json there, or move this one."
        )
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if getattr(tokenizer, name) is None and config.get(name) is not None:
            setattr(tokenizer, name, config[name])
    tokenizer.chat_template = tokenizer.chat_template or config.get("chat_template")
    return tokenizer
