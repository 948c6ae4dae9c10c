"""Successive halving: short distillations in rounds; several workers share one Optuna queue."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.app.search.candidates import Search, still_in
from limbeck.app.search.state import Clock
from limbeck.app.search.storage import WAIT, Shared, ask, give_back
from limbeck.app.search.tasks import task_of
from limbeck.contract.errors import DivergenceError
from limbeck.contract.lock import locked
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe

if TYPE_CHECKING:
    import optuna

_LATE = "no time left for it"


def halve(search: Search, clock: Clock, shared: Shared, *, until: float) -> None:
    """Distil every student for a short round, the better half for a longer one, and so on.

    This is successive halving. It stops early when the finals have room for the rest. Every worker
    takes students from one queue until it is empty; after ``until`` seconds no new one starts.
    """
    recipe, candidates, folder = search.recipe, search.candidates, search.folder
    task = task_of(recipe)
    names = list(
        dict.fromkeys(c.student for c in sorted(still_in(candidates), key=lambda c: -c.size))
    )
    if not names:
        return
    rounds, study = task.rounds_of(recipe), shared.study
    with shared.turn(), locked(folder, wait=True):
        cached = bool(study.user_attrs.get("cached"))
        products = task.make_teachers(
            recipe, search.students[names[0]], folder, rounds, cached=cached
        )
        study.set_user_attr("cached", True)
        _enqueue(study, study.get_trials(deepcopy=False), [(name, 0) for name in names], until)
    finalists = recipe.search.finalists
    while (
        trial := _next(shared, rounds=len(rounds), finalists=finalists, until=until)
    ) is not None:
        with shared.holding(trial):
            if clock.spent() > until:
                _tell(study, trial, None, why=_LATE, until=until)
                continue
            student = search.students[trial.user_attrs["student"]]
            _heal(study, trial, recipe, student, products, folder, rounds, clock, until)
        with locked(folder, wait=True):
            clock.save()
    reached, why = _reached(study)
    if _LATE not in why.values():  # else more hours may be given, and they go on from there
        shutil.rmtree(folder / "healing", ignore_errors=True)
    top = max((rung for rung, *_ in reached.values()), default=0)
    for candidate in still_in(candidates):
        candidate.out = why.get(candidate.student)
        candidate.late = candidate.out == _LATE
        if candidate.student in reached:
            rung, candidate.nll, candidate.metric = reached[candidate.student]
            candidate.tokens = rounds[rung]
            if candidate.out is None and rung < top:
                candidate.out = f"behind after {candidate.tokens} {task.UNIT}"


def _losses(trials: Iterable[optuna.trial.FrozenTrial], rung: int) -> dict[str, float]:
    """Loss of every student that finished a round."""
    done = (t for t in trials if t.state.name == "COMPLETE" and t.user_attrs["rung"] == rung)
    return {t.user_attrs["student"]: float(t.values[0]) for t in done}


def _reached(
    study: optuna.Study,
) -> tuple[dict[str, tuple[int, float, dict[str, float]]], dict[str, str]]:
    """Last round, loss and metric of each student; the reason for those whose last trial failed."""
    import optuna

    state = optuna.trial.TrialState
    reached: dict[str, tuple[int, float, dict[str, float]]] = {}
    why: dict[str, str] = {}
    # in order: a later one may have had more time
    for trial in study.get_trials(states=(state.COMPLETE, state.PRUNED)):
        name = trial.user_attrs["student"]
        why.pop(name, None)
        if trial.state == state.COMPLETE:
            figures = dict(trial.user_attrs.get("metric", {}))
            reached[name] = (int(trial.user_attrs["rung"]), float(trial.values[0]), figures)
        else:
            why[name] = str(trial.user_attrs["why"])
    return reached, why


def _enqueue(
    study: optuna.Study,
    trials: Iterable[optuna.trial.FrozenTrial],
    pairs: Iterable[tuple[str, int]],
    until: float,
) -> bool:
    """Queue students for a round each, unless one of ``trials`` has it; True if there were any.

    Students that an earlier, shorter time limit stopped are queued again.
    """
    held = {_pair(trial) for trial in trials if _holds(trial, until)}
    new = [pair for pair in dict.fromkeys(pairs) if pair not in held]
    for name, rung in new:
        study.enqueue_trial({}, user_attrs={"student": name, "rung": rung})
    return bool(new)


def _pair(trial: optuna.Trial | optuna.trial.FrozenTrial) -> tuple[str, int]:
    return trial.user_attrs["student"], trial.user_attrs["rung"]


def _holds(trial: optuna.trial.FrozenTrial, until: float) -> bool:
    """Whether a student's round is done, in work or queued by this trial."""
    # A trial fails when its worker has ended, or when two workers queued the same. One without a
    # student comes of asking an empty queue.
    if trial.state.name == "FAIL" or "student" not in trial.user_attrs:
        return False
    return bool(trial.user_attrs.get("until", until) >= until)


