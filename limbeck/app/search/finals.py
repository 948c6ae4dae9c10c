"""The finalists of a search: choose them and run their whole job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from limbeck.app import run as pipeline
from limbeck.app.search.candidates import Candidate, Search
from limbeck.app.search.outcome import excess, why_refused
from limbeck.app.search.state import Clock
from limbeck.app.search.tasks import task_of
from limbeck.app.verify import verify
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import QualityError
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyBudget, parse_any_recipe


def measure_finalists(search: Search, clock: Clock) -> None:
    """Run the whole job of finalists in the time that is left.

    The first one is always run; the others until one passes and enough are measured.
    """
    budget, wanted = search.budget, search.recipe.search.finalists
    order = finalists(search.candidates, budget)
    for place, finalist in enumerate(order):
        enough = (
            any(c.verdict == "pass" for c in order)
            and sum(bool(c.measured) for c in order) >= wanted
        )
        began, run = clock.spent(), search.folder / "finalists" / finalist.name
        late = (
            place > 0
            and not (run / "report.json").exists()
            and began + clock.longest > 3600 * budget.hours
        )
        if enough or late:
            finalist.late = finalist.late or not enough
            finalist.out = finalist.out or (
                "not among the finalists" if enough else "no time left to measure it"
            )
            continue
        earlier = next(
            (Path(c.run) for c in order[:place] if c.run and c.student == finalist.student), None
        )
        if earlier is not None and (earlier / "student").exists() and not run.exists():
            _share_student(earlier, run)
        _measure(search, finalist, run)
        clock.longest = max(clock.longest, clock.spent() - began)
        clock.save()


def finalists(candidates: Sequence[Candidate], budget: AnyBudget) -> list[Candidate]:
    """Every trained student that may keep the budget: first the best of each form, then the rest.

    Both parts begin with students that plan and prediction put inside every bound, then go by
    training and loss. Rounding costs each form another loss, not known yet, so the best student of
    each form is measured.
    """
    healed = [c for c in candidates if c.nll is not None]
    order = sorted(healed, key=lambda c: (excess(c, budget) > 1, -c.tokens, c.nll, -c.size))
    leaders = list({c.form: c for c in reversed(order)}.values())
    return sorted(leaders, key=order.index) + [c for c in order if c not in leaders]


def _share_student(earlier: Path, run: Path) -> None:
    """Start a run with the student of another form's run, instead of training it again."""
    part = run.with_name(f".{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(earlier / "student", part / "student", copy_function=os.link)
    shutil.copy(earlier / pipeline.RUN, part / pipeline.RUN)
    part.rename(run)


def _measure(search: Search, finalist: Candidate, run: Path) -> None:
    """Run a finalist's whole job in the folder ``run``, and keep the measured figures.

    A run that passes is verified, except for speed: the bench has just measured it on this machine.
    """
    say(f"== finalist {finalist.name}")
    task, student = task_of(search.recipe), search.students[finalist.student]
    tree = task.final_recipe(search.recipe, student, finalist, search.budget)
    finalist.run, finalist.out, finalist.late = str(run), None, False
    try:
        report = pipeline.run(parse_any_recipe(tree, where=finalist.name), out=run)
    except QualityError as error:
        say(f"   {finalist.name}: {error}")
        finalist.out = why_refused(error)
        return
    assert report is not None
    finalist.verdict = report.verdict.status
    finalist.measured = task.measured(
        open_artifact(run / "bench", kind="bench", verify=False).result
    )
    if report.verdict.status != "pass":
        missed = [gate.sentence for gate in report.verdict.gates if gate.status != "pass"]
        finalist.out = f"measured: {'; '.join(missed)}"
    elif verify(run, speed=False):
        finalist.verdict, finalist.out = (
            "fail",
            "measured, but `limbeck verify` does not find it again",
        )
