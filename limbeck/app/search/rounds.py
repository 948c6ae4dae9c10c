"""Successive halving: short distillations in rounds, from one queue in Optuna that several workers
share."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.app.search.candidates import Candidate, still_in
from limbeck.app.search.state import STATE, Clock
from limbeck.app.search.tasks import task_of
from limbeck.contract.errors import DivergenceError
from limbeck.contract.lock import locked
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe

if TYPE_CHECKING:
    import optuna

_LATE = "no time left for it"
_WAIT = 2.0  # seconds between checks of other workers


def halve(
    recipe: AnyRecipe,
    students: Mapping[str, dict[str, Any]],
    candidates: Sequence[Candidate],
    folder: Path,
    clock: Clock,
    *,
    until: float,
) -> None:
    """Distil every student for a short round, the better half for a longer one, and so on.

    This is successive halving. It stops early when the finals have room for the rest. Every worker
    takes students from one queue until it is empty; after ``until`` seconds no new one starts.
    """
    task = task_of(recipe)
    names = list(
        dict.fromkeys(c.student for c in sorted(still_in(candidates), key=lambda c: -c.size))
    )
    if not names:
        return
    rounds = task.rounds_of(recipe)
    with locked(folder, wait=True), _study(folder, recipe.seed) as study:
        cached = bool(study.user_attrs.get("cached"))
        products = task.make_teachers(recipe, students[names[0]], folder, rounds, cached=cached)
        study.set_user_attr("cached", True)
        _enqueue(study, names, 0, until)
    with _worker(folder) as me, _study(folder, recipe.seed) as study:
        while (
            trial := _next(
                study,
                folder,
                me,
                rounds=len(rounds),
                finalists=recipe.search.finalists,
                until=until,
            )
        ) is not None:
            name = trial.user_attrs["student"]
            if clock.spent() > until:
                _tell(study, trial, None, why=_LATE, until=until)
                continue
            _heal(study, trial, recipe, students[name], products, folder, rounds, clock, until)
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


@contextmanager
def _study(folder: Path, seed: int) -> Iterator[optuna.Study]:
    """The queue of students and rounds and their results, in the folder's database."""
    import optuna

    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(folder / STATE).resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
    )
    try:
        yield optuna.create_study(
            study_name="students",
            storage=storage,
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _losses(study: optuna.Study, rung: int) -> dict[str, float]:
    """Loss of every student that finished a round."""
    import optuna

    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return {
        t.user_attrs["student"]: float(t.values[0]) for t in done if t.user_attrs["rung"] == rung
    }


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


def _enqueue(study: optuna.Study, names: Sequence[str], rung: int, until: float) -> bool:
    """Queue students for a round, except those already queued; True if there were any.

    Only one worker may call this at a time. Students that an earlier, shorter time limit
    stopped are queued again.
    """
    import optuna

    state = optuna.trial.TrialState
    queued = study.get_trials(states=(state.RUNNING, state.WAITING, state.COMPLETE, state.PRUNED))
    held = {
        (t.user_attrs.get("student"), t.user_attrs.get("rung"))
        for t in queued
        if t.user_attrs.get("until", until) >= until
    }
    new = [name for name in names if (name, rung) not in held]
    for name in new:
        study.enqueue_trial({}, user_attrs={"student": name, "rung": rung})
    return bool(new)


def _next(
    study: optuna.Study, folder: Path, me: str, *, rounds: int, finalists: int, until: float
) -> optuna.Trial | None:
    """The next student of the queue, or None when it is empty. Dead workers' students return.

    At the end of a round its better half is queued for the next round, if it has more students than
    there are ``finalists``.
    """

    def begin_next_round() -> bool:
        for rung in range(rounds - 1):
            losses = _losses(study, rung)
            better = _better_half(losses, of=len(losses))
            if len(better) <= finalists:
                return False
            if _enqueue(study, better, rung + 1, until):
                return True
        return False

    import optuna

    state = optuna.trial.TrialState
    while True:
        with locked(folder, wait=True):
            running = study.get_trials(states=(state.RUNNING,))
            for frozen in running:
                if not _alive(folder, frozen.user_attrs.get("worker")):
                    study.tell(frozen.number, state=state.FAIL)
                    kept = {key: frozen.user_attrs[key] for key in ("student", "rung")}
                    study.enqueue_trial({}, user_attrs=kept)
            waiting = bool(study.get_trials(states=(state.WAITING,)))
            if not waiting and not running:
                if not begin_next_round():
                    return None
                waiting = True
            if waiting:
                trial = study.ask()
                trial.set_user_attr("worker", me)
                return trial
        time.sleep(_WAIT)


def _better_half(losses: Mapping[str, float], *, of: int) -> list[str]:
    """The better half of ``of`` students by loss, best first; some of them may not be done yet."""
    return sorted(losses, key=lambda name: losses[name])[: (of + 1) // 2]


@contextmanager
def _worker(folder: Path) -> Iterator[str]:
    """Name of this worker. It holds a lock while its process runs, so others see if it is alive."""
    (folder / "workers").mkdir(exist_ok=True)
    path = folder / "workers" / f"{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns()}"
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path.name
        finally:
            path.unlink()


def _alive(folder: Path, worker: str | None) -> bool:
    if worker is None:  # it fell between taking a student and saying so
        return False
    try:
        with (folder / "workers" / worker).open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


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
    if found is not None:
        trial.set_user_attr("metric", found[1])
    _tell(study, trial, None if found is None else found[0], why=why, until=until)
    # Delete the checkpoint of a student that cannot be in the better half any more: it has three
    # times the size of the weights.
    asked = {
        t.user_attrs["student"]
        for t in study.get_trials(deepcopy=False)
        if t.user_attrs.get("rung") == rung
    }
    losses = _losses(study, rung)
    for beaten in losses.keys() - set(_better_half(losses, of=len(asked))):
        shutil.rmtree(folder / "healing" / beaten, ignore_errors=True)


def _tell(
    study: optuna.Study, trial: optuna.Trial, nll: float | None, *, why: str, until: float
) -> None:
    """Report the loss after the round, the reason for its absence, or the time limit in seconds."""
    import optuna

    if nll is None:
        trial.set_user_attr("why", why)
        if why == _LATE:
            trial.set_user_attr("until", until)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, nll)
