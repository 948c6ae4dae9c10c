"""`limbeck search`: from a budget in megabytes and milliseconds to the student that keeps it.

The order of the work: the plan rules out what is too large, a handful of exports is timed and the rest predicted, short distillations
from one teacher cache halve the field, and the finalists go through the whole job. Only those are ever called good: what a search
promises was measured. Optuna keeps the state (ask and tell), so that a search goes on where it stopped and several can share one.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from limbeck import pipeline, sources
from limbeck.artifact import disk_full_is_a_user_error, open_artifact, write_atomically
from limbeck.errors import (
    ArtifactError,
    DivergenceError,
    EnvironmentalError,
    ModelError,
    QualityError,
    RecipeError,
)
from limbeck.plan import form_sizes
from limbeck.progress import say
from limbeck.recipe import (
    Budget,
    FreshStudent,
    MixedByLoss,
    MixedBySize,
    Recipe,
    find_recipe,
    fingerprint,
    parse_recipe,
)
from limbeck.runtime import import_onnxruntime
from limbeck.search_candidates import SPEEDS, Candidate, SpeedModel, fit_speed
from limbeck.search_outcome import (
    PICTURE,
    UNEXPORTED,
    Found,
    asked_for,
    draw,
    excess,
    figures_of,
    markdown,
    megabytes,
    missed_bound,
    nearest,
    out_of_time,
    rows,
)

if TYPE_CHECKING:
    import optuna

ASKED, SPENT, TIMING, STATE = "asked.json", "spent.json", "timing.json", "search.db"
CHOSEN, NEAREST, RESULT, TABLE = "chosen.yaml", "nearest.yaml", "search.json", "search.md"
_SIZE_ERROR = 0.02  # of the plan, relative
_NOISE = 0.1  # least error of a time, relative
_RESERVED = 0.5  # share of the hours kept for the finalists
_PLAIN = {"recover": None, "adapters": "merged"}  # of `export:`, for every student and form
_LATE = "no time left for it"
_WAIT = 2.0  # seconds between looks at what another worker is doing


def search(recipe: Recipe, *, out: Path | None = None) -> Found:
    """Find the best student within ``recipe.budget`` and write it to ``out`` as a recipe of its own.

    ``out`` defaults to ``runs/search-<name>-<digest8>``; an interrupted search goes on there, and several processes share one.
    Raises `RecipeError` without a budget or a base to start from, `EnvironmentalError` without Optuna, `ArtifactError` for a folder
    that holds something else, and whatever a stage raises.
    """
    budget = _required(recipe)
    _require_optuna()
    pipeline.require_inputs(recipe)
    import_onnxruntime()  # the first exports need it
    digest = _digest(recipe)
    folder = out or Path("runs") / f"search-{recipe.name}-{digest[:8]}"
    _require_ours(folder, digest)
    students = dict(_students(recipe))
    candidates = _sized(recipe, students)  # what is wrong with a model or a form is told before anything is written
    _claim(folder, digest)
    clock = _Clock(folder / SPENT)
    with pipeline.locked(folder, wait=True):
        if (found := _found(folder, budget)) is not None:
            return found
        say(f"== search: {len(students)} students in {len(recipe.search.forms)} forms")
        _rule_out_sizes(candidates, budget)
        models = _predict_speeds(recipe, students, candidates, budget, folder)
        clock.save()
    _halve(recipe, students, candidates, folder, clock, until=3600 * budget.hours * (1 - _RESERVED))
    with pipeline.locked(folder, wait=True):
        if (found := _found(folder, budget)) is not None:
            return found
        _measure_finalists(recipe, students, candidates, budget, folder, clock)
        return _conclude(recipe, students, candidates, budget, models, folder, clock.spent())


def _required(recipe: Recipe) -> Budget:
    if recipe.budget is None or all(
        bound is None for bound in (recipe.budget.size_mb, recipe.budget.tpot_ms, recipe.budget.ttft_ms)
    ):
        raise RecipeError(
            f"{recipe.name}: budget: a search needs a bound to keep to; add budget: {{size_mb: 120}}, or --set budget.size_mb=120."
        )
    if isinstance(recipe.student, FreshStudent):
        raise RecipeError(f"{recipe.name}: student.kind: a search cuts a base down; use lora or shrink, with a base.")
    if not recipe.teachers:
        raise RecipeError(f"{recipe.name}: teachers: a search compares distilled students; name a teacher.")
    if recipe.training.tokens is None:
        raise RecipeError(
            f"{recipe.name}: training.minutes: rounds are counted in tokens; give the budget as `tokens`."
        )
    if list(recipe.search.rungs) != sorted(set(recipe.search.rungs)):
        raise RecipeError(
            f"{recipe.name}: search.rungs: found {list(recipe.search.rungs)}; each round is longer than the one before."
        )
    return recipe.budget


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise EnvironmentalError("limbeck search needs Optuna; install it: pip install 'limbeck[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _digest(recipe: Recipe) -> str:
    """Of all that decides what is looked for: the recipe, and what the models and texts that it names hold now.

    Not of the hours: with more of them a search goes on from what is there.
    """
    products, _ = pipeline.plan(recipe)
    made = [
        [each.distillation(), sources.input_digests(each, products=None)]
        for each in (recipe, *(product.recipe for product in products))
    ]
    asked = recipe.resolved()
    bounds = {name: bound for name, bound in asked["budget"].items() if name != "hours"}
    return fingerprint([made, bounds, [asked[key] for key in ("search", "export", "bench", "gates")]])


def _require_ours(folder: Path, digest: str) -> None:
    """Raise `ArtifactError` when ``folder`` cannot be made, or holds anything but this search."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ArtifactError(f"{place}: is a file, not a folder; name another with --out.")
    try:
        found = str(json.loads((folder / ASKED).read_text())["digest"])
    except FileNotFoundError:
        if folder.exists() and any(entry.name != pipeline.LOCK for entry in folder.iterdir()):
            raise ArtifactError(
                f"{folder}: holds files but no search ({ASKED} is missing); name an empty or new folder with --out."
            ) from None
        return
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{folder / ASKED}: not what Limbeck writes; name another folder with --out.") from None
    if found != digest:
        raise ArtifactError(
            f"{folder}: holds a search of another recipe or budget, or of files that have changed since; leave --out away or "
            "name another folder."
        )


