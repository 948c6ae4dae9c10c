"""Two runs beside each other: what counts as worse, and what may not be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.contract.artifact import open_artifact, write_artifact
from limbeck.contract.errors import UserError
from limbeck.contract.results.bench import Interval
from serve_bench import compare_runs
from serve_bench.judge import figures
from serve_bench.judge.changes import Row, judge_change
from serve_bench.tell.comparison import as_json, headline, markdown
from tests.serve_bench.tell.runs import make_run, recipe


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (0.06, 0.09, "worse"),
        (0.04, 0.06, "undecided"),
        (-0.01, 0.06, "undecided"),
        (0.01, 0.04, "within tolerance"),
        (-0.02, 0.03, "no difference shown"),
        (-0.09, -0.01, "better"),
        (-1.0, float("inf"), "undecided"),
    ],
)
def test_an_estimate_is_judged_by_its_whole_interval(low: float, high: float, status: str) -> None:
    assert judge_change(Interval(0.0, low, high, 6), 0.05) == status


def test_an_exact_number_is_judged_by_itself() -> None:
    assert judge_change(Interval(0.011, -0.5, 0.5, 24), 0.01, exact=True) == "worse"
    assert judge_change(Interval(0.009, -0.5, 0.5, 24), 0.01, exact=True) == "no difference shown"
    assert judge_change(Interval(-0.02, -0.03, -0.01, 24), 0.01, exact=True) == "better"
    assert judge_change(Interval(0.0, 0.0, 0.0, 1), 0.0, exact=True) == "no difference shown"
    nan = float("nan")  # a rounded graph may answer so; it was called "within tolerance"
    assert judge_change(Interval(nan, nan, nan, 24), 0.01, exact=True) == "undecided"


def rewrite(
    run: Path,
    *,
    slower: float = 1.0,
    machine_slower: float = 1.0,
    larger: float = 1.0,
    loss: float = 1.0,
    environment: Any = None,
    text: str = "",
) -> None:
    """Write the bench of ``run`` again with another shipped form."""
    bench = open_artifact(run / "bench")
    rows = [json.loads(line) for line in (bench.path / figures.SAMPLES).read_text().splitlines()]
    quality = json.loads((bench.path / figures.QUALITY).read_text())
    machine = json.loads((bench.path / figures.ENVIRONMENT).read_text()) | (environment or {})
    shipped, result = "onnx:int8-weight", bench.result
    files = {name: (bench.path / name).read_bytes() for name in bench.manifest["files"]}
    for row in rows:
        if row["arm"].startswith(shipped):
            row["at"] = [slower * t for t in row["at"]]
        row["at"] = [machine_slower * t for t in row["at"]]
    for sums in quality["arms"][shipped].values():
        sums["nll"] = [loss * value for value in sums["nll"]]
    result["arms"][shipped]["bytes"] = int(larger * result["arms"][shipped]["bytes"])
    files[figures.SAMPLES] = "\n".join(json.dumps(row) for row in rows).encode()
    files[figures.QUALITY], files[figures.ENVIRONMENT] = (
        json.dumps(quality).encode(),
        json.dumps(machine).encode(),
    )
    if text:
        files["heldout.safetensors"] = text.encode()
    with write_artifact(
        run / "bench", kind="bench", key="again", parents=bench.manifest["parents"], recipe=recipe()
    ) as draft:
        for name, content in files.items():
            (draft.folder / name).write_bytes(content)
        draft.result = result


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "a", recipe()), make_run(tmp_path / "b", recipe())


def statuses(before: Path, after: Path, **options: Any) -> dict[str, str]:
    return {row.metric: row.status for row in compare_runs(before, after, **options).rows}


def test_a_run_beside_itself_shows_no_difference(runs: tuple[Path, Path]) -> None:
    found = compare_runs(*runs)
    assert {row.status for row in found.rows} == {"no difference shown"}
    assert [row.metric for row in found.rows] == [
        "TPOT ms",
        "TTFT ms",
        "ms in all",
        "MB on disk",
        "MB of memory at most",
        "mean loss, nats a token",
        "loss on speeches, nats a token",
        "loss on scripture, nats a token",
    ]
    assert (found.exit_code, headline(found)) == (0, "No regression.")
    assert found.notes == (
        (
            "Changes of time are relative to speeches, scripture, timed in both runs: a slower "
            "machine is not a slower model."
        ),
    )


def test_each_metric_is_found_worse(runs: tuple[Path, Path]) -> None:
    rewrite(runs[1], slower=1.2, larger=1.02, loss=1.02)
    found = compare_runs(*runs)
    assert {row.status for row in found.rows if row.metric != "MB of memory at most"} == {"worse"}
    assert found.exit_code == 1
    assert headline(found).startswith("Regression: TPOT ms, TTFT ms")
    loss = next(row for row in found.rows if row.metric == "mean loss, nats a token")
    assert loss.change is not None
    assert loss.change.value == pytest.approx(0.02)
    assert (
        statuses(*runs, tolerances={"speed": 0.5, "size": 0.1, "quality": 0.05})["MB on disk"]
        == "within tolerance"
    )
    assert set(statuses(runs[1], runs[0]).values()) == {"better", "no difference shown"}


def test_a_slower_machine_is_not_a_slower_model(runs: tuple[Path, Path], tmp_path: Path) -> None:
    rewrite(runs[1], machine_slower=1.3)
    assert statuses(*runs)["TPOT ms"] == "no difference shown"
    # The bench alone does not say which teachers those were: the machine counts, and that is said.
    bare = tmp_path / "bare"
    shutil.copytree(runs[1] / "bench", bare)
    found = compare_runs(runs[0], bare)
    assert next(row.status for row in found.rows if row.metric == "TPOT ms") == "worse"
    assert any("No arm is the same in both runs" in note for note in found.notes)


def test_markdown_and_json_say_the_same(runs: tuple[Path, Path]) -> None:
    rewrite(runs[1], larger=1.02)
    found = compare_runs(*runs)
    text, data = markdown(found), as_json(found)
    assert "| MB on disk | 143.4 | 146.3 | +2.00 % | 1 % | **worse** |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert [row["status"] for row in data["rows"]].count("worse") == 1
    assert data["exit_code"] == 1
    json.dumps(data)


def test_a_tolerance_inside_the_interval_is_undecided(runs: tuple[Path, Path]) -> None:
    rewrite(runs[1], slower=1.05)
    change = next(row.change for row in compare_runs(*runs).rows if row.metric == "TTFT ms")
    assert change is not None
    found = compare_runs(*runs, tolerances={"speed": change.value})
    assert next(row.status for row in found.rows if row.metric == "TTFT ms") == "undecided"
    assert found.exit_code == 3
    assert "reaches past the tolerance" in headline(found)


def test_other_machines_are_refused_unless_asked_for(runs: tuple[Path, Path]) -> None:
    host = json.loads((runs[0] / "bench" / figures.ENVIRONMENT).read_text())["host"]
    rewrite(
        runs[1],
        environment={
            "host": host | {"processor": "another", "flags": []},
            "versions": {"torch": "9"},
        },
    )
    with pytest.raises(
        UserError,
        match=r"processor: AMD EPYC 9B14 and another; flags: avx2 avx512_vnni and none"
        r".*--across-machines",
    ):
        compare_runs(*runs)
    text = markdown(compare_runs(*runs, across_machines=True))
    assert "- **Different machines**: processor" in text
    assert "torch 2.13.0 → 9" in text


def test_other_work_is_refused(runs: tuple[Path, Path]) -> None:
    rewrite(runs[1], environment={"threads": 8})
    with pytest.raises(
        UserError, match=r"bench.threads: found 2 in .*a and 8 in .*b.*--set bench.threads=2"
    ):
        compare_runs(*runs)


def test_what_was_timed_without_a_recipe_is_compared_by_its_first_target(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    folders = []
    for run, name in zip(runs, "ab", strict=True):
        bench = open_artifact(run / "bench")
        result = bench.result | {"judged": "onnx:fp32"}
        result["arms"]["onnx:fp32"]["bytes"] = None if name == "a" else 1
        with write_artifact(
            tmp_path / f"bare-{name}", kind="bench", key="bare", parents={}
        ) as draft:
            for file in set(bench.manifest["files"]) - {figures.QUALITY}:
                (draft.folder / file).write_bytes((bench.path / file).read_bytes())
            machine = json.loads((draft.folder / figures.ENVIRONMENT).read_text())
            machine["fairness"] = {"prompt_tokens": 128, "new_tokens": 64}
            (draft.folder / figures.ENVIRONMENT).write_text(json.dumps(machine))
            draft.result = result
        folders.append(tmp_path / f"bare-{name}")
    found = compare_runs(*folders)
    assert [row.metric for row in found.rows] == [
        "TPOT ms",
        "TTFT ms",
        "ms in all",
        "MB of memory at most",
    ]
    assert found.rows[0].before.startswith("28.")


def test_losses_on_other_text_are_not_compared(runs: tuple[Path, Path]) -> None:
    rewrite(runs[1], text="other blocks", loss=2.0)
    found = compare_runs(*runs)
    assert {row.status for row in found.rows if row.kind == "quality"} == {"not compared"}
    assert any("text differs" in note for note in found.notes)
    assert found.exit_code == 0


# Scenarios ----------------------------------------------------------------------------------------

SLO = {"ttft_ms": 500.0, "tpot_ms": 50.0, "share": 0.9}


def add_scenarios(
    run: Path,
    *,
    slower: float = 1.0,
    machine_slower: float = 1.0,
    blocks: int = 6,
    rate: float = 2.0,
    highest: float | None = 4.0,
    failed: int = 0,
    seed: int = 0,
    **server: Any,
) -> None:
    """Give the bench of ``run`` batches, cold starts and a server under load, of which the shipped
    form is ``slower``.
    """
    bench = open_artifact(run / "bench")
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []

    def seconds(value: float, arm: str) -> float:
        ours = slower if arm == "onnx:int8-weight" else 1.0
        return float(value * machine_slower * ours * np.exp(0.01 * draw.standard_normal()))

    for block in range(blocks):
        drift = float(np.exp(0.05 * draw.standard_normal()))  # of the machine, from block to block
        for arm in ("onnx:int8-weight", "teacher:speeches"):
            row = {"arm": arm, "block": block}
            sizes = {"batch": 8, "prompt_tokens": 128, "new_tokens": 33}
            for position in range(2):
                at = np.cumsum(
                    [seconds(0.5 * drift, arm), *[seconds(0.02 * drift, arm)] * 32]
                ).tolist()
                rows.append({"event": "offline", **row, **sizes, "position": position, "at": at})
            spans = ("start_s", "import_s", "load_s", "first_token_s", "second_token_s")
            rows.append(
                {"event": "cold", **row, "position": 0}
                | {span: seconds(0.2 * drift, arm) for span in spans}
            )
    for index in range(48):
        at = [seconds(0.1, "onnx:int8-weight"), *[0.0] * 4]
        at[1:] = (at[0] + np.arange(1, 5) * seconds(0.01, "onnx:int8-weight")).tolist()
        error = "gone" if index < failed else None
        rows.append(
            {
                "event": "request",
                "rate": rate,
                "phase": "double",
                "index": index,
                "scheduled": index / rate,
                "sent": index / rate,
            }
            | {"at": [] if error else at, "prompt_tokens": 128, "output_tokens": 5, "error": error}
        )
    files = {name: (bench.path / name).read_bytes() for name in bench.manifest["files"]}
    files[figures.SAMPLES] += "".join("\n" + json.dumps(row) for row in rows).encode()
    told = {
        "target": {"label": "limbeck serve onnx", "kind": "artifact", "model": "pico"},
        "slo": SLO,
    }
    told |= {
        "highest_rate": {"value": highest, "fails_at": None},
        "rates": [{"rate": rate, "meets": True}],
    }
    with write_artifact(
        run / "bench",
        kind="bench",
        key=f"scenarios {seed}",
        parents=bench.manifest["parents"],
        recipe=recipe(),
    ) as draft:
        for name, content in files.items():
            (draft.folder / name).write_bytes(content)
        draft.result = bench.result | {"server": told | server}


BATCH, COLD = ", batch 8, prompt 128, new 33", "s from a cold start to the first token"
GENERATED, PROMPTS = f"tokens/s generated{BATCH}", f"tokens/s of prompts{BATCH}"
HIGHEST, FAILED = "highest requests/s that keep the SLO", "requests that failed, at 2 requests/s"
TTFT, TPOT = "TTFT ms, at 2 requests/s", "TPOT ms, at 2 requests/s"


def scenario_rows(before: Path, after: Path) -> dict[str, Row]:
    names = {GENERATED, PROMPTS, COLD, HIGHEST, FAILED, TTFT, TPOT}
    return {row.metric: row for row in compare_runs(before, after).rows if row.metric in names}


def test_scenarios_of_equal_runs_show_no_difference(runs: tuple[Path, Path]) -> None:
    for seed, run in enumerate(runs):
        add_scenarios(run, seed=seed)
    found = scenario_rows(*runs)
    assert list(found) == [GENERATED, PROMPTS, COLD, HIGHEST, TTFT, TPOT]
    assert {row.status for name, row in found.items() if name != HIGHEST} == {"no difference shown"}
    assert found[HIGHEST].status == "ratio only"
    assert (
        0.6 < float(found[COLD].before) < 1.0
    )  # four spans of 0.2 s and the machine's drift; the second token is none of them
    comparison = compare_runs(*runs)
    assert comparison.exit_code == 0
    assert any("the same arrivals at 2 requests/s" in note for note in comparison.notes)
    assert f"| {HIGHEST} | 4 | 4 | +0.00 % (no interval) | 5 % | ratio only |" in markdown(
        comparison
    )
    json.dumps(as_json(comparison), allow_nan=False)


def test_a_scenario_only_one_run_has_is_left_out(runs: tuple[Path, Path]) -> None:
    add_scenarios(runs[0])
    assert scenario_rows(*runs) == scenario_rows(*reversed(runs)) == {}


def test_each_scenario_is_found_worse(runs: tuple[Path, Path]) -> None:
    add_scenarios(runs[0])
    add_scenarios(runs[1], seed=1, slower=1.3, highest=3.0)
    found = scenario_rows(*runs)
    assert {row.status for name, row in found.items() if name != HIGHEST} == {"worse"}
    for row in found.values():
        assert row.change is not None
        assert row.change.value == pytest.approx(1 / 3 if row.metric == HIGHEST else 0.3, abs=0.03)
    assert float(found[GENERATED].before) > 1.2 * float(found[GENERATED].after)
    assert {
        row.status for name, row in scenario_rows(*reversed(runs)).items() if name != HIGHEST
    } == {"better"}


def test_a_slower_machine_is_in_the_server_and_not_in_batches_and_starts(
    runs: tuple[Path, Path],
) -> None:
    add_scenarios(runs[0])
    add_scenarios(runs[1], seed=1, machine_slower=1.3)
    found = scenario_rows(*runs)
    assert {found[name].status for name in (GENERATED, PROMPTS, COLD)} == {"no difference shown"}
    assert {found[name].status for name in (TTFT, TPOT)} == {"worse"}
    assert any(
        "what the machine did between the runs is in them" in note
        for note in compare_runs(*runs).notes
    )


def test_too_few_samples_give_a_ratio_that_decides_nothing(runs: tuple[Path, Path]) -> None:
    add_scenarios(runs[0], blocks=2)
    add_scenarios(runs[1], blocks=2, seed=1, slower=1.3)
    found = scenario_rows(*runs)
    assert {found[name].status for name in (GENERATED, PROMPTS, COLD)} == {"ratio only"}
    assert {found[name].status for name in (TTFT, TPOT)} == {"worse"}  # 48 requests are enough
    assert any(note.startswith("Ratio only:") for note in compare_runs(*runs).notes)


def test_a_server_is_compared_only_where_it_was_asked_the_same(runs: tuple[Path, Path]) -> None:
    add_scenarios(runs[0])
    add_scenarios(runs[1], rate=3.0, slo=SLO | {"share": 0.99})
    comparison = compare_runs(*runs)
    assert not {HIGHEST, TTFT, TPOT} & {row.metric for row in comparison.rows}
    assert any("give the scenario a first_rate" in note for note in comparison.notes)
    assert any("The promises (slo) of the server differ" in note for note in comparison.notes)
    add_scenarios(runs[1], seed=2, target={"label": "http://a", "kind": "url", "model": None})
    assert any("the other a URL" in note for note in compare_runs(*runs).notes)


def test_failed_requests_and_a_rate_that_no_longer_holds_are_worse(runs: tuple[Path, Path]) -> None:
    add_scenarios(runs[0])
    add_scenarios(runs[1], failed=6, highest=None)
    found = scenario_rows(*runs)
    assert (found[FAILED].before, found[FAILED].after, found[FAILED].status) == (
        "0 of 48",
        "6 of 48",
        "worse",
    )
    assert (found[HIGHEST].before, found[HIGHEST].after, found[HIGHEST].status) == (
        "4",
        "none",
        "worse",
    )
    assert found[TTFT].status == "no difference shown"  # of the requests that both answered
    assert scenario_rows(*reversed(runs))[FAILED].status == "better"
