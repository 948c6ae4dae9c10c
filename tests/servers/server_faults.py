"""Wrong answers of a server, each with the error that must name it."""

from __future__ import annotations

import json
from typing import Any

from limbeck.contract.errors import EnvironmentalError, LimbeckError, ModelError


def wrong(change: Any) -> Any:
    """A fault of every answer but the probe's: ``change`` gets the entries of the prompt."""

    def fault(number: int, right: dict[str, Any]) -> tuple[int, Any] | None:
        if number:
            choice = right["choices"][0]
            choice["prompt_logprobs"] = change(choice["prompt_logprobs"])
        return 200, right

    return fault


def with_value(value: Any) -> Any:
    def change(entries: list[Any]) -> list[Any]:
        next(iter(entries[3].values()))["logprob"] = value
        return entries

    return wrong(change)


def without_one(entries: list[Any]) -> list[Any]:
    """A likely token is left out, and where the text's own is no likely one, nothing shows it."""
    for entry in entries[1:]:
        if len(entry) > 12:
            del entry[next(token for token, one in entry.items() if one["rank"] == 3)]
    return entries


def with_other_numbers(entries: list[Any]) -> list[Any]:
    """Scores that are no log-probabilities, though each could be one."""
    return [
        e and {t: one | {"logprob": one["logprob"] - 20} for t, one in e.items()} for e in entries
    ]


def with_id(token: str) -> Any:
    def change(entries: list[Any]) -> list[Any]:
        entries[3][token] = {"logprob": -0.01, "rank": 1}
        return entries

    return wrong(change)


def with_text(text: Any) -> Any:
    """The probe's answer too: it alone reads texts."""

    def fault(number: int, right: dict[str, Any]) -> tuple[int, Any] | None:
        for entry in right["choices"][0]["prompt_logprobs"][1:]:
            for one in entry.values():
                one["decoded_token"] = text
        return 200, right

    return fault


FAULTS: dict[str, tuple[Any, type[LimbeckError], str]] = {
    "cut": (wrong(lambda found: found[:-2]), ModelError, "it cuts the prompt, adds a token"),
    "more": (wrong(lambda found: [None, *found]), ModelError, r"adds a token"),
    "shifted": (
        wrong(lambda found: [None, *reversed(found[1:])]),
        ModelError,
        r"position \d+: has no log-probability of the text's own token \d+",
    ),
    "nan": (with_value(float("nan")), ModelError, "what is no log-probability"),
    "positive": (with_value(2.5), ModelError, "what is no log-probability"),
    "text": (with_value("low"), ModelError, "what is no log-probability"),
    "by text": (
        wrong(lambda found: [None, *({"the": {"logprob": -1.0}} for _ in found[1:])]),
        ModelError,
        r"what is no log-probability by token id: {'the': {'logprob': -1.0}} …",
    ),
    "first": (
        wrong(lambda found: [{"5": {"logprob": -1.0}}, *found[1:]]),
        ModelError,
        "it puts a token in front of the prompt",
    ),
    "no null": (wrong(lambda found: found[1:]), ModelError, "leaves out the first one, which is"),
    "one less": (wrong(without_one), ModelError, "leaves out one of the 12 likeliest tokens"),
    "endless": (with_value(-int("9" * 400)), ModelError, "what is no log-probability"),
    "too much": (
        wrong(lambda found: [None, *({t: {"logprob": -0.1} for t in e} for e in found[1:])]),
        ModelError,
        r"its probabilities sum to \d",
    ),
    "other numbers": (wrong(with_other_numbers), ModelError, r"sum to 0\.000 at most, whatever"),
    "minus id": (with_id("-1"), ModelError, "position 2: answers the token id -1"),
    "id beyond": (with_id("300"), ModelError, r"position 2: its probabilities sum to 1\.\d"),
    "text 5": (with_text(5), ModelError, "answers the decoded_token 5"),
    "text list": (with_text(["a"]), ModelError, r"answers the decoded_token \['a'\]"),
    "text long": (with_text("x" * 400), ModelError, r"another text \(0 is .{290,300}\); name"),
    "other k": (
        wrong(lambda found: [None, *(dict(list(e.items())[-4:]) for e in found[1:])]),
        ModelError,
        r"answers 4 tokens, and 12 were asked for; set `top` to 4.*--max-logprobs",
    ),
    "empty": (wrong(lambda found: [None, *(None for _ in found[1:])]), ModelError, "without token"),
    "none": (wrong(lambda found: None), ModelError, "answers without prompt_logprobs"),
    "other model": (
        lambda number, right: (200, right | ({"model": "small"} if number else {})),
        ModelError,
        "answers as model 'small', not 'big'",
    ),
    "refuses": (
        lambda number, right: (400, {"error": {"message": "greater than max allowed: 5"}}),
        EnvironmentalError,
        "status 400: greater than max allowed: 5",
    ),
    "refuses with 200": (
        lambda number, right: (200, {"error": {"message": "no such option"}}),
        EnvironmentalError,
        "status 200: no such option; gave up after 3 tries",
    ),
    "busy": (
        lambda number, right: (429, {"error": {"message": "slow down"}}),
        EnvironmentalError,
        r"status 429: slow down; gave up after 3 tries",
    ),
    "not json": (
        lambda number, right: (200, json.dumps(right).encode()[:-40]),
        EnvironmentalError,
        "its answer is not JSON; gave up after 3 tries",
    ),
    "list": (
        lambda number, right: (200, [right]),
        EnvironmentalError,
        "its answer is no JSON object",
    ),
    "redirect": (
        lambda number, right: (307, {"detail": "elsewhere"}),
        EnvironmentalError,
        "status 307",
    ),
}
