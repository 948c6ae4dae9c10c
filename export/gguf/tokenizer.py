"""A student's tokenizer in the form that llama.cpp reads: kind, tokens, merges or scores, special
tokens and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError

# llama.cpp names the ways to cut text before merging. Each is known here by the regular expressions
# that a tokenizer.json has for it; "bytes" stands for ByteLevel's own expression.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    ("bytes",): "gpt-2",
    (_GPT2,): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
}
_NO_MERGE = "<no> <merge>"  # llama.cpp wants one; these are no symbols that it would ever meet
_SPACE = "▁"


def require_known(tokenizer: Mapping[str, Any]) -> None:
    """Raise `ModelError` for the content of a tokenizer.json that llama.cpp misreads."""
    _kind(tokenizer)


def write_tokenizer(
    writer: Any, model: Path, *, rows: int, ends: Sequence[int], template: str | None
) -> None:
    """Write the tokenizer of the transformers folder ``model`` with gguf's ``writer``.

    ``rows`` is the number of rows of the embedding; rows without a token become unused tokens.
    ``ends`` are the ids of end tokens. Raises `ModelError` for a tokenizer that llama.cpp would
    read otherwise.
    """
    from gguf import SpecialVocab, TokenType

    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    kind, cut = _kind(tokenizer)
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    types = dict.fromkeys(by_id, TokenType.NORMAL)
    if kind == "llama":
        types |= {n: TokenType.BYTE for token, n in vocabulary.items() if _is_byte(token)}
    for added in tokenizer.get("added_tokens", ()):
        special = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_id[added["id"]], types[added["id"]] = added["content"], special
    if (unknown := vocabulary.get(tokenizer["model"].get("unk_token") or "")) is not None:
        types[unknown] = TokenType.UNKNOWN
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([by_id.get(n, f"[PAD{n}]") for n in range(rows)])
    writer.add_token_types([types.get(n, TokenType.UNUSED) for n in range(rows)])
    special = SpecialVocab(model, load_merges=kind == "gpt2", n_vocab=rows)
    if kind == "llama":
        ranks = _ranks(tokenizer["model"]["merges"])
        writer.add_token_scores([-float(ranks.get(by_id.get(n, ""), rows)) for n in range(rows)])
        writer.add_add_space_prefix(_prepends_space(tokenizer))
    else:
        special.merges = special.merges or [_NO_MERGE]
    special.chat_template = template
    if ends:
        special.special_token_ids["eos"] = ends[0]
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])


def _kind(tokenizer: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's names of the tokenizer, and of how it cuts text before merging."""
    model, remedy = tokenizer["model"], "Leave the gguf forms out of export.forms."
    if model.get("type") != "BPE":
        raise ModelError(f"no GGUF can be written of a {model.get('type')} tokenizer. {remedy}")
    if model.get("byte_fallback"):
        cuts = [part["type"] for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")]
        if set(cuts) - {"Split", "Metaspace"}:
            raise ModelError(f"no GGUF can be written of a tokenizer with {cuts}. {remedy}")
        return "llama", "default"
    cuts = [
        cut
        for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
        if (cut := _cut(part)) is not None
    ]
    name = _CUTS.get(tuple(cuts)) if model["merges"] else "gpt-2"
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise ModelError(
            "no GGUF can be written of this tokenizer: llama.cpp has no name for the way it cuts "
            f"text ({'; '.join(cuts) or 'not at all'}). {remedy}"
        )
    return "gpt2", name


def _parts(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _cut(part: Mapping[str, Any]) -> str | None:
    match part["type"]:
        case "ByteLevel":
            return "bytes" if part.get("use_regex", True) else None
        case "Digits" if part.get("individual_digits"):
            return "digits"
        case "Split" if "Regex" in part["pattern"]:
            cut = str(part["pattern"]["Regex"])
            return "digits" if cut == r"\p{N}" else cut  # as in tokenizers read from GGUF files
    return str(part["type"])


def _ranks(merges: Sequence[str | Sequence[str]]) -> dict[str, int]:
    """The number of the first merge that makes each token: the earlier, the likelier."""
    ranks: dict[str, int] = {}
    for merge in merges:
        token = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        ranks.setdefault(token, len(ranks) + 1)
    return ranks


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    parts = _parts(tokenizer.get("normalizer"), "normalizers")
    before = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(p["type"] == "Prepend" and p.get("prepend") == _SPACE for p in parts) or any(
        p["type"] == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in before
    )
