"""Mails as archives hold them: odd encodings, broken parts, empty files and null bytes.

The right text is what went into the mail, written by the standard library's `EmailMessage` or by
hand, or what the HTML standard says.
"""

from __future__ import annotations

import base64
import json
import random
from email.message import EmailMessage
from pathlib import Path

import pytest

from compress.data.documents import documents
from compress.data.mail import subject_and_body
from limbeck.contract.errors import DataError
from limbeck.contract.files import file_digest
from limbeck.contract.recipe import FileText, MailText, PlainText, fingerprint
from limbeck.contract.sources.texts import text_digest

TEXTS = {
    "us-ascii": "Hello there",
    "utf-8": "Grüße, 你好, привет 😀",
    "utf-16": "Grüße, 你好",
    "iso-8859-1": "café ñandú",
    "windows-1252": "“quoted” – 5 €",
    "koi8-r": "привет мир",
    "shift_jis": "こんにちは",
    "iso-2022-jp": "こんにちは",
    "euc-kr": "안녕하세요",
    "big5": "你好嗎",
    "gb2312": "你好吗",
    "utf-7": "Grüße",
}


@pytest.mark.parametrize("charset", TEXTS)
@pytest.mark.parametrize("subtype", ["plain", "html"])
def test_a_mail_of_any_encoding_gives_its_text(charset: str, subtype: str) -> None:
    text = TEXTS[charset]
    content = text if subtype == "plain" else f"<html><body><p>{text}</p></body></html>"
    mail = EmailMessage()
    mail["Subject"] = text  # as encoded words
    mail["Content-Type"] = f"text/{subtype}; charset={charset}"
    mail["Content-Transfer-Encoding"] = "base64"
    mail.set_payload(base64.encodebytes(content.encode(charset)).decode())
    assert subject_and_body(mail.as_bytes()) == f"{text}\n\n{text}"


def test_text_without_a_declared_encoding_is_read_as_utf8() -> None:
    assert subject_and_body("Subject: café\n\nnaïve".encode()) == "café\n\nnaïve"
    assert subject_and_body(b"Subject: caf\xe9\n\nna\xefve") == "caf\ufffd\n\nna\ufffdve"
    unknown = b'Content-Type: text/plain; charset="x-none"\nSubject: s\n\n\xe9t\xe9'
    assert subject_and_body(unknown) == "s\n\nété"


@pytest.mark.parametrize(
    ("html", "text"),
    [  # by the HTML standard, what begins with <! and is no doctype, comment or CDATA is a comment
        ("a<![foo[bar]]>b", "ab"),
        ("a<![if !mso]>b<![endif]>c", "abc"),
        ("a<!-- no -->b<!x>c", "abc"),
        ("<script>no</script>a<style>no</style>b", "a b"),
        ("&eacute;&#233;&#xD800;&bogus;", "éé\ufffd&bogus;"),
        ("<p>a<p>b", "a\nb"),
        ("<div>" * 50_000 + "a", "a"),
    ],
)
def test_markup_that_is_wrong_is_read_as_browsers_read_it(html: str, text: str) -> None:
    mail = f"Content-Type: text/html; charset=utf-8\n\n{html}".encode()
    assert subject_and_body(mail).replace("  ", " ") == text


@pytest.mark.parametrize(
    ("mail", "text"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"From me Thu Aug 22 2002\n", ""),
        (b"no headers\nat all", "no headers\nat all"),
        (b"Subject: s\r\n t\r\n\r\nhi\r\nthere\r\n", "s t\n\nhi\nthere"),
        (b"Subject: s\x00t\n\na\x00b", "s\x00t\n\na\x00b"),
        (b"Subject: s\nContent-Transfer-Encoding: base64\n\naGVsbG8", "s\n\nhello"),  # cut short
        (b"Subject: s\nContent-Type: multipart/mixed\n\nhello", "s\n\nhello"),  # no boundary
        (b'Subject: s\nContent-Type: multipart/mixed; boundary="b"\n\n--b\n\nhello', "s\n\nhello"),
        (b"Subject: s\nContent-Type: ;;\n\nhello", "s\n\nhello"),
    ],
)
def test_broken_mails_give_the_text_that_is_there(mail: bytes, text: str) -> None:
    assert subject_and_body(mail) == text


def test_an_attachment_is_no_text() -> None:
    mail = EmailMessage()
    mail["Subject"] = "s"
    mail.set_content("body")
    mail.add_attachment("attached", filename="a.txt")
    mail.add_attachment(b"\x00\xff", maintype="application", subtype="octet-stream")
    assert subject_and_body(mail.as_bytes()) == "s\n\nbody"


def test_files_without_text_are_left_out_and_hopeless_ones_are_named(tmp_path: Path) -> None:
    form = MailText(kind="mail")
    (tmp_path / "empty.eml").write_bytes(b"")
    assert list(documents(tmp_path / "empty.eml", form)) == []
    nested = b"Content-Type: message/rfc822\n\n" * 3000 + b"Subject: s\n\nhi"
    (tmp_path / "nested.eml").write_bytes(nested)
    with pytest.raises(DataError, match=r"nested.eml: its parts are nested too deeply"):
        list(documents(tmp_path / "nested.eml", form))
    row = {"mail": "Subject: é\n\n你好 \ud800", "other": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    rows = MailText(kind="mail", field="mail")
    assert list(documents(tmp_path / "rows.jsonl", rows)) == ["é\n\n你好 \ufffd"]


def test_no_damage_of_a_mail_is_a_crash(tmp_path: Path) -> None:
    mail = EmailMessage()
    mail["Subject"] = TEXTS["utf-8"]
    mail.set_content("<p>plain</p>")
    mail.add_alternative(f"<p>{TEXTS['koi8-r']}<![if x]></p>", subtype="html", charset="koi8-r")
    whole, draw = mail.as_bytes(), random.Random(16)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 40)):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        (tmp_path / "a.eml").write_bytes(damaged)
        for text in documents(tmp_path / "a.eml", MailText(kind="mail")):
            text.encode()  # what a tokenizer takes


def test_a_student_of_mails_that_were_read_otherwise_is_made_again(tmp_path: Path) -> None:
    """The digest of the text, by which a student is found, says how a mail is read."""
    (tmp_path / "a.eml").write_text("Subject: a\n\nb")
    found = {
        form.kind: text_digest(
            FileText(kind="files", paths=("a.eml",), format=form), folder=tmp_path
        )
        for form in (MailText(kind="mail"), PlainText(kind="text"))
    }
    assert found["text"] == fingerprint([file_digest(tmp_path / "a.eml")])
    assert found["mail"] != found["text"]
