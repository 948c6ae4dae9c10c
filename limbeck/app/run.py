"""The order of the stages: what is made first, in which folder, and what is told on the way.

Knows recipes, folders and the three stage functions, which it imports when it calls them; each stage decides for itself
whether there is anything to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.app.exports import PLAIN, SECOND, SHIPPED, export_run
from limbeck.contract.artifact import MANIFEST, RECOVERED, Artifact, open_artifact, student_of
from limbeck.contract.errors import ArtifactError, LimbeckError, QualityError, RecipeError
from limbeck.contract.files import (
    disk_full_is_a_user_error,
    is_temporary,
    read_json,
    unwritable_is_a_user_error,
    write_atomically,
)
from limbeck.contract.lock import LOCK, locked
from limbeck.contract.progress import leads, processes, say
from limbeck.contract.recipe import (
    AnyRecipe,
    Recipe,
    RecipeModel,
    find_recipe,
    load_bench,
    load_teacher_recipe,
    parse_any_recipe,
)

if TYPE_CHECKING:
    from serve_bench.tell.report import Report

RUN, LOG = "run.json", "log.jsonl"
_FOLDERS = {
    "compress": "student",
    "export": "onnx",
    "bench": "bench",
}  # stage -> what it writes, in order


@dataclass(frozen=True)
class Product:
    """The student of another recipe, to be made before the recipe that teaches with it."""

    recipe: AnyRecipe
    folder: Path  # its run folder
    teachers: dict[
        str, Path
    ]  # name of each teacher that is itself a product -> its student artifact


# What has to be made ---------------------------------------------------------------------------------------------


def default_folder(recipe: AnyRecipe) -> Path:
    """``runs/<name>-<digest8>`` under the working directory."""
    return Path("runs") / f"{recipe.name}-{recipe.digest[:8]}"


def plan(recipe: AnyRecipe) -> tuple[list[Product], dict[str, Path]]:
    """Products that ``recipe`` needs, in the order they are made, and its own teachers among them by name.

    Raises `RecipeError` listing every teacher recipe that is missing, wrong, or made from itself.
    """
    products, teachers, errors = _plan(recipe)
    if errors:
        raise RecipeError(
            "\n".join(
                [f"{recipe.name}: its teachers cannot be made", *(f"  {line}" for line in errors)]
            )
        )
    return products, teachers


def _plan(recipe: AnyRecipe) -> tuple[list[Product], dict[str, Path], list[str]]:
    products: dict[Path, Product] = {}
    errors: list[str] = []
    teachers = _teachers_of(recipe, products, errors, chain=(), where="")
    return list(products.values()), teachers, errors


def _teachers_of(
    recipe: AnyRecipe,
    products: dict[Path, Product],
    errors: list[str],
    *,
    chain: tuple[Path, ...],
    where: str,
) -> dict[str, Path]:
    """Student artifacts of the teachers that are products; adds those to ``products``, teachers before pupils."""
    from limbeck.contract.sources import cache_folder

    teachers = {}
    for index, (name, model) in enumerate(recipe.teacher_models.items()):
        if not isinstance(model, RecipeModel):
            continue
        here = f"{where}teachers.{index}"
        try:
            path = find_recipe(model.recipe, folder=recipe.folder)
            if path in chain:
                circle = " -> ".join(p.stem for p in (*chain[chain.index(path) :], path))
                raise RecipeError(
                    f"a recipe that is made from itself ({circle}); name another model for one of them."
                )
            made = load_teacher_recipe(path, of=recipe)
        except RecipeError as error:
            errors.append(f"{here}: {error}")
            continue
        inner = _teachers_of(
            made, products, errors, chain=(*chain, path), where=f"{here} ({made.name}): "
        )
        folder = cache_folder() / "products" / f"{made.name}-{made.digest[:8]}"
        products.setdefault(folder, Product(made, folder, inner))
        teachers[name] = folder / "student"
    return teachers


def mistakes(recipe: AnyRecipe) -> list[str]:
    """What is wrong with ``recipe`` on this machine, and with the recipes of its teachers: each line one mistake.

    Files and packages that are missing, and teacher recipes that are missing, wrong, or made from themselves.
    """
    from limbeck.contract.sources import preflight

    products, _, errors = _plan(recipe)
    found = preflight(recipe) + errors
    for product in products:
        found += [f"{product.recipe.name}: {line}" for line in preflight(product.recipe)]
    return list(dict.fromkeys(found))


# Running ---------------------------------------------------------------------------------------------------------


def run(recipe: AnyRecipe, *, out: Path | None = None) -> Report | None:
    """Run every stage of ``recipe`` that is not complete in the run folder ``out``, and report.

    Several processes (torchrun) share the training; the first one alone does the rest, and has the report. ``out`` defaults to `default_folder`. Raises `ArtifactError` when the folder belongs to another recipe or to no run,
    `RecipeError` listing every missing file or package or for a recovery by several processes, and whatever a stage raises.
    """
    from limbeck.runtime.session import import_onnxruntime

    _require_one_to_recover(recipe)
    require_inputs(recipe)
    import_onnxruntime()  # the second stage needs it: better to hear of it before the first one has run for long
    with open_run(recipe, out or default_folder(recipe)) as folder:
        for stage in _FOLDERS:
            if stage == "compress" or leads():
                _stage(stage, recipe, folder)
        return _tell(folder, recipe) if leads() else None


def run_stage(
    stage: str, recipe: AnyRecipe, *, out: Path | None = None, reference: str = "RECIPE"
) -> Report | None:
    """Run one stage, ``compress``, ``export`` or ``bench``, in the run folder; after ``bench``, report.

    Raises `ArtifactError` naming the command to run first (with ``reference`` as its recipe) when an earlier stage is not
    complete there, `RecipeError` for a recovery by several processes, and whatever the stage raises.
    """
    if stage == "export":
        _require_one_to_recover(recipe)
    folder = out or default_folder(recipe)
    for earlier, name in _FOLDERS.items():
        if earlier == stage:
            break
        if not (folder / name / MANIFEST).exists():
            where = f" --out {out}" if out else ""
            raise ArtifactError(
                f"{folder}: {stage} needs a complete {name}, which is not there; run: limbeck {earlier} {reference}{where} "
                "(with the same --set, if any)"
            )
    if stage == "compress":
        require_inputs(recipe)
    elif not leads():
        return None
    with open_run(recipe, folder):
        _stage(stage, recipe, folder)
        return _tell(folder, recipe) if stage == "bench" else None


def require_inputs(recipe: AnyRecipe) -> None:
    """Raise `RecipeError` listing every file or package that ``recipe`` lacks on this machine."""
    missing = mistakes(recipe)
    if missing:
        raise RecipeError(
            "\n".join([f"{recipe.name}: cannot run here", *(f"  {line}" for line in missing)])
        )


def _require_one_to_recover(recipe: AnyRecipe) -> None:
    """Raise `RecipeError` where the export may train and others would have left: each process would wait for all."""
    if processes() > 1 and isinstance(recipe, Recipe) and recipe.export.recover is not None:
        raise RecipeError(
            f"{recipe.name}: export.recover: found {processes()} processes; the training through the rounding takes one. Let them "
            "share `limbeck compress`, then start `limbeck export` and `limbeck bench` without torchrun (or `limbeck run`, which goes on)."
        )


def _stage(stage: str, recipe: AnyRecipe, folder: Path) -> None:
    """Run one stage of a folder that is ours."""
    out = folder / _FOLDERS[stage]
    if stage == "compress":
        _distill("compress", recipe, folder, make_products(recipe))
    elif stage == "export":
        export_run(
            recipe,
            folder,
            timed=lambda title, made, work: _timed(title, folder, made, work),
            products=lambda: make_products(recipe),
        )
    else:
        import serve_bench

        onnx = folder / "onnx"
        student = student_of(open_artifact(onnx, kind="onnx", verify=False))
        _timed(
            stage,
            folder,
            out,
            lambda: serve_bench.bench(onnx=onnx, student=student, out=out, recipe=recipe),
        )


def is_target(name: str) -> bool:
    """Whether ``name``, given to `limbeck bench`, is something to time and no recipe."""
    return name.startswith(("http://", "https://", "hub:")) or Path(name.partition("#")[0]).is_dir()


def bench_targets(
    targets: Sequence[str], *, against: Sequence[str], out: Path | None, overrides: Sequence[str]
) -> None:
    """Time targets without a recipe into ``out``, and print their table. Raises `RecipeError` for an override outside `bench`."""
    import serve_bench

    bench = load_bench(overrides)
    folder = out or Path("runs") / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with disk_full_is_a_user_error(folder):
        made = serve_bench.measure_targets(targets, against=against, out=folder, bench=bench)
    print(f"{serve_bench.table(made)}\n\nsamples: {folder}", flush=True)


def make_products(recipe: AnyRecipe) -> dict[str, Path]:
    """Make the students of other recipes that ``recipe`` learns from; their artifacts by teacher name."""
    products, teachers = plan(recipe)
    for product in products:
        with open_run(product.recipe, product.folder, wait=True):
            _distill(
                f"teacher {product.recipe.name}", product.recipe, product.folder, product.teachers
            )
    return teachers


def ablate(
    recipe: Recipe, *, arms: Sequence[str] | None, seeds: int, out: Path | None = None
) -> None:
    """Compare the recipe's fusion with its controls in ``<run folder>/ablation``; print the table and one sentence.

    Raises `RecipeError` for an unknown arm or fewer than two teachers, and whatever training raises.
    """
    from compress.ablate import ARMS, ablate, markdown

    require_inputs(recipe)
    with open_run(recipe, out or default_folder(recipe)) as folder:
        teachers = make_products(recipe)
        say("== ablation")
        found = ablate(
            recipe=recipe,
            products=teachers,
            out=folder / "ablation",
            arms=arms or tuple(ARMS),
            seeds=seeds,
        )
        print(
            f"{markdown(found['arms'])}\n\n{found['verdict']}\npicture: {folder / 'ablation' / 'ablation.svg'}",
            flush=True,
        )


def _distill(title: str, recipe: AnyRecipe, folder: Path, teachers: dict[str, Path]) -> None:
    import compress

    out = folder / "student"
    _timed(title, folder, out, lambda: compress.distill(recipe=recipe, out=out, products=teachers))


def _timed(title: str, folder: Path, out: Path, work: Callable[[], Artifact]) -> None:
    """Say what is being done and how long it took, and log it in the run folder."""
    say(f"== {title}")
    before, started, clock = _stamp(out), datetime.now(UTC), time.monotonic()
    with disk_full_is_a_user_error(out):
        work()
    seconds, skipped = time.monotonic() - clock, before is not None and _stamp(out) == before
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
    """What tells a manifest from one that replaced it."""
    try:
        status = (artifact / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _tell(folder: Path, recipe: AnyRecipe) -> Report:
    """Write the report, and print its table, the verdict and where it is."""
    import serve_bench

    with disk_full_is_a_user_error(folder):
        report = serve_bench.write_report(run=folder, recipe=recipe)
    print(f"{report.table}\n\nverdict: {report.verdict.status}\nreport:  {report.html}", flush=True)
    return report


def report(folder: Path) -> Report:
    """Draw the report of the run in ``folder`` again. Raises `ArtifactError` when its measurement is not complete."""
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; expected a run folder, such as runs/pico-1a2b3c4d."
        )
    bench = open_artifact(folder / "bench", kind="bench", verify=False)
    resolved = bench.manifest["recipe"]["resolved"]
    with locked(folder, wait=False):
        return _tell(folder, parse_any_recipe(resolved, where=str(folder / "bench")))


def compare(
    before: Path,
    after: Path,
    *,
    tolerances: Mapping[str, float],
    across_machines: bool,
    as_json: bool = False,
) -> int:
    """Print what two runs differ in, Markdown or JSON; the exit code: 0 no regression, 1 regression, 3 undecided."""
    from serve_bench import compare_runs
    from serve_bench.judge.compare import as_json as to_json
    from serve_bench.judge.compare import markdown

    found = compare_runs(before, after, tolerances=tolerances, across_machines=across_machines)
    print(json.dumps(to_json(found), indent=1) if as_json else markdown(found), flush=True)
    return found.exit_code


# Whose folder it is ----------------------------------------------------------------------------------------------


@contextmanager
def open_run(recipe: AnyRecipe, folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Hold the run folder of ``recipe``: make it, or take the one it made earlier, and keep others out meanwhile.

    ``wait`` waits for another run that holds it, which otherwise is an error. Raises `ArtifactError` when the folder belongs
    to another recipe or holds something that is no run, `EnvironmentalError` when it cannot be written.
    Of several processes of one job the first holds it for all.
    """
    if not leads():
        yield folder
        return
    _require_ours(
        recipe, folder
    )  # before a lock file is put into what may be someone else's folder
    with disk_full_is_a_user_error(folder), unwritable_is_a_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=wait):
        _require_ours(recipe, folder)
        if not (folder / RUN).exists():
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
        # Another start, or one that was killed, may be about to write RUN.
        if any(entry.name != LOCK and not is_temporary(entry.name) for entry in folder.iterdir()):
            raise ArtifactError(
                f"{folder}: holds files but no run of Limbeck ({RUN} is missing); name an empty or new folder with --out."
            ) from None
        return
    except (ArtifactError, KeyError, TypeError):
        raise ArtifactError(
            f"{folder / RUN}: not what Limbeck writes; name another folder with --out."
        ) from None
    if digest != recipe.digest:
        raise ArtifactError(
            f"{folder}: belongs to another recipe: found {name} ({digest[:8]}), expected {recipe.name} ({recipe.digest[:8]}). "
            "Leave --out away or name another folder; a change of teachers, data, student, fusion, features, training or seed "
            "makes another recipe."
        )


