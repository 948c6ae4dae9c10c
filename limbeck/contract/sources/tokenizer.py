"""The tokenizer of a model folder, as transformers reads it.

transformers is imported where it is needed: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.contract.errors import ModelError
from limbeck.contract.models.tokens import (
    as_written,
    read_tokenizer,
    require_bounded,
    sentencepiece_file,
    tokenizers_errors,
)
from limbeck.contract.sources.models import require_rows, require_tokenizer
from limbeck.contract.sources.places import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from limbeck.contract.models.alignment import Relation


# What readers of one file differ in: first words, spaces, digits, apostrophes, unknown letters.
_PROBE = "The quick  brown fox, naïve Café: 12345 of 日本"
# No text begins with a space, which Llama's class reads otherwise than most files, and none ends
# with white space, which Unigram's classes drop. Few vocabularies have the last letter.
_PROBES = (
    _PROBE,
    "don't\n\n\tHELLO's 1,000.50 e\u0301 the\u200bcat-ﬁsh ``q'' " + "ab" * 60 + " \U00013000",
)
# Classes of transformers that read tokenizer.json as it is.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a plain folder; it never cuts or fills a text.

    Raises `ModelError`, also if it has more tokens than the model has rows, or if transformers
    reads a SentencePiece file in another way than sentencepiece does, or tokenizer.json in another
    way than it says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    require_tokenizer(folder)
    tokenizer: PreTrainedTokenizerFast
    with tokenizers_errors(folder):
        if (path := folder / "tokenizer.json").is_file():
            require_bounded(path)
        # transformers 5 takes another class for some architectures, whatever the folder says.
        plain = path.is_file() and _declared(folder) in _PLAIN
        try:
            tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except ValueError as error:
            if "custom code" not in str(error):
                raise
            raise ModelError(
                f"{folder}: its tokenizer needs code of its own (auto_map in "
                "tokenizer_config.json), which Limbeck never runs. If there is a tokenizer.json, "
                "take auto_map and tokenizer_class out of that file."
            ) from None
        # A class that does not go with the file may fail only here.
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.encode(_PROBE)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: only a slow tokenizer; save it with a tokenizer.json (a fast tokenizer)."
        )
    # transformers switches these off in every call; we call the tokenizer inside.
    as_written(tokenizer.backend_tokenizer, folder, split_special=tokenizer.split_special_tokens)
    require_rows(folder, len(tokenizer))
    if path.is_file() and type(tokenizer).__name__ not in _PLAIN:
        _require_as_in_file(tokenizer, path)
    if (file := sentencepiece_file(folder)) is not None:
        _require_same_pieces(tokenizer, file)
    return tokenizer


def relation(
    own: PreTrainedTokenizerFast,
    other: PreTrainedTokenizerFast,
    *,
    plain: bool = True,
    chats: Literal["document", "stream"] | None = None,
) -> Relation:
    """How a teacher's tokenizer ``other`` relates to the student's.

    ``plain``: some text is no conversation, and only there the tokens before and after a text
    matter, unless the chat templates differ too. ``chats``: how conversations are packed; None
    where there are none.
    """
    from limbeck.contract.models.alignment import relate

    both = own.chat_template and other.chat_template
    alike = bool(both) and _same_chat(own, other)
    found = relate(own.backend_tokenizer, other.backend_tokenizer, begins=plain or not alike)
    if not found.same:
        return found
    ends = (str(own.eos_token), str(other.eos_token))
    differ = plain and other.eos_token is not None and ends[0] != ends[1]
    return replace(
        found, chats=chats if both and not alike else None, ends=ends if differ else None
    )


def require_same_tokenizer(names_and_folders: Mapping[str, Path]) -> None:
    """Raise `ModelError` unless all folders map the same tokens to the same ids, in equal texts.

    Padded rows may differ. The message counts the ids that differ and shows three.
    """
    from limbeck.contract.models.alignment import relate

    (first, first_folder), *rest = names_and_folders.items()
    own = load_tokenizer(first_folder)
    reference = own.get_vocab()
    for name, folder in rest:
        tokenizer = load_tokenizer(folder)
        vocabulary = tokenizer.get_vocab()
        if vocabulary == reference:
            if relate(own.backend_tokenizer, tokenizer.backend_tokenizer).same:
                continue
            raise ModelError(
                f"{first} and {name} have the same tokens, but tokenise a text differently: one "
                "may lower-case it, drop its accents, or add a token before it. Choose models of "
                "one family."
            )
        different = sorted(
            t for t in reference.keys() | vocabulary.keys() if reference.get(t) != vocabulary.get(t)
        )
        shown = "; ".join(
            f"{t!r} is {reference.get(t)} in {first} and {vocabulary.get(t)} in {name}"
            for t in different[:3]
        )
        raise ModelError(
            f"{first} and {name} have different tokenizers: {len(different)} of "
            f"{len(reference.keys() | vocabulary.keys())} tokens "
            f"have another id or are missing ({shown}). Fusion needs one token map: choose models "
            "of one family."
        )


def _same_chat(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether the chat templates of two tokenizers write a conversation alike."""
    if one.chat_template != other.chat_template:
        return False
    texts, special = str(one.chat_template), (one.special_tokens_map, other.special_tokens_map)
    used = [name for name in special[0] | special[1] if name in texts]
    return all(str(special[0].get(name)) == str(special[1].get(name)) for name in used)