def _claim(folder: Path, digest: str) -> None:
    with disk_full_is_a_user_error(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ASKED).exists():
                write_atomically(folder / ASKED, json.dumps({"digest": digest}))
        except PermissionError as error:
            raise EnvironmentalError(
                f"{folder}: cannot be written ({error.strerror}); name another with --out."
            ) from None


class _Clock:
    """Seconds of work on a search, over all its interruptions; of several workers at once, of the longest.

    ``longest`` is what a finalist took at most.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = self._kept()
        self._before, self.longest, self._started = kept["seconds"], kept["longest"], time.monotonic()

    def spent(self) -> float:
        """Seconds until now."""
        return self._before + time.monotonic() - self._started

    def save(self) -> None:
        """Keep it for whoever goes on."""
        kept = self._kept()
        now = {"seconds": self.spent(), "longest": self.longest}
        write_atomically(self._path, json.dumps({name: round(max(now[name], kept[name]), 1) for name in now}))

    def _kept(self) -> dict[str, float]:
        found: dict[str, float] = {"seconds": 0.0, "longest": 0.0}
        return found | (json.loads(self._path.read_text()) if self._path.exists() else {})


def _found(folder: Path, budget: Budget) -> Found | None:
    """What a search that is complete came to; none where there is none, or where its time was up and there is more of it now."""
    if not (folder / RESULT).exists():
        return None
    result = json.loads((folder / RESULT).read_text())
    if any(c["late"] for c in result["candidates"]) and budget.hours > result["budget"]["hours"]:
        return None
    return Found(folder, result["table"], result["sentence"], result["exit_code"])


# Candidates ------------------------------------------------------------------------------------------------------


def _students(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `student:` of everything in the space, whole before cut."""
    space, asked = recipe.search, recipe.resolved()["student"]
    base = asked["base"]
    for rank in space.ranks:
        kept = {k: v for k, v in asked.items() if k not in ("rank", "alpha")} if asked["kind"] == "lora" else {}
        yield f"lora-r{rank}", {"kind": "lora", "base": base, **kept, "rank": rank, "alpha": 2 * rank}
    if asked["kind"] == "lora" and (
        asked["rank"] not in space.ranks or asked["alpha"] not in (None, 2 * asked["rank"])
    ):
        yield "asked", asked
    if why := _uncut(recipe):
        say(f"search: {why}; nothing is cut")
        return
    own = asked if asked["kind"] == "shrink" else {}  # what it says of heads and hidden width stays
    cut = {"kind": "shrink", "base": base} | {k: v for k, v in own.items() if k not in ("layers", "intermediate_size")}
    most, seen = _dimensions(recipe, cut), [_dimensions(recipe, {"kind": "shrink", "base": base})]
    for hidden, width, depth in itertools.product(space.hidden, space.widths, space.depths):
        student = cut | {
            "layers": _share(most, "layers", depth),
            "intermediate_size": _share(most, "intermediate_size", width),
        }
        if hidden < 1:
            student |= _narrowed(recipe, base, most, hidden)
        kept = _dimensions(recipe, student)
        if kept not in seen:
            seen.append(kept)
            sizes = ["layers", "intermediate_size"] + (["hidden_size"] if hidden < 1 else [])
            yield f"cut-{'x'.join(str(kept[name]) for name in sizes)}", student | {name: kept[name] for name in sizes}
    if asked["kind"] == "shrink":
        yield "asked", asked