# Checking what was made ------------------------------------------------------------------------------------------


def verify(path: Path, *, quality: bool = True, speed: bool = True) -> int:
    """Check every artifact at ``path``, an artifact or a run folder, print tables, and return the exit code.

    The certificate of a run is replayed; ``quality`` and ``speed`` say which of its figures are measured again. 0 when all
    holds; 1 when a graph no longer computes what the student computed, or a promise of the certificate is not kept; 2 when a file is changed, missing or extra,
    or an artifact was made from another one than stands beside it. Raises `ArtifactError` when there is no artifact at all.
    """
    folders = [path] if (path / MANIFEST).exists() else [path / name for name in _FOLDERS.values()]
    if folders != [path]:
        shipped = (path / SHIPPED).resolve()
        beside = (path / name for name in (RECOVERED, PLAIN, SECOND))
        others = [f for f in beside if (f / MANIFEST).exists() and f.resolve() != shipped]
        folders[1:1] = others  # before what was made from them
    if not any((folder / MANIFEST).exists() for folder in folders):
        raise ArtifactError(
            f"{path}: no complete artifact here; expected an artifact or a run folder."
        )
    artifacts: list[Artifact] = []
    complaints: list[LimbeckError] = []
    rows = [["artifact", "kind", "files", "result"]]
    for folder in folders:
        if not (folder / MANIFEST).exists():
            rows.append([folder.name, "", "", "not made yet"])
            continue
        try:
            artifact = open_artifact(folder)
            _require_parents(artifact, artifacts)
        except ArtifactError as error:
            complaints.append(error)
            rows.append([folder.name, "", "", "BROKEN"])
        else:
            artifacts.append(artifact)
            rows.append(
                [folder.name, artifact.kind, str(len(artifact.manifest["files"])), "unchanged"]
            )
    _print_table(rows)
    for artifact in artifacts:
        if artifact.kind == "onnx":
            complaints += _verify_graphs(artifact)
    certified = {
        artifact.kind for artifact in artifacts if "task" not in artifact.result
    }  # encoders have no certificate
    if {"onnx", "bench"} <= certified:
        complaints += _replay(path, quality=quality, speed=speed)
    for complaint in complaints:
        print(f"\n{complaint}")
    code = max((complaint.exit_code for complaint in complaints), default=0)
    print("\nNOT verified" if code else "\nverified")
    return code


