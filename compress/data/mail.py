"""E-mail messages to the text that a person reads: subject and decoded body, no headers or markup.

Uses the standard library's parsers. Never fails on malformed messages, which archives are full of,
and takes time and memory in proportion to their size, where those parsers alone do not.
"""

from __future__ import annotations

import email
import email.policy
import re
from email.message import Message
from html.parser import HTMLParser
from typing import Any

_HIDDEN = ("script", "style", "title")
# Characters of a subject that are read. The parser takes memory with the square of the length: a
# subject of 300 kB took 2.7 GB.
_LONGEST_SUBJECT = 10_000
_COMMENT_END = re.compile(r"-->|(?<!<!)--(?:\s+|!)>")
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
            re.sub(r"\AFrom .*\n", "", message), _Mail, policy=email.policy.compat32
        )
    else:
        parsed = email.message_from_bytes(
            re.sub(rb"\AFrom .*\n", b"", message), _Mail, policy=email.policy.compat32
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


class _Mail(Message):
    """A message whose parameters are text, whatever character set they claim."""

    def get_param(
        self, param: str, failobj: Any = None, header: str = "content-type", unquote: bool = True
    ) -> Any:
        """As `Message.get_param`, but text where that gives what RFC 2231 encodes, as three parts.

        Python's own decoding of it raises errors. A parameter counts as missing if its header
        cannot be read.
        """
        try:
            found = super().get_param(param, failobj, header, unquote)
        except ValueError:  # a number of 5,000 digits
            return failobj
        if not isinstance(found, tuple):
            return found
        charset, _, text = found
        try:
            return str(text.encode("raw-unicode-escape"), charset or "us-ascii", "replace")
        except (LookupError, ValueError):  # a character set that no one knows, or a wrong code
            return text


def _has_no_parts(part: Message) -> bool:
    """Whether a part says that it has parts, but lacks the line that would divide them."""
    return part.get_content_maintype() == "multipart" and not part.is_multipart()


def _subject(message: Message) -> str:
    named = (value for name, value in message.raw_items() if name.lower() == "subject")
    try:  # UTF-8 that was not encoded for mail
        raw = str(next(named, "")).encode("ascii", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raw = str(message.get("Subject") or "")
    # Unfolded first: a space between encoded words is no text, but Python keeps a line break.
    raw = re.sub(r"[\r\n]+", "", raw)[:_LONGEST_SUBJECT]
    try:
        found = email.policy.default.header_factory("subject", raw)
    except (
        Exception
    ):  # the standard library's header parser has bugs that only malformed headers meet
        return " ".join(raw.split())
    return " ".join(str(found).split())


def _decoded(part: Message, *, is_text: bool) -> str:
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
    # Python refuses to read a number of 4,301 digits. Eight are more than any character has.
    reader.feed(re.sub(r"&#0*(\d+)", lambda number: "&#" + number[1][:8], text))
    # What is left begins with a tag or comment that never ends, which hides the rest in browsers.
    # `close` would look for its end anew at every "<" of the rest.
    if not re.match(r"<[a-zA-Z/!?]", reader.rawdata):
        reader.close()
    return "".join(reader.pieces)


class _Text(HTMLParser):
    """Collects what is between tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Skip to the next ">", as browsers do: HTML knows no such section."""
        return self.parse_bogus_comment(i)

    def parse_comment(self, i: int, report: bool = True) -> int:
        """Skip a comment. Browsers end it at `<!-->` and `--!>` too."""
        end = _COMMENT_END.search(self.rawdata, i + 2)
        return end.end() if end else -1

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