def _uncut(recipe: Recipe) -> str | None:
    """Why nothing can be cut out of the recipe's base; none where it can."""
    try:
        _dimensions(recipe, {"kind": "shrink", "base": recipe.resolved()["student"]["base"]})
    except ModelError as error:
        if recipe.student.kind == "shrink":
            raise
        return str(error)
    return None


def _share(sizes: Mapping[str, int], name: str, share: float) -> int:
    return max(1, int(sizes[name] * share + 0.5))


def _narrowed(recipe: Recipe, base: dict[str, Any], most: Mapping[str, int], share: float) -> dict[str, int]:
    """A share of the hidden width, and of the heads with it where an architecture's heads fill the width."""
    from compress.models import model_config
    from compress.shrink import family_of

    made = _variant(recipe, student={"kind": "shrink", "base": base}).student
    assert made.kind == "shrink"
    if not family_of(model_config(made.base, folder=recipe.folder)).head_size_is_fixed:
        return {"hidden_size": _share(most, "hidden_size", share)}
    heads = _share(most, "kv_heads", share)
    return {"kv_heads": heads, "hidden_size": most["hidden_size"] * heads // most["kv_heads"]}


def _dimensions(recipe: Recipe, student: dict[str, Any]) -> dict[str, int]:
    """What a cut student keeps of each dimension, in multiples that can be cut."""
    from compress.models import model_config
    from compress.shrink import shrunk_sizes

    made = _variant(recipe, student=student).student
    assert made.kind == "shrink"
    return shrunk_sizes(model_config(made.base, folder=recipe.folder), made)


def _variant(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some of its parts replaced, in the same folder."""
    tree = recipe.resolved() | {"gates": {}, "budget": None} | changes
    tree["export"] |= _PLAIN | {"mixed": "rule"}
    made = parse_recipe(tree, where=recipe.name)
    made._folder = recipe.folder
    return made


def _sized(recipe: Recipe, students: Mapping[str, dict[str, Any]]) -> list[Candidate]:
    found = []
    base = {"kind": "shrink", "base": recipe.resolved()["student"]["base"]}
    whole = 1 if _uncut(recipe) else _dimensions(recipe, base)["layers"]  # whole ones alone are all as deep
    for name, student in students.items():
        made = _variant(recipe, student=student, export=_export(recipe, recipe.search.forms))
        sizes = form_sizes(made)
        layers = int(student.get("layers") or whole)
        shape = "whole" if student["kind"] == "lora" else name
        found += [Candidate(name, form, shape, sizes[form], layers) for form in recipe.search.forms]
    return found


def _export(recipe: Recipe, forms: Sequence[str]) -> dict[str, Any]:
    """The recipe's `export:` with these forms; a form that the recipe describes keeps its description."""
    export: dict[str, Any] = recipe.resolved()["export"]
    described = {form["kind"]: form for form in export["forms"]}
    return export | {"forms": [described.get(form, form) for form in ("fp32", *forms)]} | _PLAIN


def _rule_out_sizes(candidates: Sequence[Candidate], budget: Budget) -> None:
    if budget.size_mb is None:
        return
    for candidate in candidates:
        if candidate.size > 1e6 * budget.size_mb * (1 + _SIZE_ERROR):
            candidate.out = f"planned {megabytes(candidate.size)}"


def _in(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.out is None]


# Speed -----------------------------------------------------------------------------------------------------------


def _predict_speeds(
    recipe: Recipe,
    students: Mapping[str, dict[str, Any]],
    candidates: Sequence[Candidate],
    budget: Budget,
    folder: Path,
) -> dict[str, SpeedModel]:
    """Time a few exports, predict the others, and rule out what is too slow by more than the prediction's error."""
    if budget.tpot_ms is None and budget.ttft_ms is None:
        return {}
    left = _in(candidates)
    if not left:
        return {}
    by_shape: dict[str, list[Candidate]] = {}
    for candidate in left:
        by_shape.setdefault(candidate.shape, []).append(candidate)
    shapes = sorted(by_shape, key=lambda shape: (by_shape[shape][0].layers, by_shape[shape][0].size))
    probes = _spread(shapes, recipe.search.probes)
    groups = {shape: list({c.form: c for c in by_shape[shape]}.values()) for shape in probes}
    if not (folder / TIMING).exists():
        _time_probes(recipe, students, groups, folder, of=len(shapes))
    measured = json.loads((folder / TIMING).read_text())
    probed = [c for group in groups.values() for c in group]
    timed = [c for c in probed if "refused" not in measured[c.name]]
    # Another shape says how fast a form is that was refused in one; a form that was refused in all is out.
    refused = {c.form: measured[c.name]["refused"] for c in probed if c.form not in {t.form for t in timed}}
    for candidate in left:
        if candidate.form in refused:
            candidate.out = f"{UNEXPORTED}: {refused[candidate.form]}"
    if not timed:
        return {}
    models = {}
    for metric in SPEEDS:
        models[metric] = fit_speed(timed, [measured[c.name][metric] for c in timed])
        error = models[metric].error
        if len(probes) < len(shapes):
            said = f"predicted within {error:.0%}" if error is not None else "predicted from too few to say how well"
            say(f"   {metric}: {said}")
    known = {(c.shape, c.form): measured[c.name] for c in timed}
    for candidate in candidates:
        candidate.timed = (candidate.shape, candidate.form) in known
        for metric in SPEEDS:
            if candidate.timed:
                candidate.predicted[metric] = known[candidate.shape, candidate.form][metric]
            elif candidate.form in models[metric].forms:
                candidate.predicted[metric] = models[metric](candidate)
    for candidate in _in(left):
        for metric, bound in (("tpot_ms", budget.tpot_ms), ("ttft_ms", budget.ttft_ms)):
            # What was timed is as far off in another process, and a good fit no promise: what is near the bound stays in.
            error = max(models[metric].error or 0.0, _NOISE)
            if bound is not None and candidate.predicted.get(metric, 0.0) * (1 - error) > bound:
                candidate.out = (
                    f"{'timed' if candidate.timed else 'predicted'} {metric[:4]} {candidate.predicted[metric]:.2f} ms"
                )
    return models


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Evenly many of a sorted list, both ends among them."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _export_untrained(recipe: Recipe, student: dict[str, Any], forms: Sequence[str], folder: Path) -> None:
    """Export a random model of a student's shape: speed does not depend on what weights say, and a cut that has not
    healed yet may lose more to rounding than any exporter passes."""
    tree = recipe.resolved()
    block = tree["data"]["block"]
    probe = _variant(
        recipe,
        name=f"{recipe.name[:60]}-probe",
        teachers=tree["teachers"][:1],  # its tokenizer
        student={"kind": "fresh", "config": _shape(recipe, student)},
        data=tree["data"] | {"heldout": tree["data"]["heldout"] | {"blocks": 2}},
        fusion={"weights": {"kind": "uniform"}},
        features={"weight": 0},
        training=tree["training"] | {"tokens": block, "batch_tokens": block, "micro_batch": 1, "teacher_cache": "none"},
        export=_export(recipe, forms),
    )
    for stage in ("compress", "export"):
        pipeline.run_stage(stage, probe, out=folder)


def _shape(recipe: Recipe, student: dict[str, Any]) -> dict[str, Any]:
    """The transformers configuration of a student, as a recipe's `fresh` student has it."""
    from compress.footprint import student_config
    from compress.models import model_config

    made = _variant(recipe, student=student)
    assert not isinstance(made.student, FreshStudent)
    config = student_config(made, base=model_config(made.student.base, folder=recipe.folder), vocabulary=0)
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {
        k: v for k, v in values.items() if k not in ("architectures", "dtype", "transformers_version", "_name_or_path")
    }


def _time_probes(
    recipe: Recipe,
    students: Mapping[str, dict[str, Any]],
    groups: Mapping[str, Sequence[Candidate]],
    folder: Path,
    *,
    of: int,
) -> None:
    """Median times of untrained exports by candidate, all in one interleaved run, to ``timing.json``, or why there are none; the exports are not kept."""
    import serve_bench

    say(f"== timing {len(groups)} of {of} shapes, untrained: {', '.join(groups)}")
    targets: dict[str, str] = {}  # by candidate's name
    times: dict[str, dict[str, Any]] = {}
    for shape, group in groups.items():
        student, place = students[group[0].student], folder / "probes" / shape
        try:
            _export_untrained(recipe, student, [c.form for c in group], place)
            targets |= {c.name: f"{place}#{c.form}" for c in group}
        except QualityError:  # of one of the forms, which leaves nothing of the others
            for c in group:
                place = folder / "probes" / c.name
                try:
                    _export_untrained(recipe, student, [c.form], place)
                    targets[c.name] = f"{place}#{c.form}"
                except QualityError as error:
                    say(f"   {c.name} is not timed: {error}")
                    times[c.name] = {"refused": str(error).splitlines()[0].rstrip(":")}
    bench = recipe.bench.model_copy(
        update={"minutes": 1.0, "min_blocks": 3, "scenarios": (recipe.bench.scenario("single"),), "runtimes": ()}
    )
    if targets:
        timing = folder / "probes" / "timing"
        result = serve_bench.measure_targets(list(targets.values()), out=timing, bench=bench).result
        arms = [arm for arm in result["arms"].values() if arm["role"] != "twin"]
        for name, arm in zip(targets, arms, strict=True):
            times[name] = {metric: float(arm[metric]["value"]) for metric in SPEEDS}
    write_atomically(folder / TIMING, json.dumps(times, indent=1))
    shutil.rmtree(folder / "probes", ignore_errors=True)


# Halving ---------------------------------------------------------------------------------------------------------


def _halve(
    recipe: Recipe,
    students: Mapping[str, dict[str, Any]],
    candidates: Sequence[Candidate],
    folder: Path,
    clock: _Clock,
    *,
    until: float,
) -> None:
    """Distil every student that is left for a short round, the better half on to a longer one, and so on (successive halving).

    A half that the finals have room for needs no further round. Every worker takes students from one queue until nothing is left
    to do; after ``until`` seconds none is begun.
    """
    import compress

    names = list(dict.fromkeys(c.student for c in sorted(_in(candidates), key=lambda c: -c.size)))
    if not names:
        return
    step = recipe.training.batch_tokens
    assert recipe.training.tokens is not None  # as `_required` made sure
    rounds = sorted({max(min(tokens, recipe.training.tokens) // step, 1) * step for tokens in recipe.search.rungs})
    with pipeline.locked(folder, wait=True), _study(folder, recipe.seed) as study:
        products = pipeline.make_products(recipe)
        if not study.user_attrs.get("cached"):
            say("== teachers, once")
            first = _variant(recipe, student=students[names[0]])
            work = folder / "healing" / "teachers"
            compress.cache_teachers(recipe=first, products=products, work=work, rounds=rounds)
            study.set_user_attr("cached", True)
        _enqueue(study, names, 0, until)
    with _worker(folder) as me, _study(folder, recipe.seed) as study:
        while (
            trial := _next(study, folder, me, rounds=len(rounds), finalists=recipe.search.finalists, until=until)
        ) is not None:
            name = trial.user_attrs["student"]
            if clock.spent() > until:
                _tell(study, trial, None, why=_LATE, until=until)
                continue
            _heal(study, trial, recipe, students[name], products, folder, rounds, clock, until)
            with pipeline.locked(folder, wait=True):
                clock.save()
        reached, why = _reached(study)
    if _LATE not in why.values():  # else more hours may be given, and they go on from there
        shutil.rmtree(folder / "healing", ignore_errors=True)
    top = max((rung for rung, _ in reached.values()), default=0)
    for candidate in _in(candidates):
        candidate.out = why.get(candidate.student)
        candidate.late = candidate.out == _LATE
        if candidate.student in reached:
            rung, candidate.nll = reached[candidate.student]
            candidate.tokens = rounds[rung]
            if candidate.out is None and rung < top:
                candidate.out = f"behind after {candidate.tokens} tokens"


@contextmanager
def _study(folder: Path, seed: int) -> Iterator[optuna.Study]:
    """The queue of students and rounds and what they came to, in the folder's database."""
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
    """Loss after a round, by student, of all that finished it."""
    import optuna

    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return {t.user_attrs["student"]: float(t.values[0]) for t in done if t.user_attrs["rung"] == rung}


def _reached(study: optuna.Study) -> tuple[dict[str, tuple[int, float]], dict[str, str]]:
    """Of every student that was distilled, the last round and the loss after it; of those whose last trial came to nothing, why."""
    import optuna

    state = optuna.trial.TrialState
    reached: dict[str, tuple[int, float]] = {}
    why: dict[str, str] = {}
    for trial in study.get_trials(
        states=(state.COMPLETE, state.PRUNED)
    ):  # in order: a later one may have had more time
        name = trial.user_attrs["student"]
        why.pop(name, None)
        if trial.state == state.COMPLETE:
            reached[name] = (int(trial.user_attrs["rung"]), float(trial.values[0]))
        else:
            why[name] = str(trial.user_attrs["why"])
    return reached, why


def _enqueue(study: optuna.Study, names: Sequence[str], rung: int, until: float) -> bool:
    """Queue students for a round, but for those that are or were; whether there were any. To be called by one worker at a time.

    Those that an earlier and shorter time than ``until`` did not suffice for go in again.
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
    """The next student of the queue, back in which go those whose worker is gone; none when nothing is left to do.

    Once a round is over its better half is queued for the next, where that has more students than there are ``finalists``.
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
        with pipeline.locked(folder, wait=True):
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
    """The students with the lowest losses, the best first: half of so many, of which some may not be done."""
    return sorted(losses, key=lambda name: losses[name])[: (of + 1) // 2]


@contextmanager
def _worker(folder: Path) -> Iterator[str]:
    """A name for this worker, by which others see whether it is alive: it holds a lock as long as its process runs."""
    (folder / "workers").mkdir(exist_ok=True)
    path = folder / "workers" / f"{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns()}"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path.name
        finally:
            path.unlink()


def _alive(folder: Path, worker: str | None) -> bool:
    if worker is None:  # it fell between taking a student and saying so
        return False
    try:
        with (folder / "workers" / worker).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _heal(
    study: optuna.Study,
    trial: optuna.Trial,
    recipe: Recipe,
    student: dict[str, Any],
    products: Mapping[str, Path],
    folder: Path,
    rounds: Sequence[int],
    clock: _Clock,
    until: float,
) -> None:
    """Distil one student from the shared cache to the end of its round, from where the round before ended, and tell the study."""
    import compress

    name, rung = trial.user_attrs["student"], trial.user_attrs["rung"]
    say(f"== healing {name}, round {rung + 1} of {len(rounds)}")
    found: list[float] = []

    def goes_on(index: int, nll: float) -> bool:
        if index < rung:
            return clock.spent() <= until
        say(f"   {name}: {nll:.4f} nats a token after {rounds[index]} tokens")
        found.append(nll)
        return False

    work = folder / "healing" / name
    tree = recipe.resolved()
    training = tree["training"] | {"learning_rate": _rate(recipe, student)}
    short = _variant(recipe, name=f"{recipe.name[:50]}-{name}"[:80], student=student, training=training)
    why = _LATE
    try:
        compress.heal(recipe=short, products=products, work=work, rounds=rounds, goes_on=goes_on)
    except DivergenceError as error:
        say(f"   {name}: {error}")
        why = "diverged"
    _tell(study, trial, found[-1] if found else None, why=why, until=until)
    # What cannot be among the better half any more need not be kept to go on from; a checkpoint is three times the weights.
    asked = {t.user_attrs["student"] for t in study.get_trials(deepcopy=False) if t.user_attrs.get("rung") == rung}
    losses = _losses(study, rung)
    for beaten in losses.keys() - set(_better_half(losses, of=len(asked))):
        shutil.rmtree(folder / "healing" / beaten, ignore_errors=True)


def _tell(study: optuna.Study, trial: optuna.Trial, nll: float | None, *, why: str, until: float) -> None:
    """The loss after the round, or why there is none; for want of time until when, in seconds."""
    import optuna

    if nll is None:
        trial.set_user_attr("why", why)
        if why == _LATE:
            trial.set_user_attr("until", until)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, nll)


def _rate(recipe: Recipe, student: Mapping[str, Any]) -> float:
    """Learning rate: the recipe's for a student of its kind; whole weights want a third of what adapters do."""
    rate, asked = recipe.training.learning_rate, recipe.student.kind
    if student["kind"] == asked:
        return rate
    return rate * 0.3 if asked == "lora" else rate / 0.3


# Finalists -------------------------------------------------------------------------------------------------------


def _measure_finalists(
    recipe: Recipe,
    students: Mapping[str, dict[str, Any]],
    candidates: Sequence[Candidate],
    budget: Budget,
    folder: Path,
    clock: _Clock,
) -> None:
    """Run the whole job of the finalists, in the time there is: of the first one always; where none keeps the budget, of more."""
    order, wanted = finalists(candidates, budget), recipe.search.finalists
    for place, finalist in enumerate(order):
        enough = any(c.verdict == "pass" for c in order) and sum(bool(c.measured) for c in order) >= wanted
        began, run = clock.spent(), folder / "finalists" / finalist.name
        late = place > 0 and not (run / "report.json").exists() and began + clock.longest > 3600 * budget.hours
        if enough or late:
            finalist.late = finalist.late or not enough
            finalist.out = finalist.out or ("not among the finalists" if enough else "no time left to measure it")
            continue
        earlier = next((Path(c.run) for c in order[:place] if c.run and c.student == finalist.student), None)
        if earlier is not None and (earlier / "student").exists() and not run.exists():
            _share_student(earlier, run)
        _measure(recipe, students, finalist, budget, run)
        clock.longest = max(clock.longest, clock.spent() - began)
        clock.save()


def finalists(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Every healed student that may keep the budget: the best of each form first, then those that went furthest; before all
    others those that plan and prediction put inside every bound, rather than so near that they may be.

    Rounding costs each form another loss, which is not known yet; so each has its best student measured.
    """
    healed = [c for c in candidates if c.nll is not None]
    order = sorted(healed, key=lambda c: (excess(c, budget) > 1, -c.tokens, c.nll, -c.size))
    leaders = list({c.form: c for c in reversed(order)}.values())
    return sorted(leaders, key=order.index) + [c for c in order if c not in leaders]


def final_recipe(recipe: Recipe, student: dict[str, Any], candidate: Candidate, budget: Budget) -> dict[str, Any]:
    """The recipe of one candidate as plain data that stands alone: no `extends`, every path absolute, the budget as gates."""
    tree = recipe.resolved()
    gates = tree["gates"]
    export, mixed = _export(recipe, [candidate.form]), recipe.export.mixed
    if candidate.form != "int4-weight":
        export["mixed"] = "rule"  # the other choices are between 4 and 8 bits
    elif isinstance(mixed, MixedBySize):  # whose bound may be a gate of the recipe that is not in the budget
        export["mixed"]["mb"] = mixed.mb or budget.size_mb or gates["max_size_mb"]
    elif isinstance(mixed, MixedByLoss):
        export["mixed"]["rise"] = mixed.rise if mixed.rise is not None else gates["max_quantization_loss"]
    for gate, bound in (
        ("max_size_mb", budget.size_mb),
        ("max_tpot_ms", budget.tpot_ms),
        ("max_ttft_ms", budget.ttft_ms),
        ("max_loss_vs_best_teacher", budget.quality.max_loss if budget.quality else None),
    ):
        gates[gate] = bound
    gates["max_quantization_loss"] = None  # what rounding costs is part of the loss that is chosen by
    del tree["budget"], tree["search"]
    tree |= {
        # Not the form: a student is trained once for all of them.
        "name": f"{recipe.name[:50]}-{candidate.student}"[:80],
        "description": f"{candidate.student} of {recipe.name} as {candidate.form}, found by limbeck search.",
        "student": student,
        "export": export,
        "training": tree["training"] | {"learning_rate": _rate(recipe, student)},
    }
    absolute: dict[str, Any] = _absolute(tree, recipe.folder)
    return absolute


def _absolute(node: Any, folder: Path) -> Any:
    """Plain data with every path of a recipe made absolute."""
    if isinstance(node, list):
        return [_absolute(item, folder) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _absolute(value, folder) for key, value in node.items()}
    kind = made.get("kind")
    if kind == "recipe":
        made["recipe"] = str(find_recipe(made["recipe"], folder=folder))
    elif kind in ("local", "gguf", "datasets"):
        made["path"] = str((folder / Path(made["path"]).expanduser()).resolve())
    elif kind == "files":
        made["paths"] = [str(folder / Path(path).expanduser()) for path in made["paths"]]
    if isinstance(made.get("adapter"), str):
        made["adapter"] = str((folder / Path(made["adapter"]).expanduser()).resolve())
    return made


def _share_student(earlier: Path, run: Path) -> None:
    """Begin a run with the student that another form of it was made from, rather than train it again."""
    part = run.with_name(f".{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(earlier / "student", part / "student", copy_function=os.link)
    shutil.copy(earlier / pipeline.RUN, part / pipeline.RUN)
    part.rename(run)


def _measure(
    recipe: Recipe, students: Mapping[str, dict[str, Any]], finalist: Candidate, budget: Budget, run: Path
) -> None:
    """Run a finalist's whole job in the folder ``run``, and keep what was measured.

    One that passes is verified but for its speed: the bench has just measured that, and another minute of the same machine, faster
    or slower, says nothing against it.
    """
    say(f"== finalist {finalist.name}")
    tree = final_recipe(recipe, students[finalist.student], finalist, budget)
    finalist.run, finalist.out, finalist.late = str(run), None, False
    try:
        report = pipeline.run(parse_recipe(tree, where=finalist.name), out=run)
    except QualityError as error:
        say(f"   {finalist.name}: {error}")
        finalist.out = f"not exported: {str(error).splitlines()[0].rstrip(':')}"
        return
    assert report is not None
    finalist.verdict = report.verdict.status
    bench = open_artifact(run / "bench", kind="bench", verify=False).result
    arm = bench["arms"][bench["judged"]]
    finalist.measured = {
        "size": float(arm["bytes"]),
        **{metric: float(arm[metric]["value"]) for metric in SPEEDS},
        "nll": float(arm["quality"]["mean_nll"]),
        "best_teacher": min(float(a["quality"]["mean_nll"]) for a in bench["arms"].values() if a["role"] == "teacher"),
    }
    if report.verdict.status != "pass":
        missed = [gate.sentence for gate in report.verdict.gates if gate.status != "pass"]
        finalist.out = f"measured: {'; '.join(missed)}"
    elif pipeline.verify(run, speed=False):
        finalist.verdict, finalist.out = "fail", "measured, but `limbeck verify` does not find it again"


# What it came to -------------------------------------------------------------------------------------------------


def _conclude(
    recipe: Recipe,
    students: Mapping[str, dict[str, Any]],
    candidates: Sequence[Candidate],
    budget: Budget,
    models: Mapping[str, SpeedModel],
    folder: Path,
    seconds: float,
) -> Found:
    passed = [c for c in candidates if c.verdict == "pass"]
    undecided = [c for c in candidates if c.verdict == "undecided"]
    (folder / CHOSEN).unlink(missing_ok=True)
    (folder / NEAREST).unlink(missing_ok=True)
    if passed:
        best, code, name = min(passed, key=lambda c: c.measured["nll"]), 0, CHOSEN
        sentence = f"{best.name} keeps the budget: {figures_of(best)}; limbeck run {folder / CHOSEN}"
    else:
        best, name = nearest(undecided or candidates, budget), NEAREST
        code = 3 if undecided or out_of_time(candidates) else 1
        sentence = f"{missed_bound(candidates, budget)} The nearest is {best.name}: {figures_of(best)}; limbeck run {folder / NEAREST}"
    if said := ", ".join(f"{metric} within {m.error:.0%}" for metric, m in models.items() if m.error is not None):
        sentence += f"\nPredicted times: {said}, by the worst of the timed exports that the prediction had not seen."
    tree = final_recipe(recipe, students[best.student], best, budget)
    head = f"# Found by `limbeck search {recipe.name}` for {asked_for(budget)}: {figures_of(best)}.\n"
    write_atomically(folder / name, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))
    table = markdown(rows(candidates, best))
    write_atomically(folder / TABLE, f"{table}\n\n{sentence}\n")
    draw(candidates, budget, best, folder / PICTURE)
    write_atomically(
        folder / RESULT,
        json.dumps(
            {
                "recipe": recipe.name,
                "budget": budget.model_dump(mode="json"),
                "best": best.name,
                "sentence": sentence,
                "table": table,
                "exit_code": code,
                "seconds": round(seconds, 1),
                "speed_error": {metric: fitted.error for metric, fitted in models.items()},
                "candidates": [asdict(c) for c in candidates],
            },
            indent=1,
        ),
    )
    return Found(folder, table, sentence, code)