def _require_parents(artifact: Artifact, beside: Sequence[Artifact]) -> None:
    for role, digest in artifact.manifest["parents"].items():
        same = [other for other in beside if other.kind == role]
        if same and all(other.digest != digest for other in same):
            raise ArtifactError(
                f"{artifact.path}: was made from another {role} than the one in {same[-1].path}; run its stage again."
            )


def _verify_graphs(artifact: Artifact) -> list[LimbeckError]:
    """Measure parity again, print it, and return what is wrong."""
    import export

    say(f"   running the graphs of {artifact.path.name} again on this machine")
    try:
        measured = export.verify_parity(artifact.path)
    except LimbeckError as error:
        return [error]
    rows = [["form", "positions", "largest logit difference", "KL, nats", "same first choice"]]
    if "task" in artifact.result:  # of an encoder
        rows = [["form", "examples", "largest difference", "alike"]]
    for form, parity in measured.items():
        if "task" in artifact.result:
            rows.append(
                [form, str(parity["rows"]), f"{parity['max_abs']:.3g}", f"{parity['alike']:.1%}"]
            )
            continue
        figures = f"{parity['max_abs']:.3g}", f"{parity['kl']:.3g}", f"{parity['top1']:.1%}"
        rows.append([form, str(parity["positions"]), *figures])
    print()
    _print_table(rows)
    return []


def _replay(run: Path, *, quality: bool, speed: bool) -> list[LimbeckError]:
    """Measure what the certificate promises, print it, and return what is wrong."""
    import serve_bench

    if not (run / "certificate.json").exists():
        return [
            ArtifactError(
                f"{run}: certificate.json is missing; `limbeck report {run}` writes it again."
            )
        ]
    try:
        findings = serve_bench.replay(run=run, quality=quality, speed=speed)
    except LimbeckError as error:
        return [error]
    rows = [["figure", "certificate", "now", ""]]
    rows += [[found.figure, found.promised, found.found, found.says] for found in findings]
    print()
    _print_table(rows)
    return [
        QualityError(f"certificate: {found.figure} {found.says}.")
        for found in findings
        if not found.holds
    ]


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
