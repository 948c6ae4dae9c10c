"""Text in, tokens out, and back: the tokenizer, chat template and end tokens of an exported folder.

Knows tokenizers, and imports it when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ArtifactError, DataError, ModelError
from limbeck.contract.files import parse_json
from limbeck.contract.models.tokens import (
    as_written,
    chat_templates,
    read_tokenizer,
    special_tokens,
    text_errors,
)
from limbeck.runtime.chat import render

_LONG = 20_000  # characters
_AGAIN = "copy the folder again, or export the student again."


def well_formed(text: str) -> str:
    """``text`` with U+FFFD for every lone surrogate, which UTF-8 and tokenizers cannot hold.

    Such characters come from JSON escapes like ``"\\ud800"`` and from arguments that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class Text:
    """The tokenizer, chat template and stop tokens of a deployable folder."""

    tokenizer: Any
    template: str | None
    special: dict[str, str]  # bos_token and its like, as the chat template names them
    stop_ids: frozenset[int]
    tool_template: str | None = None  # of conversations with tools, where the model has another one

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: special tokens before it are added, those behind it are not.

        A tokenizer whose template is ``<s> $A </s>`` would end the prompt, which the model then
        has nothing to go on from.
        """
        encoding = self._encoded(well_formed(text), True)
        ids, added = list(encoding.ids), encoding.special_tokens_mask
        while len(ids) > self._before and added[len(ids) - 1]:
            ids.pop()
        return ids

    @cached_property
    def _before(self) -> int:
        """Special tokens that are added before any text."""
        added: list[int] = self._encoded("a", True).special_tokens_mask
        return added.index(0) if 0 in added else 0

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, as `encode_rendered` has them of what `rendered` has."""
        return self.encode_rendered(self.rendered(messages, tools))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what `rendered` returned, which has its special tokens already."""
        return list(self._encoded(text, False).ids)

    def rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation (``role`` and ``content`` each) as text up to the model's answer.

        ``tools`` are OpenAI's descriptions of functions, for templates that show them;
        ``variables`` are the template's own.
        Raises `DataError` when there is no chat template or it refuses the messages.
        """
        template = self.template_for(tools)
        if template is None:
            raise DataError(
                "this model has no chat template; leave --chat out and give it plain text."
            )
        return well_formed(render(template, messages, self.special, tools, variables))

    def template_for(self, tools: Sequence[Any] | None) -> str | None:
        """The chat template of a conversation with these ``tools``, as transformers chooses it."""
        return self.tool_template if tools and self.tool_template is not None else self.template

    def _encoded(self, text: str, special: bool) -> Any:
        """Tokenise; a long text leaves the interpreter to other threads meanwhile.

        `encode` is quicker for one text but holds the interpreter lock: 0.3 s for 1 MB.
        Raises `DataError` for a text on which the tokenizer fails.
        """
        with text_errors():
            if len(text) < _LONG:
                return self.tokenizer.encode(text, add_special_tokens=special)
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of ``ids`` as it becomes certain.

        A character is never cut, and the pieces join to the text of all ids decoded at once.
        """
        decoding = Decoding(self.tokenizer)
        for token in ids:
            if piece := decoding.add(token):
                yield piece
        if rest := decoding.rest():
            yield rest

    @cached_property
    def unseen(self) -> frozenset[str]:
        """Special tokens, which the text of an answer leaves out."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest entry of the vocabulary: no token of a prompt covers more."""
        return max(map(len, map(str.encode, self.tokenizer.get_vocab())), default=1)


class Decoding:
    """Text of tokens that come one at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        # The last tokens whose text is out: a decoder may treat a text's first token differently.
        self._context: list[int] = []

    def add(self, token: int) -> str:
        """The text that ``token`` makes certain; empty while it ends within a character."""
        self._pending.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        shows = self._pending if self._decode(self._pending) else self._context + self._pending
        self._context, self._pending = shows, []
        return text

    def rest(self) -> str:
        """The text held back, once no token follows."""
        return self._new() if self._pending else ""

    def _decode(self, ids: list[int]) -> str:
        with text_errors():
            return str(self._tokenizer.decode(ids))

    def _new(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]


def load_text(folder: Path) -> Text:
    """Open the text side of a deployable folder.

    Raises `ArtifactError` for a file that is missing or cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: tokenizer.json is missing; expected the folder that `limbeck export` wrote."
        )
    try:
        tokenizer = read_tokenizer(path)
    except ModelError as error:
        if error.__cause__ is None:
            raise ArtifactError(str(error)) from None
        raise ArtifactError(f"{path}: no tokenizer ({error.__cause__}); {_AGAIN}") from error
    config = _read(folder / "tokenizer_config.json")
    as_written(tokenizer, path, split_special=config.get("split_special_tokens") is True)
    templates, special = chat_templates(folder, config), special_tokens(config)
    return Text(
        tokenizer=tokenizer,
        template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        special=special,
        stop_ids=_stop_ids(folder, tokenizer.token_to_id(special.get("eos_token", ""))),
    )


def _stop_ids(folder: Path, of_tokenizer: int | None) -> frozenset[int]:
    """Every token that ends an answer, whichever file of the folder names it.

    Files disagree in practice: a chat model's tokenizer ends a turn with ``<|im_end|>`` while its
    generation configuration only has ``<|endoftext|>``. Both end the answer.
    """
    stated = (
        _read(folder / "generation_config.json").get("eos_token_id"),
        _read(folder / "config.json").get("eos_token_id"),
        _read(folder / "genai_config.json").get("model", {}).get("eos_token_id"),
        of_tokenizer,
    )
    lists = [one if isinstance(one, list) else [one] for one in stated]
    return frozenset(token for ids in lists for token in ids if isinstance(token, int))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text("utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
