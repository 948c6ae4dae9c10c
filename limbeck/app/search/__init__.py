"""`limbeck search`: find the best student within a budget of megabytes and milliseconds.

Order of work: the plan rules out students that are too large; a few exports are timed and the rest
predicted (`probes`); short distillations halve the field (`rounds`); the finalists go through the
whole job (`finals`). Only a finalist can win, because only finalists are measured in full. Optuna
keeps the state (ask and tell), so a search can continue after a stop and several processes, on one
machine or several, can share it (`storage`). `tasks` has the differences between language models
and encoders.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from limbeck.app.plan import training_memory
from limbeck.app.products import require_inputs
from limbeck.app.search.candidates import Candidate, Search, still_in
from limbeck.app.search.finals import measure_finalists
from limbeck.app.search.outcome import (
    PICTURE,
    UNTRAINED,
    Found,
    asked_for,
    draw,
    figures_of,
    markdown,
    megabytes,
    missed_bound,
    nearest,
    out_of_time,
    rows,
)
from limbeck.app.search.probes import predict_speeds
from limbeck.app.search.rounds import halve
from limbeck.app.search.state import (
    MACHINE,
    PATIENCE,
    SPENT,
    TIMING,
    Clock,
    claim,
    digest_of,
    require_ours,
)
from limbeck.app.search.storage import Shared, masked, opened
from limbeck.app.search.tasks import task_of
from limbeck.contract.errors import EnvironmentalError, RecipeError
from limbeck.contract.files import read_json, write_atomically
from limbeck.contract.lock import locked
from limbeck.contract.machine import host
from limbeck.contract.progress import about, say
from limbeck.contract.recipe import AnyBudget, AnyRecipe, ServerModel, parse_any_recipe
from limbeck.runtime.session import import_onnxruntime

CHOSEN, NEAREST, RESULT, TABLE = "chosen.yaml", "nearest.yaml", "search.json", "search.md"
_SIZE_ERROR = 0.02  # of the plan, relative
_RESERVED = 0.5  # share of the hours kept for the finalists


def search(recipe: AnyRecipe, *, out: Path | None = None, storage: str | None = None) -> Found:
    """Find the best student within ``recipe.budget`` and write it to ``out`` as its own recipe.

    ``out`` defaults to ``runs/search-<name>-<digest8>``. An interrupted search continues there, and
    several processes share one folder. Searches of the same recipe on several machines share
    ``storage``, the URL of a PostgreSQL database or a journal file; each has a folder of its own or
    all have the same. Raises `RecipeError` without a budget or a base, `EnvironmentalError` without
    Optuna and on a machine of another kind, `ArtifactError` if the folder holds something else,
    the errors of the storage, and those of each stage.
    """
    budget = _required(recipe)
    _require_optuna()
    if storage is not None:
        masked(storage)  # reports a wrong URL
    require_inputs(recipe)
    import_onnxruntime()  # the first exports need it
    digest = digest_of(recipe)
    folder = out or default_folder(recipe, digest)
    require_ours(folder, digest)
    task = task_of(recipe)
    students = dict(task.students(recipe))
    # Reports mistakes of models and forms, so it comes before anything is written.
    candidates = task.sized(recipe, students)
    claim(folder, digest)
    name = "students" if storage is None else f"{recipe.name}-{digest[:16]}"
    with opened(storage, folder, name=name, seed=recipe.seed) as shared:
        return _search(Search(recipe, students, candidates, budget, folder), shared)


def default_folder(recipe: AnyRecipe, digest: str) -> Path:
    """Folder of a search without --out."""
    return Path("runs") / f"search-{recipe.name}-{digest[:8]}"


def _search(search: Search, shared: Shared) -> Found:
    recipe, budget, folder = search.recipe, search.budget, search.folder
    with shared.turn(), locked(folder, wait=True):
        if (found := _found(search, shared)) is not None:
            return found
        _require_same_machine(folder, shared)
        shared.fetch(folder / SPENT)
        clock = Clock(folder / SPENT, shared.publish)
        left = about(max(3600 * budget.hours - clock.spent(), 0))
        forms = len(recipe.search.forms)
        say(
            f"== search: {len(search.students)} students in {forms} forms; {left} of budget.hours "
            "are left"
        )
        _rule_out_sizes(search.candidates, budget)
        _rule_out_memory(search)
        shared.fetch(folder / TIMING)
        models = predict_speeds(search)
        shared.publish(folder / TIMING)
        clock.save()
    until = 3600 * budget.hours * (1 - _RESERVED)
    halve(search, clock, shared, until=until)
    with shared.turn(), locked(folder, wait=True):
        if (found := _found(search, shared)) is not None:
            return found
        measure_finalists(search, clock)
        errors = {metric: model.error for metric, model in models.items()}
        found = _conclude(search, errors, clock.spent())
        shared.publish(folder / RESULT)
        return found


def _required(recipe: AnyRecipe) -> AnyBudget:
    budget = recipe.budget
    if budget is None or all(bound is None for bound in (budget.size_mb, *budget.times.values())):
        raise RecipeError(
            f"{recipe.name}: budget: a search needs a bound to keep to; add budget: "
            f"{{size_mb: 120}}, or --set budget.size_mb=120."
        )
    if recipe.base is None:
        kinds = " or ".join(task_of(recipe).KINDS)
        raise RecipeError(
            f"{recipe.name}: student.kind: a search cuts a base down; use {kinds}, with a base."
        )
    if all(isinstance(model, ServerModel) for model in recipe.teacher_models.values()):
        raise RecipeError(
            f"{recipe.name}: teachers: a search compares distilled students with their "
            "teachers; name a teacher that runs here."
        )
    if recipe.minutes is not None:
        raise RecipeError(
            f"{recipe.name}: training.minutes: rounds are counted in tokens; give the budget "
            "as `tokens`."
        )
    if list(recipe.search.rungs) != sorted(set(recipe.search.rungs)):
        raise RecipeError(
            f"{recipe.name}: search.rungs: found {list(recipe.search.rungs)}; each round is "
            "longer than the one before."
        )
    return budget


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise EnvironmentalError(
            "limbeck search needs Optuna; install it: pip install 'limbeck[search]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _found(search: Search, shared: Shared) -> Found | None:
    """Result of a finished search, or None if there is none or more time is now allowed.

    A result of another machine is written to ``folder`` too.
    """

    recipe, budget, folder = search.recipe, search.budget, search.folder

    def is_final(result: Mapping[str, Any]) -> bool:
        late = any(c["late"] for c in result["candidates"])
        if late and budget.hours > result["budget"]["hours"]:
            return False
        undecided = any(c["verdict"] == "undecided" for c in result["candidates"])
        more = any(getattr(recipe.bench, name) > result["bench"][name] for name in PATIENCE)
        return not (undecided and more)

    if (folder / RESULT).exists():
        result = json.loads((folder / RESULT).read_text("utf-8"))
        if is_final(result):
            return Found(folder, result["table"], result["sentence"], result["exit_code"])
    result = shared.study.user_attrs.get(RESULT)
    if result is None or not is_final(result):
        return None
    shared.fetch(folder / MACHINE)
    candidates = [Candidate(**kept) for kept in result["candidates"]]
    search = replace(search, candidates=candidates)
    return _conclude(search, result["speed_error"], result["seconds"])


def _require_same_machine(folder: Path, shared: Shared) -> None:
    """Raise `EnvironmentalError` if the times of this search are those of other machines."""
    here = {"processor": str(host()["processor"])}
    if not shared.fetch(folder / MACHINE):
        write_atomically(folder / MACHINE, json.dumps(here))
    shared.publish(folder / MACHINE)
    if (first := read_json(folder / MACHINE)) != here:
        raise EnvironmentalError(
            f"{folder}: this search takes its times on {first['processor']}, and this machine has "
            f"{here['processor']}; their times cannot be compared. Join it from a machine of the "
            "same kind, or begin another search with another --out and --storage."
        )


def _rule_out_sizes(candidates: Sequence[Candidate], budget: AnyBudget) -> None:
    if budget.size_mb is None:
        return
    for candidate in candidates:
        if candidate.size > 1e6 * budget.size_mb * (1 + _SIZE_ERROR):
            candidate.out = f"planned {megabytes(candidate.size)}"


def _rule_out_memory(search: Search) -> None:
    """Rule out students whose training does not fit in memory.

    For each kind of student the largest are planned first, until one fits.
    """
    recipe, candidates = search.recipe, search.candidates
    fits: set[str] = set()  # kinds
    for candidate in sorted(still_in(candidates), key=lambda c: -c.size):
        student = search.students[candidate.student]
        if student["kind"] in fits or candidate.out is not None:
            continue
        tree = task_of(recipe).final_recipe(recipe, student, candidate, search.budget)
        taken, here = training_memory(parse_any_recipe(tree, where=candidate.name))
        if taken <= here:
            fits.add(student["kind"])
            continue
        for other in still_in(candidates):  # the other forms of the student
            if other.student == candidate.student:
                other.out = (
                    f"{UNTRAINED}{megabytes(taken)} of memory, and {megabytes(here)} are here"
                )
    if out := list(
        dict.fromkeys(c.student for c in candidates if (c.out or "").startswith(UNTRAINED))
    ):
        say(f"   planned to take more memory than there is here, and left out: {', '.join(out)}")


def chosen(passed: Sequence[Candidate], budget: AnyBudget) -> Candidate:
    """The candidate with the least loss; if equal, the fastest, then the smallest.

    Equal losses are common with metrics that count examples.
    """

    def order(c: Candidate) -> tuple[float, ...]:
        assert c.loss is not None
        return (
            c.loss,
            *(c.measured[metric] for metric in budget.times if metric in c.measured),
            c.measured["size"],
        )

    return min(passed, key=order)


def _conclude(search: Search, errors: Mapping[str, float | None], seconds: float) -> Found:
    """Write the outcome. ``errors`` are those of predicted times, relative."""
    recipe, candidates = search.recipe, search.candidates
    budget, folder = search.budget, search.folder
    for name in (CHOSEN, NEAREST):
        (folder / name).unlink(missing_ok=True)
    best, code, note = _best(candidates, budget)
    name = NEAREST if code else CHOSEN
    processor = read_json(folder / MACHINE)["processor"]
    run = f"{figures_of(best)}; limbeck run {shlex.quote(str(folder / name))}"
    if code:
        missed = missed_bound(candidates, budget)
        sentence = f"{missed} The nearest is {best.name}: {run} (its gates are {note})"
    else:
        sentence = f"{best.name} keeps the budget: {run}"
    sentence += _about_times(candidates, errors, processor)
    tree = task_of(recipe).final_recipe(recipe, search.students[best.student], best, budget)
    head = (
        f"# Found by `limbeck search {recipe.name}` for {asked_for(budget)}: "
        f"{figures_of(best)}.\n" + (f"# Its gates are {note}.\n" if note else "")
    )
    write_atomically(
        folder / name, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    )
    table = markdown(rows(candidates, best, budget))
    write_atomically(folder / TABLE, f"{table}\n\n{sentence}\n")
    draw(candidates, budget, best, folder / PICTURE)
    write_atomically(
        folder / RESULT,
        json.dumps(
            {
                "recipe": recipe.name,
                "budget": budget.model_dump(mode="json"),
                "bench": {name: getattr(recipe.bench, name) for name in PATIENCE},
                "best": best.name,
                "sentence": sentence,
                "table": table,
                "exit_code": code,
                "seconds": round(seconds, 1),
                "processor": processor,
                "speed_error": errors,
                "candidates": [asdict(c) for c in candidates],
            },
            indent=1,
        ),
    )
    return Found(folder, table, sentence, code)


def _about_times(
    candidates: Sequence[Candidate], errors: Mapping[str, float | None], processor: str
) -> str:
    """Lines that say how well times were predicted, and where they were taken."""
    lines = ""
    if said := ", ".join(
        f"{metric} within {error:.0%}" for metric, error in errors.items() if error is not None
    ):
        lines += (
            f"\nPredicted times: {said}, by the worst of the timed exports that the prediction "
            "had not seen."
        )
    if any(c.timed or c.measured for c in candidates):
        lines += f"\nAll times were taken on {processor}."
    return lines


def _best(candidates: Sequence[Candidate], budget: AnyBudget) -> tuple[Candidate, int, str]:
    """The candidate to keep, the exit code, and what its gates are unless it keeps the budget."""
    if passed := [c for c in candidates if c.verdict == "pass"]:
        return chosen(passed, budget), 0, ""
    undecided = [c for c in candidates if c.verdict == "undecided"]
    best = nearest(undecided or candidates, budget)
    if undecided or out_of_time(candidates):
        return best, 3, "the budget's, which were not shown to be kept"
    return best, 1, "the budget's, which are not kept: it fails unless they are raised"
