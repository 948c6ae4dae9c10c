"""Two tokenisations of one text, aligned on bytes: the traps of real tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, processors

from limbeck.contract.errors import ModelError
from limbeck.contract.models.alignment import Aligner, Pieces, projection, relate
from tests.tokenizers import END, byte_level, normalising, permute, piece_level, pieces, unigram


def trimming() -> Tokenizer:
    """As Pythia has it: its offsets leave out the spaces at both ends of a token."""
    tokenizer = byte_level(400, words=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


OTHERS = {
    "smaller": byte_level(270),
    "digits": byte_level(350, digits=True),
    "gemma": piece_level(),
    "llama2": piece_level(prepends=True),
    "no bos": piece_level(bos=False),
    "nfkc": normalising(),
    "unigram": unigram(),
    "trims": trimming(),
}
OWN = pieces(byte_level(), "student")
ALIGNERS = {name: Aligner(OWN, pieces(tokenizer)) for name, tokenizer in OTHERS.items()}
ALPHABET = "the cat sat on  \r\n\t0123456789éàａ語言日🙂👍🏽\u0301\u200d\ufb01\u2581ĠABÇ<end>"


@pytest.mark.parametrize("name", list(OTHERS))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=12)))
@example(text="🙂👍🏽 x")
@example(text="語言 12345\r\n\r\na\u0301")
@example(text=" leading")
@example(text=" ")
@example(text="ﬁsh Ａ")
def test_chunks_partition_the_bytes(name: str, text: str) -> None:
    """Each chunk holds the same bytes on both sides, and chunks follow each other without a gap."""
    aligner = ALIGNERS[name]
    ids = OWN.tokenizer.encode(text, add_special_tokens=False).ids
    found = aligner.row(ids)
    other = aligner.other
    # Some read another text: lower case, unknown characters, a written metaspace as a space.
    exact = name not in ("nfkc", "unigram") and "\u2581" not in text
    ours, theirs = 0, len(other.prefix)
    for first, last, their_first, their_last in found.chunks.tolist():
        assert first == ours
        assert their_first >= theirs
        assert last > first
        assert their_last > their_first
        assert found.at[last - 1] == their_last - 1
        ours, theirs = last, their_last
        if exact:
            mine = b"".join(OWN.pieces(ids[first:last]))
            read = b"".join(other.pieces(found.ids[their_first:their_last].tolist()))
            assert read in (mine, b" " + mine) if first == 0 else read == mine
    if exact:
        assert ours == len(ids)
        assert theirs == len(found.ids)
        whole = b"".join(other.pieces(found.ids.tolist()))
        assert whole in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("name", list(OTHERS))
@settings(deadline=None, max_examples=40)
@given(ids=st.lists(st.integers(0, len(OWN.of) + 3), max_size=20))
def test_any_tokens_have_an_alignment(name: str, ids: list[int]) -> None:
    """Rows cut inside a character, special tokens anywhere, ids of padded rows of a head."""
    found = ALIGNERS[name].row(ids)
    assert len(found.at) == len(ids)
    assert found.at.max(initial=-1) < len(found.ids)
    known = found.at[found.at >= 0]
    assert (known[1:] >= known[:-1]).all()
    chunks = found.chunks
    assert (chunks[1:, 0] >= chunks[:-1, 1]).all()
    assert (chunks[1:, 2] >= chunks[:-1, 3]).all()


@pytest.mark.parametrize("name", ["smaller", "digits", "gemma", "llama2", "no bos", "trims"])
@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.text("the cat  \n", max_size=8), st.integers(1, 300)), max_size=8))
@example(["the ", OWN.by_bytes[b"\xc3"], "cat", "  "])
def test_both_sides_have_read_the_same_text_at_a_boundary(name: str, parts: list[Any]) -> None:
    """Python decodes the bytes of both sides, also where these are no UTF-8."""
    written = [[p] if isinstance(p, int) else OWN.tokenizer.encode(p).ids for p in parts]
    ids = [token for part in written for token in part]
    found, other = ALIGNERS[name].row(ids), ALIGNERS[name].other
    texts = (OWN.pieces(ids), other.pieces(found.ids.tolist()))
    for place, theirs in enumerate(found.at.tolist()):
        if theirs >= 0:
            mine, read = (
                b"".join(side[: end + 1]).decode(errors="replace")
                for side, end in zip(texts, (place, theirs), strict=True)
            )
            assert read in (mine, " " + mine)


def test_a_boundary_needs_whole_characters_on_both_sides() -> None:
    aligner = Aligner(OWN, pieces(piece_level(280)))  # falls back to bytes
    ids = OWN.tokenizer.encode("a🙂b").ids
    found = aligner.row(ids)
    spans = [b"".join(OWN.pieces(ids[first:last])) for first, last, _, _ in found.chunks.tolist()]
    assert b"".join(spans) == "a🙂b".encode()
    for (_, last, _, their_last), span in zip(found.chunks.tolist(), spans, strict=True):
        assert found.at[last - 1] == their_last - 1
        assert span


@pytest.mark.parametrize("damage", ["", "\ufffd"])
def test_boundaries_within_a_character_are_found_beside_what_is_no_text(damage: str) -> None:
    """Both sides write the character byte by byte; the other one reads damage as U+FFFD."""
    own = [OWN.by_bytes[bytes([byte])] for byte in (b"\xc3" if damage else b"") + "𓀀".encode()]
    found = ALIGNERS["smaller"].row(own)
    before = len(damage.encode())
    assert len(found.ids) == before + 4
    assert found.at.tolist()[len(damage) :] == list(range(before, before + 4))


@pytest.mark.parametrize("first", [" a", " \xc3 a"], ids=["text", "damaged"])
def test_a_space_that_the_other_side_adds_is_not_read_twice(first: str) -> None:
    ids = [OWN.by_bytes[bytes([byte])] for byte in first.encode("latin-1")]
    found = ALIGNERS["llama2"].row(ids)
    read = b"".join(ALIGNERS["llama2"].other.pieces(found.ids.tolist()))
    assert read == first.encode("latin-1").decode(errors="replace").encode()


@pytest.mark.parametrize("first", ["", "a"])
def test_a_space_that_the_other_side_adds_is_read_before_the_text(first: str) -> None:
    """The added space is a token by itself here, and stands for no byte of the text."""
    aligner, character = Aligner(OWN, pieces(unigram())), "語"
    assert OWN.end is not None
    ids = [*OWN.tokenizer.encode(first).ids, OWN.end, *OWN.tokenizer.encode(character).ids]
    end = ids.index(OWN.end)
    found = aligner.row(ids)
    read = aligner.other.pieces(found.ids.tolist())
    space = len(read) - 2
    assert read[space:] == [b" ", character.encode()]
    assert found.chunks[-1].tolist() == [end + 1, len(ids), space + 1, space + 2]
    assert found.at[-1] == space + 1
    assert found.at[end] == (space if first else -1)  # with no token before it begins the text


def test_a_begin_token_on_one_side_only() -> None:
    """The other side's BOS is before the text, and no chunk holds it."""
    ids = OWN.tokenizer.encode("the cat").ids
    with_bos, without = ALIGNERS["gemma"].row(ids), ALIGNERS["no bos"].row(ids)
    assert with_bos.ids.tolist()[1:] == without.ids.tolist()
    assert (with_bos.chunks[:, 2:] == without.chunks[:, 2:] + 1).all()
    assert (with_bos.chunks[:, :2] == without.chunks[:, :2]).all()


