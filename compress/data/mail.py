"""E-mail messages to the text that a person reads: subject and decoded body, no headers or markup.

Uses the standard library's parser. Never fails on malformed messages, which archives are full of.
"""

from __future__ import annotations

import email
import email.policy
import re
from email.message import EmailMessage, Message
from html.parser import HTMLParser

_HIDDEN = ("script", "style", "title")


def subject_and_body(message: str | bytes) -> str:
    """Subject, an empty line, and the body with white space squeezed; attachments are left out.

    Takes the plain part if there is one, otherwise the HTML part without its tags.
    """
    # Old archives begin with the line by which a mailbox file parts messages.
    if isinstance(message, str):
        parsed = email.message_from_string(
            re.sub(r"\AFrom .*\n", "", message), policy=email.policy.compat32
        )
    else:
        parsed = email.message_from_bytes(
            re.sub(rb"\AFrom .*\n", b"", message), policy=email.policy.compat32
        )
    parts = [
        part
        for part in parsed.walk()
        if part.get_content_maintype() == "text" and not part.get_filename()
    ]
    plain = [
        text
        for part in parts
        if part.get_content_subtype() != "html" and (text := _decoded(part)).strip()
    ]
    marked = [
        _without_markup(_decoded(part)) for part in parts if part.get_content_subtype() == "html"
    ]
    body = "\n".join(plain or marked)
    return f"{_subject(parsed)}\n\n{_squeezed(body).strip()}".strip()


def _subject(message: Message) -> str:
    raw = str(message.get("Subject") or "")
    try:
        found = email.policy.default.header_factory("subject", raw)
    except (
        Exception
    ):  # the standard library's header parser has bugs that only malformed headers meet
        return " ".join(raw.split())
    return " ".join(str(found).split())


def _decoded(part: Message | EmailMessage) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return str(payload or "")
    charset = str(part.get_content_charset() or "utf-8")
    try:
        return payload.decode(charset, errors="replace")
    except (LookupError, ValueError):  # a character set that no one knows
        return payload.decode("latin-1")


def _squeezed(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _without_markup(text: str) -> str:
    reader = _Text()
    reader.feed(text)
    reader.close()
    return "".join(reader.pieces)


class _Text(HTMLParser):
    """Collects what is between tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        self._hidden += tag in _HIDDEN
        self.pieces.append("\n" if tag in ("br", "p", "div", "tr", "li") else " ")

    def handle_endtag(self, tag: str) -> None:
        """See `HTMLParser`."""
        self._hidden = max(self._hidden - (tag in _HIDDEN), 0)

    def handle_data(self, data: str) -> None:
        """See `HTMLParser`."""
        if not self._hidden:
            self.pieces.append(data)
