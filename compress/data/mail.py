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
_ENCODED = ("quoted-printable", "base64", "x-uuencode", "uuencode", "uue", "x-uue")


def subject_and_body(message: str | bytes) -> str:
    """Subject, an empty line, and the body with white space squeezed; attachments are left out.

    Takes the plain part if there is one, otherwise the HTML part without its tags. Raises
    `RecursionError` if parts are nested hundreds deep.
    """
    # Old archives begin with the line by which a mailbox file parts messages.
    is_text = isinstance(message, str)
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
        if not part.get_filename()
        and (part.get_content_maintype() == "text" or _has_no_parts(part))
    ]
    plain = [
        text
        for part in parts
        if part.get_content_subtype() != "html"
        and (text := _decoded(part, is_text=is_text)).strip()
    ]
    marked = [
        _without_markup(_decoded(part, is_text=is_text))
        for part in parts
        if part.get_content_subtype() == "html"
    ]
    body = "\n".join(plain or marked)
    return f"{_subject(parsed)}\n\n{_squeezed(body).strip()}".strip()


def _has_no_parts(part: Message | EmailMessage) -> bool:
    """Whether a part says that it has parts, but lacks the line that would divide them."""
    return part.get_content_maintype() == "multipart" and not part.is_multipart()


def _subject(message: Message) -> str:
    named = (value for name, value in message.raw_items() if name.lower() == "subject")
    try:  # UTF-8 that was not encoded for mail
        raw = str(next(named, "")).encode("ascii", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raw = str(message.get("Subject") or "")
    try:
        found = email.policy.default.header_factory("subject", raw)
    except (
        Exception
    ):  # the standard library's header parser has bugs that only malformed headers meet
        return " ".join(raw.split())
    return " ".join(str(found).split())


def _decoded(part: Message | EmailMessage, *, is_text: bool) -> str:
    """The text of a part. ``is_text`` says that the message was text, so only parts that were
    encoded for transfer are bytes in the declared encoding."""
    transfer = str(part.get("Content-Transfer-Encoding") or "").strip().lower()
    if is_text and transfer not in _ENCODED:
        return str(part.get_payload())
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

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Skip a section that HTML does not know, as browsers do; Python 3.11 asserts."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

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