def test_the_end_of_a_text_is_the_end_on_the_other_side() -> None:
    end = OWN.tokenizer.token_to_id(END)
    a, b = (OWN.tokenizer.encode(text).ids for text in ("the cat", "the dog"))
    aligner = ALIGNERS["gemma"]
    found = aligner.row([*a, end, *b])
    theirs = aligner.other.end
    bos = aligner.other.prefix
    place = found.ids.tolist().index(theirs)
    assert found.ids.tolist()[place + 1 : place + 2] == bos
    chunk = [len(a), len(a) + 1, place, place + 1]
    assert chunk in found.chunks.tolist()  # its own chunk; the BOS behind it is in none
    assert found.at[len(a)] == place + 1
    assert found.at[len(a) - 1] == place - 1


def test_a_marker_in_the_text_is_text() -> None:
    """The characters of the teacher's end token, which the student reads as characters."""
    own = byte_level()
    own = Tokenizer.from_str(own.to_str().replace(END, "<stop>"))
    mine = Pieces(own, name="student", end=own.token_to_id("<stop>"))
    aligner = Aligner(mine, pieces(byte_level(300)))
    ids = mine.tokenizer.encode("a <end> b").ids
    found = aligner.row(ids)
    assert aligner.other.end not in found.ids
    assert b"".join(aligner.other.pieces(found.ids.tolist())) == b"a <end> b"


