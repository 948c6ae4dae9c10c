"""Answers held to a grammar: tokens are those of transformers' own constrained search, and what
ends is valid by the reference implementation of JSON Schema.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import EnvironmentalError
from limbeck.runtime import grammar
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.grammar import GrammarError, Grammars, json_rule
from limbeck.runtime.sampling import Sampling
from limbeck.runtime.text import load_text

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["red", "green", "Grün", 12, 1234, None, False, True]


@pytest.fixture(scope="module")
def grammars(served: Artifact) -> Grammars:
    text = load_text(served.path)
    return Grammars(text.tokenizer, vocabulary=258, stop_ids=text.stop_ids)


@pytest.fixture(scope="module")
def decoder(served: Artifact) -> Decoder:
    return Decoder(served.path, form="fp32", threads=1)


def held(grammars: Grammars, schema: dict[str, Any]) -> Any:
    return grammars.compile(f"start: {json_rule(schema)}").begin()


def test_a_grammar_that_takes_too_much_is_refused(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unbounded, this one took 14 GB and did not end."""
    held(grammars, PERSON)
    monkeypatch.setattr(grammar, "LONGEST", 0.5)
    patterns = [f"(a|b)*a(a|b){{{count}}}" for count in range(60)]
    with pytest.raises(GrammarError, match="it is too complex"):
        held(grammars, {"allOf": [{"type": "string", "pattern": one} for one in patterns]})
    assert held(grammars, {"const": "a"}).allowed().any()


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_transformers(
    served: Artifact, decoder: Decoder, grammars: Grammars, seed: int
) -> None:
    """The texts of the schema are listed here, and transformers may go on to these only."""
    texts = [list(json.dumps(one, ensure_ascii=False).encode()) for one in CHOICES]
    tokenizer = load_text(served.path).tokenizer
    encoded = [tokenizer.encode(bytes(text).decode()).ids for text in texts]
    prompt = np.random.default_rng(seed).integers(0, 256, 12).tolist()

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        made = ids[len(prompt) :].tolist()
        open_texts = [text for text in encoded if text[: len(made)] == made]
        following = {text[len(made)] for text in open_texts if len(text) > len(made)}
        return sorted(following | ({256} if made in encoded else set()))

    model = AutoModelForCausalLM.from_pretrained(served.path.parent / "student/model")
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=256,
        pad_token_id=257,
        prefix_allowed_tokens_fn=allowed,
    )[0, len(prompt) :].tolist()
    found = list(decoder.generate(prompt, 30, constraint=held(grammars, {"enum": CHOICES})))
    assert [*found, 256] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_what_ends_is_valid(
    served: Artifact, decoder: Decoder, grammars: Grammars, temperature: float
) -> None:
    tokenizer, draw, ended = load_text(served.path).tokenizer, np.random.default_rng(1), 0
    for seed in range(12):
        prompt = draw.integers(0, 256, 9).tolist()
        constraint = held(grammars, PERSON)
        tokens = list(
            decoder.generate(
                prompt,
                300,
                sampling=Sampling(temperature=temperature, repetition_penalty=1.2, min_tokens=150),
                seed=seed,
                constraint=constraint,
            )
        )
        if constraint.ended:  # although `min_tokens` asks for more
            ended += 1
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)
        else:
            assert len(tokens) == 300
    assert ended >= 8


def test_stop_tokens_come_only_after_a_complete_text(grammars: Grammars) -> None:
    constraint = held(grammars, {"type": "integer", "minimum": 10, "maximum": 199})
    digit = {str(n): grammars._tokenizer.encode(str(n)).ids[0] for n in range(10)}
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted(digit[c] for c in "123456789")
    constraint.accept(digit["1"])
    assert not constraint.allowed()[256]
    constraint.accept(digit["5"])
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted([*digit.values(), 256])
    constraint.accept(256)
    assert constraint.ended


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "person"}, "Invalid type: person"),
        ({"properties": 3}, "properties must be an object"),
        ({"$ref": "http://example.com/schema"}, "does not fetch"),
        ({"enum": [str(n) * 9 for n in range(100_000)]}, "too big"),
        ({"type": "string", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    grammars: Grammars, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        held(grammars, schema)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_deep_schemas_are_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError, match="recursion limit"):
        held(grammars, schema)


def test_a_tokenizer_without_end_and_a_missing_package(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_text(served.path).tokenizer
    endless = Grammars(tokenizer, vocabulary=258, stop_ids=())
    with pytest.raises(GrammarError, match="no stop token"):
        held(endless, {})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EnvironmentalError, match=r"pip install 'limbeck\[serve\]'"):
        held(Grammars(tokenizer, vocabulary=258, stop_ids={256}), {})


def test_compiled_grammars_are_kept_and_answers_are_apart(grammars: Grammars) -> None:
    one = grammars.compile('start: "ab" | "ac"')
    assert grammars.compile('start: "ab" | "ac"') is one
    first, second = one.begin(), one.begin()
    a = grammars._tokenizer.encode("a").ids[0]
    first.accept(a)
    assert np.flatnonzero(second.allowed()).tolist() == [a]
    for at in range(70):
        grammars.compile(f'start: "{at}"')
    assert grammars.compile('start: "ab" | "ac"') is not one
