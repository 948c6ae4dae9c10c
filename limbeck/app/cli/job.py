"""Commands that do the job: the whole of it, one stage, the ablation, the search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.app.cli.base import at_home, command, load, names_in
from limbeck.app.cli.options import KeyOption, OutOption, RecipeArgument, SetOption, ShrinkOption
from limbeck.contract.errors import RecipeError


@command("run")
def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
    keys: KeyOption = None,
) -> None:
    """Do the whole job: distil, export, measure, report. Goes on where an earlier run of the same
    recipe stopped.

    \b
    Examples:
      limbeck run smollm2/135m-two-experts
      limbeck run my-recipe.yaml --out runs/mine --set training.tokens=20480
      limbeck run qwen3/0.6b-from-8b-4b --shrink-to pico
    """
    from limbeck.app import run as pipeline

    report = pipeline.run(load(recipe, overrides, shrink, keys), out=out)
    raise typer.Exit(report.exit_code if report else 0)


@command("compress")
def compress(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Stage 1: distil the student from its teachers; teachers that other recipes make are made
    first.

    \b
    Example:
      limbeck compress my-recipe.yaml
    """
    _stage("compress", recipe, out, overrides, shrink)


@command("export")
def export(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Stage 2: turn the distilled student into ONNX graphs, quantise them, and check them against
    the student.

    \b
    Example:
      limbeck export my-recipe.yaml
    """
    _stage("export", recipe, out, overrides, shrink)


@command("bench")
def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|TARGET...",
            help="One recipe; or what to time: a run, an exported folder (#FORM picks a form), "
            "a model folder, hub:OWNER/NAME, or the URL of an OpenAI-compatible server.",
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="TARGET", help="What to compare the first target with. Repeatable."
        ),
    ] = None,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
    keys: KeyOption = None,
) -> None:
    """Stage 3: measure teachers, student and ONNX graphs here, and give the verdict. Or time
    anything, without a recipe.

    Without a recipe, --out is the folder of the result (default: runs/bench-DATE) and --set changes
    a field of bench, such as bench.prompt_tokens, bench.new_tokens, bench.threads, bench.minutes or
    bench.scenarios.

    \b
    Examples:
      limbeck bench my-recipe.yaml --set bench.minutes=10
      limbeck bench runs/pico-1a2b3c4d --against models/mine --set bench.new_tokens=32
      limbeck bench http://127.0.0.1:8000 --set "bench.scenarios=[single, server]"
    """
    from limbeck.app import run as pipeline
    from limbeck.contract.recipe import allow_keys

    targets, against = [at_home(t) for t in targets], [at_home(t) for t in against or ()]
    if len(targets) > 1 or against or pipeline.is_target(targets[0]):
        if shrink is not None:
            raise RecipeError(
                "--shrink-to: only a recipe can be shrunk, and none is given here; leave it out."
            )
        allow_keys(keys or ())
        pipeline.bench_targets(targets, against=against, out=out, overrides=overrides or ())
        return
    _stage("bench", targets[0], out, overrides, shrink, keys)


def _stage(
    name: str,
    reference: str,
    out: Path | None,
    overrides: list[str] | None,
    shrink: str | None,
    keys: list[str] | None = None,
) -> None:
    from limbeck.app import run as pipeline

    recipe = load(reference, overrides, shrink, keys)
    report = pipeline.run_stage(name, recipe, out=out, reference=reference)
    raise typer.Exit(report.exit_code if report else 0)


@command("ablate")
def ablate(
    recipe: RecipeArgument,
    arms: Annotated[
        str, typer.Option("--arms", help="Arms to train, separated by commas. Default: all.")
    ] = "",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Seeds each arm is trained with.")
    ] = 3,
    out: OutOption = None,
    overrides: SetOption = None,
) -> None:
    """Does the fusion earn its keep? Train it and its controls on equal tokens, and compare on
    held-out text.

    Controls: cross-entropy only, also for equal seconds; best single teacher, uniform, static,
    entropy in its forms, inverted, shuffled, label oracle, merges of the teachers, and each domain
    answered by its best teacher. On request: single-NAME for one teacher of the recipe, and
    across-chunk and across-uld for the other losses across tokenizers. ARM@base and ARM@merge
    choose where an arm starts. Teachers run once; an interrupted comparison goes on where it
    stopped.

    \b
    Example:
      limbeck ablate smollm2/135m-two-experts --arms uniform,entropy-token,label-sequence --seeds 3
    """
    from limbeck.app import run as pipeline
    from limbeck.contract.recipe import load_any_recipe

    pipeline.ablate(
        load_any_recipe(recipe, overrides=overrides or ()),
        arms=names_in(arms) or None,
        seeds=seeds,
        out=out,
    )


@command("cache")
def cache(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            help="Address of a Ray cluster that shares the cache folder, or `local`. Default: this "
            "process.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Workers on Ray; each loads the teachers.")
    ] = 2,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="URL",
            help="Copy the cache to a folder that machines share, such as s3://bucket/folder; sets "
            "training.teacher_cache.store.",
        ),
    ] = None,
) -> None:
    """Let the teachers read, ahead of a training, what it will ask them for. Goes on where an
    earlier call stopped.

    `limbeck run` finds the cache by its content. It is the same whatever the number of workers and
    whichever of them died, if each has as many threads (training.threads).

    \b
    Examples:
      limbeck cache my-recipe.yaml
      limbeck cache my-recipe.yaml --ray local --workers 2 --set training.threads=1
      limbeck cache my-recipe.yaml --to s3://my-bucket/teachers
    """
    from limbeck.app import run as pipeline

    pipeline.cache(load(recipe, overrides), ray=ray, workers=workers, to=to)


@command("search")
def search(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the search. Default: runs/search-NAME-DIGEST."),
    ] = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="What searches on several machines share: postgresql://USER@HOST/DATABASE or "
            "journal:///FOLDER/FILE.log. Default: a file in the folder of the search.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            help="Address of a Ray cluster whose workers search, or `local`. Default: this "
            "process.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Workers on Ray.")] = 2,
) -> None:
    """Find the best student within a budget: plan, time a few exports, distil in rounds, measure
    the finalists.

    The budget is the recipe's: size_mb, quality.max_loss, hours, and tpot_ms and ttft_ms of a
    language model or latency_ms of an encoder. Writes chosen.yaml, a recipe that stands alone, or
    nearest.yaml and which bound cannot be kept. An interrupted search goes on, and an undecided one
    too when it gets more budget.hours or bench.minutes; a second one in the same folder or storage
    shares the work. Exit codes: 0 chosen, 1 no student keeps the budget, 3 undecided (more
    bench.minutes or budget.hours needed).

    \b
    Example:
      limbeck search smollm2/135m-two-experts --set budget.size_mb=120 --set budget.tpot_ms=8
      limbeck search minilm/spam-two-classifiers --set budget.size_mb=20 --set budget.latency_ms=5
      limbeck search my-recipe.yaml --storage postgresql://limbeck@10.0.0.5/searches
      limbeck search my-recipe.yaml --ray 10.0.0.5:6379 --workers 8
    """
    from limbeck.app.search import search as run_search
    from limbeck.app.search.outcome import show

    asked = load(recipe, overrides, shrink)
    if ray is None:
        found = run_search(asked, out=out, storage=storage)
    else:
        from limbeck.app.search.on_ray import search_on_ray

        found = search_on_ray(asked, out=out, storage=storage, address=ray, workers=workers)
    show(found)
    raise typer.Exit(found.exit_code)
