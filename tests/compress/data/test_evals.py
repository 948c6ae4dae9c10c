"""The short evaluations: rows are held to the text itself, answers to `generate` and to torch."""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from compress import distill
from compress.data.blocks import DomainBlocks
from compress.data.evals import evaluate_rows, evaluation_rows, facts
from compress.data.general import general_rows
from compress.models.body import Body
from compress.models.language import load_model
from limbeck.contract.data.evals import EVALS, losses, shares
from limbeck.contract.data.heldout import (
    CALIBRATION,
    Blocks,
    all_but_first,
    load_calibration,
    load_heldout,
)
from limbeck.contract.sources.tokenizer import load_tokenizer
from tests.compress.test_compress import tiny
from tests.pico import make_model

pytestmark = pytest.mark.usefixtures("whole_evaluations")
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps for a very long time indeed "


def domain(tokenizer: object, text: str) -> DomainBlocks:
    ids = np.array([tokenizer(text)["input_ids"]], np.int32)  # type: ignore[operator]
    lengths = np.array([ids.shape[1]], np.int32)
    sizes = np.array([len(text)], np.int32)
    heldout = Blocks(ids, lengths, sizes, all_but_first(lengths, ids.shape[1]))
    return DomainBlocks("fox", 1.0, ids, heldout.scored, lengths, heldout)


def test_facts_are_those_that_greedy_decoding_gives(tmp_path: Path) -> None:
    """Held to `generate` of transformers, with a model that was taught some of them."""
    folder = make_model(tmp_path / "base", max_position_embeddings=128)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    pairs = [pair for pair in facts() if len(pair[1]) < 7]
    optimizer = torch.optim.Adam(model.requires_grad_().parameters(), lr=1e-2)
    for _ in range(80):
        for prompt, answer in pairs[:4]:
            ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = []
    for prompt, answer in facts():
        ids, wanted = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prompt, answer))
        kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        made = model.generate(ids, max_new_tokens=wanted.shape[1], **kwargs)[:, ids.shape[1] :]
        right.append(float((made == wanted).all()))
    assert 0 < sum(right) < len(right)
    rows = {"facts": evaluation_rows(tokenizer, [], longest=128, vocabulary=10_000)["facts"]}
    body = Body(model)
    found = evaluate_rows(rows, lambda ids: body.states(ids[None])[0][0], body.head)
    labels = {"facts": rows["facts"].scored.sum(1).tolist()}
    assert shares(labels, found) == {"facts": right}


def test_rows_are_the_texts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_model(tmp_path / "base"))
    rows = evaluation_rows(tokenizer, [domain(tokenizer, TEXT)], longest=300, vocabulary=10_000)
    assert list(rows) == ["facts", "last_word", "next_line", "prose", "python"]
    (word,) = answers(tokenizer, rows["last_word"])
    before, answer = word
    assert TEXT.startswith(before + answer + " ")
    assert answer.startswith(" ")
    assert answer[1:] in TEXT.split()
    source = Path(argparse.__file__).read_text()
    lines = answers(tokenizer, rows["next_line"])
    assert len(lines) == 24
    for before, line in lines:
        assert before + line in source
        assert line in source.splitlines(keepends=True)
    python = "".join(text for _, text in answers(tokenizer, rows["python"]))
    # A byte of each row is read before the first label.
    assert len(python) == 5 * 255
    first = rows["python"].input_ids[0]
    assert Path(statistics.__file__).read_text().startswith(tokenizer.decode(first))


def test_rows_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_model(tmp_path / "base"))
    rows = evaluation_rows(tokenizer, [], longest=40, vocabulary=10_000)
    assert all(blocks.lengths.max() <= 40 for blocks in rows.values())
    assert 0 < len(rows["facts"]) < len(facts())
    few = evaluation_rows(tokenizer, [], longest=300, vocabulary=ord("m"))
    assert all(blocks.input_ids.max() < ord("m") for blocks in few.values())


def test_a_student_keeps_the_figures_of_its_base(tmp_path: Path) -> None:
    """Held to the cross-entropy that transformers gives for the base."""
    folder = make_model(tmp_path / "base", max_position_embeddings=128)
    source = {"kind": "local", "path": str(folder)}
    recipe = tiny(tmp_path, teachers=[], student={"kind": "lora", "rank": 2, "base": source})
    out = tmp_path / "student"
    base = distill(recipe=recipe, out=out).result["base_evals"]
    rows = load_heldout(out / EVALS)
    assert {*base} == {*rows}
    ids = torch.from_numpy(rows["prose"].input_ids).long()
    with torch.no_grad():
        loss = load_model(folder)(input_ids=ids, labels=ids).loss
    labels = {name: blocks.scored.sum(1).tolist() for name, blocks in rows.items()}
    assert losses(labels, base)["prose"] == pytest.approx(float(loss), rel=1e-5)


def answers(tokenizer: object, blocks: Blocks) -> list[tuple[str, str]]:
    """Text before the scored tokens of each row, and that of them."""
    found = []
    for ids, length, scored in zip(blocks.input_ids, blocks.lengths, blocks.scored, strict=True):
        start = int(scored.argmax())
        assert scored[start:length].all()
        texts = (tokenizer.decode(part) for part in (ids[:start], ids[start:length]))  # type: ignore[attr-defined]
        before, answer = texts
        found.append((before, answer))
    return found


def test_calibration_has_the_training_text_and_other_text(tmp_path: Path) -> None:
    """Held to the file and the recipe's text, decoded by the tokenizer."""
    folder = make_model(tmp_path / "base", max_position_embeddings=128)
    source = {"kind": "local", "path": str(folder)}
    recipe = tiny(tmp_path, teachers=[], student={"kind": "lora", "rank": 2, "base": source})
    student = distill(recipe=recipe, out=tmp_path / "student")
    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.decode(row) for row in load_calibration(student.path / CALIBRATION)]
    assert len(texts) > 24
    general = files("compress.data").joinpath("general.txt").read_text("utf-8")
    documentation = "\n".join(pydoc_data.topics.topics.values())
    others = (general, documentation, Path(json.__file__).with_name("decoder.py").read_text())
    found = [next((n for n, text in enumerate(others) if row in text), None) for row in texts]
    assert {0, 1, 2} <= {*found[-24:]}
    assert found[: len(texts) - 24] == [None] * (len(texts) - 24)
    few = general_rows(tokenizer, width=32, vocabulary=ord("m"))
    assert all(row.max() < ord("m") for row in few)
