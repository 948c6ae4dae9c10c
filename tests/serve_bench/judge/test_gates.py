"""Gates: each is judged by the right thing, and the verdict follows from all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from limbeck.contract.recipe import Gates
from limbeck.contract.results.bench import EXIT_CODES, Evaluations, Gate, Interval, Verdict
from serve_bench.judge.gates import (
    Evidence,
    best_teacher,
    conclude,
    fastest_teacher,
    language_gates,
    show,
)


def judge(gates: Gates, found: Evidence) -> Verdict:
    judged = language_gates(gates, found)
    return conclude(judged, name=found.name, shipped=found.shipped)


def evidence(**over: Any) -> Evidence:
    values: dict[str, Any] = {
        "name": "demo",
        "shipped": "int8-weight",
        "speedup": {"slow": Interval(6.0, 5.5, 6.5, 6), "fast": Interval(4.0, 3.5, 4.5, 6)},
        "tpot_ms": Interval(9.0, 8.0, 10.0, 6),
        "ttft_ms": Interval(100.0, 90.0, 110.0, 6),
        "size": 143_000_000,
        "fp32_size": 540_000_000,
        "rise_over_fp32": Interval(0.002, -0.001, 0.02, 24),
        "rise_over_teachers": {
            "left": (2.9, Interval(-0.03, -0.05, 0.01, 24)),
            "right": (2.8, Interval(0.004, -0.02, 0.03, 24)),
        },
    }
    return Evidence(**values | over)


def answered(facts: float, words: float, *, forgetting: float | None = None) -> Evaluations:
    shares = {
        name: Interval(value, value - 0.1, value + 0.1, 40)
        for name, value in (("facts", facts), ("last_word", words))
    }
    rise = None if forgetting is None else Interval(forgetting, 0.0, 0.2, 16)
    return Evaluations(shares, {"prose": 3.0, "python": 2.0}, rise)


ANSWERED = {
    "evaluations": answered(0.5, 0.4, forgetting=0.04),
    # The best teacher of facts is 0.1 ahead, that of words 0.15.
    "teachers": {"left": answered(0.6, 0.3), "right": answered(0.2, 0.55)},
}
UNKNOWN = Interval(4.0, 0.0, math.inf, 4)


@pytest.mark.parametrize(
    ("gate", "over", "status"),
    [
        # Timing: the whole interval [3.5, 4.5] over the fastest teacher.
        ({"min_decode_speedup": 3.5}, {}, "pass"),
        ({"min_decode_speedup": 3.6}, {}, "undecided"),
        ({"min_decode_speedup": 4.5}, {}, "undecided"),
        ({"min_decode_speedup": 4.6}, {}, "fail"),
        ({"min_decode_speedup": 3.0}, {"speedup": {"fast": UNKNOWN}}, "undecided"),
        ({"max_tpot_ms": 10}, {}, "pass"),
        ({"max_tpot_ms": 9.5}, {}, "undecided"),
        ({"max_tpot_ms": 7.9}, {}, "fail"),
        ({"max_ttft_ms": 110}, {}, "pass"),
        ({"max_ttft_ms": 100}, {}, "undecided"),
        ({"max_ttft_ms": 89}, {}, "fail"),
        # Quality and size: the number itself, whatever its interval.
        ({"max_quantization_loss": 0.01}, {}, "pass"),
        ({"max_quantization_loss": 0.002}, {}, "pass"),
        ({"max_quantization_loss": 0.001}, {}, "fail"),
        ({"max_loss_vs_best_teacher": 0.01}, {}, "pass"),
        ({"max_loss_vs_best_teacher": 0}, {}, "fail"),  # against right, the best one
        ({"max_size_ratio": 0.5}, {}, "pass"),
        ({"max_size_ratio": 0.2}, {}, "fail"),
        ({"max_size_mb": 143}, {}, "pass"),
        ({"max_size_mb": 142}, {}, "fail"),
        ({"max_forgetting": 0.04}, ANSWERED, "pass"),
        ({"max_forgetting": 0.039}, ANSWERED, "fail"),
        ({"min_task": {"facts": 0.5}}, ANSWERED, "pass"),
        ({"min_task": {"last_word": 0.41}}, ANSWERED, "fail"),
        ({"max_task_loss": 0.16}, ANSWERED, "pass"),
        ({"max_task_loss": 0.14}, ANSWERED, "fail"),
    ],
)
def test_one_gate(gate: dict[str, Any], over: dict[str, Any], status: str) -> None:
    verdict = judge(Gates(**gate), evidence(**over))
    assert [g.status for g in verdict.gates] == [status]
    assert verdict.status == status
    assert [g.name for g in verdict.gates] == list(gate)
    assert (
        verdict.exit_code
        == {"pass": 0, "fail": 1, "undecided": 3}[status]
        == EXIT_CODES[verdict.status]
    )


def test_ggufs_beside_the_shipped_form_are_held_to_its_bound() -> None:
    found = evidence(rise_of_ggufs={"gguf-q8_0": 0.01, "gguf-q4_0": 1.19})
    verdict = judge(Gates(max_quantization_loss=0.01), found)
    assert [gate.status for gate in verdict.gates] == ["pass", "pass", "fail"]
    assert "loss from quantising in gguf-q4_0 misses its bound" in verdict.sentence
    assert verdict.gates[-1].sentence == (
        "Held-out loss of gguf-q4_0 119.00 % above that of the student in torch; "
        "a rise of at most 1 % was asked."
    )
    assert len(judge(Gates(max_size_mb=143), found).gates) == 1


def test_a_failure_outweighs_what_is_undecided() -> None:
    verdict = judge(Gates(min_decode_speedup=4.0, max_size_mb=1), evidence())
    assert (verdict.status, verdict.exit_code) == ("fail", 1)
    assert "size on disk misses its bound" in verdict.sentence
    undecided = judge(Gates(min_decode_speedup=4.0, max_size_mb=200), evidence())
    assert (undecided.status, undecided.exit_code) == ("undecided", 3)
    assert "bench.minutes" in undecided.sentence


def test_timing_gates_are_judged_before_quality_is_known() -> None:
    gates = Gates(min_decode_speedup=3, max_tpot_ms=20, max_size_mb=1, max_quantization_loss=0)
    found = evidence(rise_over_fp32=None, rise_over_teachers={})
    judged = language_gates(gates, found, timing_only=True)
    assert [(g.name, g.status) for g in judged] == [
        ("min_decode_speedup", "pass"),
        ("max_tpot_ms", "pass"),
    ]


def test_no_gates_ask_nothing() -> None:
    verdict = judge(Gates(), evidence())
    assert (verdict.status, verdict.gates) == ("pass", ())
    assert "nothing was asked" in verdict.sentence


def test_sentences_of_evaluations() -> None:
    gates = Gates(max_forgetting=0.05, min_task={"facts": 0.7}, max_task_loss=0.1)
    assert [gate.sentence for gate in judge(gates, evidence(**ANSWERED)).gates] == [
        "Loss on other text 4.00 % above that of the base (interval for such text +0.00 to +20.00 "
        "%); a rise of at most 5 % was asked.",
        "Facts: 50.0 of 100 right (interval for such text 40.0 to 60.0 of 100); at least 70.0 of "
        "100 was asked.",
        "Last words: 15.0 of 100 fewer right answers than right; at most 10.0 of 100 was asked.",
    ]


def test_which_teacher() -> None:
    assert (fastest_teacher(evidence()), best_teacher(evidence())) == ("fast", "right")
    alone = evidence(speedup={}, rise_over_teachers={})
    assert (fastest_teacher(alone), best_teacher(alone)) == (None, None)


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_a_teacher_whose_figure_is_no_number_fails_the_gate_wherever_it_stands(
    order: tuple[str, str],
) -> None:
    rises = {"left": (2.9, Interval(-0.03, -0.05, 0.01, 24))}
    rises["right"] = (math.nan, Interval(math.nan, math.nan, math.nan, 24))
    speeds = {"left": Interval(4.0, 3.5, 4.5, 6), "right": Interval(*[math.nan] * 3, 6)}
    found = evidence(
        rise_over_teachers={name: rises[name] for name in order},
        speedup={name: speeds[name] for name in order},
    )
    verdict = judge(Gates(max_loss_vs_best_teacher=0.01, min_decode_speedup=3), found)
    assert [gate.status for gate in verdict.gates] == ["fail", "fail"]
    assert all("nan, not a number" in gate.sentence for gate in verdict.gates)


@pytest.mark.parametrize(
    ("value", "bound", "said"),
    [
        (3.004, 3, "3.004 MB on disk; at most 3 MB was asked."),
        (150.4, 150, "150.4 MB on disk; at most 150 MB was asked."),
        (149.6, 149.5, "150 MB on disk; at most 149.5 MB was asked."),
        (150, 149.5, "150 MB on disk; at most 149.5 MB was asked."),
        (12.04, 12, "12.04 MB on disk; at most 12 MB was asked."),
        (0.9996, 1, "0.9996 MB on disk; at most 1 MB was asked."),
        (0.004, 0.003, "0.004 MB on disk; at most 0.003 MB was asked."),
    ],
)
def test_no_rounding_puts_a_figure_on_its_bound(value: float, bound: float, said: str) -> None:
    gate = judge(Gates(max_size_mb=bound), evidence(size=round(1e6 * value))).gates[0]
    assert gate.sentence == said
    assert gate.status == ("pass" if value <= bound else "fail")


def test_no_rounding_puts_a_share_or_an_interval_on_its_bound() -> None:
    rise = Interval(0.020004, 0.01, 0.03, 24)
    found = evidence(
        rise_over_fp32=rise, tpot_ms=Interval(9, 8.5, 10.001, 6), evaluations=answered(0.4996, 0.4)
    )
    asked = Gates(max_quantization_loss=0.02, max_tpot_ms=10, min_task={"facts": 0.5})
    tpot, loss, task = judge(asked, found).gates
    assert tpot.sentence.startswith("TPOT 9 ms (95 % interval 8.50 to 10.001 ms); at most 10 ms")
    assert loss.sentence.startswith("Held-out loss 2.0004 % above that of the fp32 graph (")
    assert task.sentence.startswith("Facts: 49.96 of 100 right (")
    assert [tpot.status, loss.status, task.status] == ["undecided", "fail", "fail"]


def test_one_block_gives_no_interval() -> None:
    found = evidence(rise_over_fp32=Interval(0.002, -math.inf, math.inf, 1))
    gate = judge(Gates(max_quantization_loss=0.01), found).gates[0]
    assert (gate.status, gate.low, gate.high) == ("pass", None, None)
    assert "(1 of such text are too few for an interval)" in gate.sentence


def test_sentences_say_value_interval_and_bound() -> None:
    gates = Gates(
        min_decode_speedup=3,
        max_quantization_loss=0.01,
        max_loss_vs_best_teacher=0,
        max_size_ratio=0.5,
    )
    sentences = [gate.sentence for gate in judge(gates, evidence()).gates]
    assert sentences == [
        "4× the decode speed of fast, the fastest teacher, in torch (95 % interval 3.50 to 4.50×); "
        "at least 3× was asked.",
        "Held-out loss 0.40 % above that of right, the best single teacher (interval for such text "
        "−2.00 to +3.00 %); "
        "no rise was asked.",
        "Held-out loss 0.20 % above that of the fp32 graph (interval for such text −0.10 to +2.00 "
        "%); "
        "a rise of at most 1 % was asked.",
        "0.26× the size of the fp32 graph; at most 0.50× was asked.",
    ]
    recovered = judge(Gates(max_quantization_loss=0.01), evidence(recovered=True)).gates[0].sentence
    assert recovered.startswith(
        "Held-out loss 0.20 % above that of the fp32 graph of the student before recovery ("
    )
    unknown = judge(Gates(min_decode_speedup=3), evidence(speedup={"fast": UNKNOWN}))
    assert "4 blocks are too few for an interval" in unknown.gates[0].sentence
    assert unknown.gates[0].low is None


def test_a_gate_has_everything_that_a_report_shows() -> None:
    gates = Gates(max_tpot_ms=9.5, max_ttft_ms=80, max_loss_vs_best_teacher=-0.02, max_size_mb=200)
    found = evidence(by_byte=frozenset({"right"}))
    assert judge(gates, found).gates == (
        Gate(
            "max_tpot_ms", "TPOT", "undecided", 9.0, 8.0, 10.0, 9.5, "ms", False,
            "TPOT 9 ms (95 % interval 8 to 10 ms); at most 9.50 ms was asked.",
        ),
        Gate(
            "max_ttft_ms", "TTFT", "fail", 100.0, 90.0, 110.0, 80.0, "ms", False,
            "TTFT 100 ms (95 % interval 90 to 110 ms); at most 80 ms was asked.",
        ),
        Gate(
            "max_loss_vs_best_teacher", "Loss against the best single teacher", "fail",
            0.004, -0.02, 0.03, -0.02, "%", False,
            "Held-out loss 0.40 % above that of right, the best single teacher, in bits a byte "
            "(interval for such text −2.00 to +3.00 %); a fall of at least 2 % was asked.",
        ),
        Gate(
            "max_size_mb", "Size on disk", "pass", 143.0, None, None, 200.0, "MB", False,
            "143 MB on disk; at most 200 MB was asked.",
        ),
    )  # fmt: skip
    titles = {
        "min_decode_speedup": "Decode speed over the fastest teacher",
        "max_quantization_loss": "Loss from quantising",
        "max_size_ratio": "Size over the fp32 graph",
        "max_forgetting": "Loss on other text against the base",
        "min_task": "Right answers, facts",
        "max_task_loss": "Right answers against the best teacher",
    }
    every = dict.fromkeys(titles, 0.5) | {"min_task": {"facts": 0.5}}
    shown = judge(Gates(**every), evidence(**ANSWERED)).gates
    assert {gate.name: gate.title for gate in shown} == titles
    assert [gate.name for gate in shown if gate.least] == ["min_decode_speedup", "min_task"]
    assert {gate.unit for gate in shown} == {"×", "%", "of 100"}


@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        ({"max_size_mb": 143}, "is fit to ship: it meets its only gate on this machine."),
        (
            {"max_size_mb": 143, "max_size_ratio": 1},
            "is fit to ship: it meets all 2 gates on this machine.",
        ),
        (
            {"max_size_mb": 1, "max_size_ratio": 0.1, "max_tpot_ms": 1},
            "is not fit to ship: tpot, size over the fp32 graph and size on disk miss their "
            "bounds.",
        ),
        (
            {"max_tpot_ms": 9, "max_ttft_ms": 100, "max_size_mb": 143},
            "is undecided: the measured interval of tpot and ttft still contains the bound, and "
            "the time for measuring is spent. Give bench.minutes more, or measure on a quieter "
            "machine.",
        ),
        ({}, "was measured; the recipe sets no gates, so nothing was asked of it."),
    ],
)
def test_the_verdict_is_one_sentence(gates: dict[str, Any], sentence: str) -> None:
    assert judge(Gates(**gates), evidence()).sentence == f"demo, as int8-weight, {sentence}"


def test_random_stand_ins_are_never_fit_to_ship() -> None:
    judged = language_gates(Gates(max_size_mb=143, max_tpot_ms=9, max_ttft_ms=1), evidence())
    verdict = conclude(judged, name="demo", shipped="fp32", stand_in=True)
    says = "demo, as fp32, has random stand-ins for models: it runs here; this says nothing of "
    assert verdict.sentence == f"{says}quality. Not met or undecided: tpot and ttft."
    assert (verdict.status, verdict.gates) == ("fail", tuple(judged))
    alone = conclude(judged[2:], name="demo", shipped="fp32", stand_in=True)
    assert (alone.status, alone.sentence) == ("pass", f"{says}quality.")


def test_equal_losses_and_falls_have_words_of_their_own() -> None:
    for rise, words in ((0.0, "equal to that"), (-0.031, "3.10 % below that")):
        found = evidence(rise_over_fp32=Interval(rise, rise, rise, 24))
        gate = judge(Gates(max_quantization_loss=0.0), found).gates[0]
        assert gate.sentence.startswith(f"Held-out loss {words} of the fp32 graph (")
        assert gate.status == "pass"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.147, "×", "5.15×"),
        (12.34, "ms", "12.3 ms"),
        (143.4, "MB", "143 MB"),
        (100.4, "MB", "100 MB"),
        (99.94, "MB", "99.9 MB"),
        (10.04, "MB", "10.0 MB"),
        (9.994, "MB", "9.99 MB"),
        (1.0, "MB", "1 MB"),
        (0.054, "of 100", "5.4 of 100"),
        (-0.054, "of 100", "−5.4 of 100"),
        (-0.0637, "%", "−6.37 %"),
        (3, "×", "3×"),
    ],
)
def test_values_with_units(value: float, unit: str, text: str) -> None:
    assert show(value, unit) == text
