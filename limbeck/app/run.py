"""The order of the stages, their folders, and the progress that is printed.

Knows recipes, folders and the three stage functions, which it imports when it calls them. Each
stage decides for itself whether it has anything to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from limbeck.app.exports import export_run
from limbeck.app.products import Products, plan_products, require_inputs
from limbeck.contract.artifact import MANIFEST, Artifact, open_artifact, student_of
from limbeck.contract.errors import ArtifactError, RecipeError
from limbeck.contract.files import (
    disk_full_is_a_user_error,
    is_temporary,
    read_json,
    require_utf8,
    unwritable_is_a_user_error,
    write_atomically,
)
from limbeck.contract.lock import LOCK, locked
from limbeck.contract.progress import Later, about, before, leads, processes, say
from limbeck.contract.reading import reading
from limbeck.contract.recipe import AnyRecipe, Recipe, load_bench, parse_any_recipe
from limbeck.contract.sources.places import cache_folder

if TYPE_CHECKING:
    from serve_bench.tell.report import Report

RUN, LOG = "run.json", "log.jsonl"
# The artifact of each stage, in order.
FOLDERS = {"compress": "student", "export": "onnx", "bench": "bench"}


# Running ------------------------------------------------------------------------------------------


def default_folder(recipe: AnyRecipe) -> Path:
    """``runs/<name>-<digest8>`` under the working directory."""
    return Path("runs") / f"{recipe.name}-{recipe.digest[:8]}"


def run(recipe: AnyRecipe, *, out: Path | None = None) -> Report | None:
    """Run every stage of ``recipe`` that is not complete in the run folder ``out``, and report.

    Several processes (torchrun) share the training; the first one alone does the rest and returns
    the report. ``out`` defaults to `default_folder`. Raises `ArtifactError` when the folder belongs
    to another recipe or to no run, `RecipeError` listing every missing file or package or for a
    recovery by several processes, and whatever a stage raises.
    """
    from limbeck.runtime.session import import_onnxruntime

    _require_one_to_recover(recipe)
    products = require_inputs(recipe)
    import_onnxruntime()  # the second stage needs it: say so before the first has run for hours
    with open_run(recipe, out or default_folder(recipe)) as folder:
        expected = _expected_seconds(recipe, folder)
        for stage in FOLDERS:
            own = expected.pop(stage, None)
            rest = sum(expected.values())
            with before(partial(_constant, rest)):
                if stage == "compress" or leads():
                    _stage(stage, recipe, folder, products, shown=_shown(own, rest))
        return _tell(folder, recipe) if leads() else None


def _expected_seconds(recipe: AnyRecipe, folder: Path) -> dict[str, float]:
    """Estimated seconds of export and bench where they are not complete.

    That of the training is known once it runs.
    """
    from limbeck.app.plan import seconds_after_training

    left = [s for s, name in FOLDERS.items() if not (folder / name / MANIFEST).exists()]
    if not leads() or not left:
        return {}
    return {s: found for s, found in seconds_after_training(recipe).items() if s in left}


def _constant(seconds: float, _: float) -> float:
    return seconds


def _shown(own: float | None, rest: float) -> str:
    if own is None:
        return ""
    whole = f" (whole job: about {about(own + rest)})" if rest else ""
    return f": about {about(own)}{whole}"


def run_stage(
    stage: str, recipe: AnyRecipe, *, out: Path | None = None, reference: str = "RECIPE"
) -> Report | None:
    """Run one stage, ``compress``, ``export`` or ``bench``, in the run folder; after ``bench``,
    report.

    Raises `ArtifactError` naming the command to run first (with ``reference`` as its recipe) when
    an earlier stage is not complete there, `RecipeError` for a recovery by several processes, and
    whatever the stage raises.
    """
    if stage == "export":
        _require_one_to_recover(recipe)
    folder = out or default_folder(recipe)
    for earlier, name in FOLDERS.items():
        if earlier == stage:
            break
        if not (folder / name / MANIFEST).exists():
            where = f" --out {out}" if out else ""
            raise ArtifactError(
                f"{folder}: {stage} needs a complete {name}, which is missing; "
                f"run: limbeck {earlier} {reference}{where} (with the same --set, if any)"
            )
    products = None
    if stage == "compress":
        products = require_inputs(recipe, timed=False)
    elif not leads():
        return None
    with open_run(recipe, folder):
        _stage(stage, recipe, folder, products)
        return _tell(folder, recipe) if stage == "bench" else None


def _require_one_to_recover(recipe: AnyRecipe) -> None:
    """Raise `RecipeError` where the export may train, but other processes would not join it."""
    if processes() > 1 and recipe.recover is not None:
        raise RecipeError(
            f"{recipe.name}: export.recover: found {processes()} processes; the training through "
            "the rounding takes one. Let them share `limbeck compress`, then start `limbeck "
            "export` and `limbeck bench` without torchrun (or `limbeck run`, which goes on)."
        )


def _stage(
    stage: str, recipe: AnyRecipe, folder: Path, products: Products | None, *, shown: str = ""
) -> None:
    """Run one stage in a folder of ours; without ``products`` they are planned if needed.

    ``shown`` is an estimate of its time, for the heading.
    """
    out = folder / FOLDERS[stage]
    if stage == "compress":
        _distill("compress", recipe, folder, make_products(recipe, products))
    elif stage == "export":
        export_run(
            recipe,
            folder,
            timed=lambda title, made, work: _timed(
                title, folder, made, work, shown=shown if title == stage else ""
            ),
            products=lambda: make_products(recipe, products),
        )
    else:
        import export
        import serve_bench

        onnx = folder / "onnx"
        exported = open_artifact(onnx, kind="onnx", verify=False)
        _require_export_of(recipe, exported)
        if exported.result.get("failed"):
            export.require_shipped(exported, recipe)
        student = student_of(exported)
        _timed(
            stage,
            folder,
            out,
            lambda: serve_bench.bench(onnx=onnx, student=student, out=out, recipe=recipe),
            shown=shown,
        )


def _require_export_of(recipe: AnyRecipe, onnx: Artifact) -> None:
    """Raise `ArtifactError` if ``onnx`` is an export of an earlier state of ``recipe``.

    It remains in the run folder when a later export fails.
    """
    earlier = parse_any_recipe(onnx.manifest["recipe"]["resolved"], where=str(onnx.path))
    if earlier.exporting() != recipe.exporting():
        raise ArtifactError(
            f"{onnx.path}: was exported with other settings than this recipe's; "
            "run the export stage again."
        )


def is_target(name: str) -> bool:
    """Whether ``name``, given to `limbeck bench`, is something to time and no recipe."""
    return name.startswith(("http://", "https://", "hub:")) or Path(name.partition("#")[0]).is_dir()


def bench_targets(
    targets: Sequence[str], *, against: Sequence[str], out: Path | None, overrides: Sequence[str]
) -> None:
    """Time targets without a recipe; print a table. Raises `RecipeError` for a bad override."""
    from serve_bench.tasks.targets import measure_targets
    from serve_bench.tell.terminal import of_artifact

    bench = load_bench(overrides)
    folder = out or Path("runs") / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folders = [Path(target.partition("#")[0]) for target in (*targets, *against)]
    with disk_full_is_a_user_error(folder), reading(*(f for f in folders if f.is_dir())):
        made = measure_targets(targets, against=against, out=folder, bench=bench)
    print(f"{of_artifact(made)}\n\nsamples: {folder}", flush=True)


def make_products(recipe: AnyRecipe, products: Products | None = None) -> dict[str, Path]:
    """Make the students that ``recipe`` needs as teachers; their artifacts by teacher name."""
    from limbeck.app.plan import training_operations

    products = products or plan_products(recipe)
    left = [p.recipe for p in products.order if not (p.student / MANIFEST).exists()]
    # Planned operations by the recipe's digest; None with a budget in time.
    planned = [*left, recipe] if left and leads() else []
    costs = {each.digest: training_operations(each) for each in planned}
    for product in products.order:
        title = f"teacher {product.recipe.name}"
        own = costs.pop(product.recipe.digest, None)
        with (
            open_run(product.recipe, product.folder, wait=True),
            before(_in_proportion(own, list(costs.values()))),
        ):
            _distill(title, product.recipe, product.folder, product.artifacts)
    return products.artifacts


def _in_proportion(own: float | None, rest: Sequence[float | None]) -> Later:
    """Seconds of later trainings by their operations, if all are known."""
    known = [cost for cost in rest if cost is not None]
    if not own or len(known) < len(rest):
        return lambda _: None
    return lambda seconds: seconds * sum(known) / own


def ablate(
    recipe: AnyRecipe, *, arms: Sequence[str] | None, seeds: int, out: Path | None = None
) -> None:
    """Compare the recipe's fusion with its controls in ``<run folder>/ablation``; print the table
    and one sentence.

    Raises `RecipeError` for an unknown arm or fewer than two teachers, and whatever training
    raises.
    """
    from compress.ablate import ablate

    products = require_inputs(recipe, timed=False)
    with open_run(recipe, out or default_folder(recipe)) as folder:
        teachers = make_products(recipe, products)
        say("== ablation")
        found = ablate(
            recipe=recipe, products=teachers, out=folder / "ablation", arms=arms, seeds=seeds
        )
        print(
            f"{found['markdown']}\n\n{found['verdict']}\n"
            f"picture: {folder / 'ablation' / 'ablation.svg'}",
            flush=True,
        )


def cache(recipe: AnyRecipe, *, ray: str | None, workers: int, to: str | None = None) -> None:
    """Fill the teacher cache of ``recipe`` and print where it is and what it holds.

    ``to`` is the URL of the store; None: the recipe's.

    Raises `RecipeError` for an encoder, and as `compress.fill_cache`.
    """
    import compress

    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{recipe.name}: an encoder's teachers answer once, when its training begins; a cache "
            "is for language models."
        )
    recipe.require_cache()  # before its teachers are made
    if to is not None:
        tree = recipe.resolved()
        tree["training"]["teacher_cache"]["store"] = to
        made = parse_any_recipe(tree, where="--to")
        made._folder, recipe = recipe.folder, cast(Recipe, made)
    teachers = make_products(recipe, require_inputs(recipe, timed=False))
    shards = compress.fill_cache(recipe=recipe, products=teachers, ray=ray, workers=workers)
    place = recipe.store or cache_folder() / "teachers"
    print(f"teacher cache: {len(shards)} shards in {place}", flush=True)


def _distill(title: str, recipe: AnyRecipe, folder: Path, teachers: dict[str, Path]) -> None:
    import compress

    out = folder / "student"
    _timed(title, folder, out, lambda: compress.distill(recipe=recipe, out=out, products=teachers))


def _timed(
    title: str, folder: Path, out: Path, work: Callable[[], Artifact], *, shown: str = ""
) -> None:
    """Print the stage and its duration, and log it in the run folder."""
    say(f"== {title}{shown}")
    stamp, started, clock = _stamp(out), datetime.now(UTC), time.monotonic()
    with disk_full_is_a_user_error(out):
        work()
    seconds, skipped = time.monotonic() - clock, stamp is not None and _stamp(out) == stamp
    say(f"   {'already complete' if skipped else 'done'}, {_clock(seconds)}")
    entry = {
        "stage": title,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "skipped": skipped,
    }
    if not leads():
        return
    with disk_full_is_a_user_error(folder), (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")


def _stamp(artifact: Path) -> tuple[int, int] | None:
    """Identity of a manifest file, to see whether it was replaced."""
    try:
        status = (artifact / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _tell(folder: Path, recipe: AnyRecipe) -> Report:
    """Write the report; print its table, the verdict and its path."""
    import serve_bench

    with disk_full_is_a_user_error(folder), reading(folder):
        report = serve_bench.write_report(run=folder, recipe=recipe)
    print(f"{report.table}\n\nverdict: {report.verdict.status}\nreport:  {report.html}", flush=True)
    return report


def report(folder: Path) -> Report:
    """Draw the report of a run again. Raises `ArtifactError` if its measurement is incomplete."""
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; expected a run folder, such as runs/pico-1a2b3c4d."
        )
    bench = open_artifact(folder / "bench", kind="bench", verify=False)
    resolved = bench.manifest["recipe"]["resolved"]
    with locked(folder, wait=False):
        return _tell(folder, parse_any_recipe(resolved, where=str(folder / "bench")))


# Whose folder it is -------------------------------------------------------------------------------


@contextmanager
def open_run(recipe: AnyRecipe, folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Hold the run folder of ``recipe``: make it, or take the one it made earlier, and keep others
    out meanwhile.

    ``wait`` waits for another run that holds it, which otherwise is an error. Raises
    `ArtifactError` when the folder belongs to another recipe or holds something that is no run,
    `EnvironmentalError` when it cannot be written. Of several processes of one job the first holds
    it for all.
    """
    if not leads():
        yield folder
        return
    require_utf8(folder)
    with disk_full_is_a_user_error(folder), unwritable_is_a_user_error(folder):
        # Check before a lock file goes into a folder that may be someone else's.
        _require_ours(recipe, folder)
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=wait):
        _require_ours(recipe, folder)
        if not (folder / RUN).exists() or read_json(folder / RUN)["digest"] != recipe.digest:
            claim = {
                "recipe": recipe.name,
                "digest": recipe.digest,
                "resolved": recipe.distillation(),
            }
            write_atomically(folder / RUN, json.dumps(claim, indent=1))
        yield folder