def _declared(folder: Path) -> object:
    """The class that tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    return read_object(path).get("tokenizer_class") if path.is_file() else None


def _require_as_in_file(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Raise `ModelError` if the class of ``tokenizer`` cuts a text in other places than ``file``.

    transformers 4 read the file, and models were trained with it.
    """
    written = read_tokenizer(file)
    own = tokenizer.backend_tokenizer
    written.encode_special_tokens = own.encode_special_tokens
    _set_as_bert(written.normalizer, own.normalizer, tokenizer)
    breaks = "\n" if type(written.model).__name__ == "BPE" else ""
    for text in _PROBES:
        found, right = (t.encode(text + breaks, add_special_tokens=False) for t in (own, written))
        if found.ids == right.ids:
            continue
        pairs = zip(found.ids, right.ids, strict=False)
        at = next((n for n, (one, other) in enumerate(pairs) if one != other), -1)
        pieces = f"{found.tokens[at]!r} where the file has {right.tokens[at]!r}"
        raise ModelError(
            f"{file}: transformers reads it as {type(tokenizer).__name__}, which cuts a text in "
            f"other places than the file says ({pieces}). "
            "Models trained with transformers 4 or other programs expect what the file says: "
            'write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json. For '
            f"what {type(tokenizer).__name__} reads, save the tokenizer again: "
            "`AutoTokenizer.from_pretrained(…).save_pretrained(…)`."
        )


def _set_as_bert(written: Any, own: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set case and accents in ``written``, the normalizer of a file, as its class does.

    Classes of BERT's kind took these from tokenizer_config.json in transformers 4 too.
    """
    from tokenizers.normalizers import BertNormalizer

    if isinstance(written, BertNormalizer) and isinstance(own, BertNormalizer):
        written.lowercase, written.strip_accents = own.lowercase, own.strip_accents
        if type(tokenizer).__name__ != "MPNetTokenizer":
            written.handle_chinese_chars = own.handle_chinese_chars


def _require_same_pieces(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    from sentencepiece import SentencePieceProcessor  # few models need it

    own = SentencePieceProcessor(model_file=str(file)).encode(_PROBE, out_type=str)
    found = tokenizer.tokenize(_PROBE)
    if found != own:
        first = next((n for n, (a, b) in enumerate(zip(found, own, strict=False)) if a != b), -1)
        raise ModelError(
            f"{file}: transformers reads it as {type(tokenizer).__name__}, which cuts a text in "
            f"other places ({found[first]!r} where sentencepiece has {own[first]!r}). Name the "
            "model's own tokenizer_class in tokenizer_config.json, or put its tokenizer.json there."
        )