def _next(shared: Shared, *, rounds: int, finalists: int, until: float) -> optuna.Trial | None:
    """The next student of the queue, or None when it is empty. Dead workers' students return.

    At the end of a round its better half is queued for the next round, if it has more students than
    there are ``finalists``. Each decision is made from one view of all trials, so that every worker
    makes the same. Two of them may queue the same student; then the lower number counts.
    """
    import optuna

    study, state = shared.study, optuna.trial.TrialState

    def begin_next_round(trials: Sequence[optuna.trial.FrozenTrial]) -> bool:
        for rung in range(rounds - 1):
            losses = _losses(trials, rung)
            better = _better_half(losses, of=len(losses))
            if len(better) <= finalists:
                return False
            if _enqueue(study, trials, [(name, rung + 1) for name in better], until):
                return True
        return False

    while True:
        shared.running(study)  # gives back what dead workers hold
        trials = study.get_trials(deepcopy=False)
        lost = [t for t in trials if t.state == state.FAIL and "student" in t.user_attrs]
        if _enqueue(study, trials, map(_pair, lost), until):
            continue
        states = {trial.state for trial in trials}
        if state.WAITING in states:
            trial = ask(study)
            if not _is_double(study, trial, until):
                return trial
            give_back(study, trial.number)
        elif state.RUNNING in states:
            time.sleep(WAIT)
        elif not begin_next_round(trials):
            return None


def _is_double(study: optuna.Study, trial: optuna.Trial, until: float) -> bool:
    """Whether others had emptied the queue, or a trial of a lower number has the same round."""
    return "student" not in trial.user_attrs or any(
        other.number < trial.number and _holds(other, until) and _pair(other) == _pair(trial)
        for other in study.get_trials(deepcopy=False)
    )


def _better_half(losses: Mapping[str, float], *, of: int) -> list[str]:
    """The better half of ``of`` students by loss, best first; some of them may not be done yet."""
    return sorted(losses, key=lambda name: losses[name])[: (of + 1) // 2]


def _heal(
    study: optuna.Study,
    trial: optuna.Trial,
    recipe: AnyRecipe,
    student: dict[str, Any],
    products: Mapping[str, Path],
    folder: Path,
    rounds: Sequence[int],
    clock: Clock,
    until: float,
) -> None:
    """Distil one student to the end of its round, and report to the study."""
    name, rung = trial.user_attrs["student"], trial.user_attrs["rung"]
    say(f"== healing {name}, round {rung + 1} of {len(rounds)}")
    found, why = None, _LATE
    try:
        found = task_of(recipe).heal(
            recipe,
            name,
            student,
            products,
            folder / "healing" / name,
            rounds,
            rung,
            lambda: clock.spent() <= until,
        )
    except DivergenceError as error:
        say(f"   {name}: {error}")
        why = "diverged"
    _tell(study, trial, found, why=why, until=until)
    # Delete the checkpoint of a student that cannot be in the better half any more: it has three
    # times the size of the weights.
    trials = study.get_trials(deepcopy=False)
    asked = {t.user_attrs["student"] for t in trials if t.user_attrs.get("rung") == rung}
    losses = _losses(trials, rung)
    for beaten in losses.keys() - set(_better_half(losses, of=len(asked))):
        shutil.rmtree(folder / "healing" / beaten, ignore_errors=True)


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    found: tuple[float, dict[str, float]] | None,
    *,
    why: str,
    until: float,
) -> None:
    """Report loss and metric of a round; without them, the reason and the time limit in seconds."""
    import optuna

    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker has it by now
        if found is not None:
            trial.set_user_attr("metric", found[1])
            study.tell(trial, found[0], skip_if_finished=True)
            return
        trial.set_user_attr("why", why)
        if why == _LATE:
            trial.set_user_attr("until", until)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED, skip_if_finished=True)