def _require_ours(recipe: AnyRecipe, folder: Path) -> None:
    if not folder.exists():
        for parent in folder.parents:
            if parent.exists() and not parent.is_dir():
                raise ArtifactError(
                    f"{folder}: {parent} is a file, not a folder; name another with --out."
                )
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file, not a folder; name another with --out.")
    try:
        claim = read_json(folder / RUN)
        name, digest = str(claim["recipe"]), str(claim["digest"])
    except FileNotFoundError:
        names = {entry.name for entry in folder.iterdir()}
        if RUN in names:  # another start has written it meanwhile
            _require_ours(recipe, folder)
            return
        # Another process may be about to write RUN, or was killed before it did.
        if any(name != LOCK and not is_temporary(name) for name in names):
            raise ArtifactError(
                f"{folder}: holds files but no run of Limbeck ({RUN} is missing); name an "
                "empty or new folder with --out."
            ) from None
        return
    except (ArtifactError, KeyError, TypeError):
        raise ArtifactError(
            f"{folder / RUN}: not what Limbeck writes; name another folder with --out."
        ) from None
    # A run that failed before it made anything has no claim to keep.
    if digest != recipe.digest and {entry.name for entry in folder.iterdir()} - {RUN, LOCK}:
        raise ArtifactError(
            f"{folder}: belongs to another recipe: found {name} ({digest[:8]}), expected "
            f"{recipe.name} ({recipe.digest[:8]}). Leave --out away or name another folder; a "
            "change of teachers, data, student, fusion, features, training or seed makes another "
            "recipe."
        )