def test_an_unknown_special_token_has_no_target() -> None:
    own = byte_level()
    own.add_special_tokens(["<tool>"])
    mine = pieces(own, "student")
    ids = [*own.encode("the cat").ids, own.token_to_id("<tool>"), *own.encode("the dog").ids]
    found = Aligner(mine, pieces(byte_level(300))).row(ids)
    special = ids.index(own.token_to_id("<tool>"))
    assert found.at[special - 1] == -1  # its label is the special token
    assert special not in [t for f, last, *_ in found.chunks.tolist() for t in range(f, last)]


def test_a_normaliser_is_followed_by_characters() -> None:
    ids = OWN.tokenizer.encode("The ﬁsh").ids
    found = ALIGNERS["nfkc"].row(ids)
    assert ALIGNERS["nfkc"].other.tokenizer.decode(found.ids.tolist()) == "the fish"
    assert found.chunks[-1, 1] == len(ids)


@pytest.mark.parametrize(
    "model", [models.WordPiece({"[UNK]": 0, "a": 1}), models.WordLevel({"a": 0}, unk_token="a")]
)
def test_tokenizers_that_drop_spaces_are_refused(model: models.Model) -> None:
    tokenizer = Tokenizer(model)
    with pytest.raises(ModelError, match=f"teacher: its tokenizer is {type(model).__name__}"):
        Pieces(tokenizer, name="teacher")


def test_word_end_marks_are_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(ModelError, match="marks words with '</w>'"):
        Pieces(tokenizer, name="teacher")


# The projection ----------------------------------------------------------------------------------


def _texts(side: Pieces) -> Iterator[tuple[int, bytes]]:
    return ((index, data) for index, data in enumerate(side.of) if data)


@pytest.mark.parametrize("name", list(OTHERS))
def test_projected_tokens_begin_the_same_bytes(name: str) -> None:
    other = ALIGNERS[name].other
    target = projection(OWN, other, rows=len(other) + 5)
    assert (target[len(other) :] == -1).all()
    for index, data in _texts(other):
        begun = OWN.of[target[index]]
        assert begun
        assert data.startswith(begun)
        if data in OWN.by_bytes:  # exact matches meet one to one
            assert begun == data
    assert target[other.end] == OWN.end
    assert all(target[i] == -1 for i in other.special if i != other.end)


def test_the_projection_is_the_student_s_own_first_token() -> None:
    other = ALIGNERS["gemma"].other
    target = projection(OWN, other)
    for index, data in _texts(other):
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        own = OWN.tokenizer.encode(text, add_special_tokens=False).ids
        assert target[index] == own[0], text


def test_tokens_that_begin_with_nothing_of_ours_have_no_target() -> None:
    """A Unigram vocabulary lacks most bytes, and these two know no end of a text."""
    own = Pieces(unigram(), name="student")
    other = Pieces(byte_level(), name="teacher")
    target = projection(own, other)
    known = tuple(data for data in own.of if data)
    begun = [data.startswith(known) for data in other.of]
    assert (target >= 0).tolist() == begun
    assert target[other.tokenizer.token_to_id(END)] == -1
    assert 0 < sum(begun) < len(begun)


def test_the_projection_of_a_permuted_vocabulary_is_the_permutation() -> None:
    own = byte_level()
    permuted = permute(own, shift=7)
    target = projection(pieces(own), pieces(permuted))
    vocabulary = own.get_vocab()
    assert target.tolist() == [
        vocabulary[t] for t, _ in sorted(permuted.get_vocab().items(), key=lambda item: item[1])
    ]


# Which are the same ------------------------------------------------------------------------------


def test_maps_that_differ_in_added_tokens_are_the_same() -> None:
    own, other = byte_level(), byte_level()
    assert relate(own, other).same
    other.add_special_tokens(["<|im_start|>"])
    other.add_tokens([AddedToken("<tool>")])
    found = relate(own, other)
    assert found.same
    assert found.differ == ("<tool>", "<|im_start|>")
    assert not relate(own, permute(own, 3)).same
    assert not relate(own, byte_level(300)).same
