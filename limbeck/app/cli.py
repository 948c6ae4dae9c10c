"""The command line. Reads arguments, calls one function a command, and turns errors into messages and exit codes.

Everything heavier than typer is imported inside the command that needs it, so that help answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from limbeck import __version__
from limbeck.contract.errors import LimbeckError, RecipeError
from limbeck.contract.process import end_with_parent
from serve_bench.serve.limits import Limits

if TYPE_CHECKING:
    from limbeck.contract.recipe import AnyRecipe, Recipe

_STOPPED = "stopped; run the same command again to go on"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the work is, so that everything is put away as it is on Ctrl-C."""


class Commands(TyperGroup):
    """The commands, with every error a user can meet turned into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except LimbeckError as error:
            print(f"limbeck: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            print(f"\n{_STOPPED}", file=sys.stderr)
            raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None
        except BrokenPipeError:
            # Whoever read our output has left. Nothing more can be told, not even by the interpreter on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of the `limbeck` command."""
    end_with_parent()
    try:
        signal.signal(signal.SIGTERM, _terminate)
        app(prog_name="limbeck")
    except KeyboardInterrupt as stop:  # before a command was reached
        print(f"\n{_STOPPED}", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _version(wanted: bool) -> None:
    if wanted:
        print(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Several teacher language models and one recipe in; one small, quantised, measured student out.

    A recipe is a YAML file that names the teachers, the text, the student and what must hold before it ships.
    `limbeck run` does the whole job and ends with a verdict and a report; a second run goes on where the first one
    stopped.

    \b
    Start here:
      limbeck doctor                            can this machine do it?
      limbeck recipes                           what is there to run?
      limbeck run pico                          a smoke test on tiny random models
      limbeck run smollm2/135m-two-experts      the demo, on real models and real text

    \b
    Exit codes: 0 done and every gate passed, 1 done but not good enough, 2 a mistake in what was given,
    3 undecided (more measuring time is needed), 130 stopped by Ctrl-C.
    """


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or a name from `limbeck recipes`.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Run folder. Without it: runs/NAME-DIGEST in the working directory.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one field of the recipe, such as training.tokens=20480 or teachers.0.quantize=int8. Repeatable.",
        show_default=False,
    ),
]
ShrinkOption = Annotated[
    str | None,
    typer.Option(
        "--shrink-to",
        metavar="pico",
        help="Try the recipe out: tiny random models of the same architectures, built-in text, a few steps.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads. Without it: every core available.",
        show_default=False,
    ),
]


# Recipes ---------------------------------------------------------------------------------------------------------


@app.command("recipes")
def recipes(
    max_mb: Annotated[
        float | None,
        typer.Option(
            "--max-mb",
            min=0,
            help="Only students of at most this many MB, as shipped.",
            show_default=False,
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Only recipes that train on a CPU.")] = False,
    family: Annotated[
        str | None,
        typer.Option(
            "--family", help="Only one model family, such as smollm2.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes that come with Limbeck by the size of what they ship, the smallest first.

    \b
    Examples:
      limbeck recipes
      limbeck recipes --max-mb 150 --cpu
    """
    from limbeck.app.library import library

    entries = library(max_mb=max_mb, cpu=cpu, family=family)
    if as_json:
        rows = [
            {
                "name": entry.name,
                "family": entry.family,
                "megabytes": entry.megabytes,
                "device": entry.device,
                "description": entry.recipe.description,
                "task": entry.recipe.task,
                "teachers": [t.name for t in entry.recipe.teachers],
                "student": entry.recipe.student.kind,
                "forms": [form.kind for form in entry.recipe.export.forms],
                "about": entry.about,
                "path": str(entry.path),
            }
            for entry in entries
        ]
        print(json.dumps(rows, indent=1))
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(
            f"{entry.name:{width}}  {entry.megabytes:6g} MB  {entry.device:4}  {entry.recipe.description}"
        )
    print(
        "\nlimbeck run NAME runs one; the comment at the top of its file says what it needs.",
        file=sys.stderr,
    )


@app.command("validate")
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...", help="Recipe files or shipped names.", show_default=False
        ),
    ],
    overrides: SetOption = None,
) -> None:
    """Check recipes, and that the files and packages they name are on this machine. Runs nothing.

    Every mistake of every file is reported at once; exit code 2 if there is any.

    \b
    Example:
      limbeck validate my-recipe.yaml smollm2/135m-two-experts
    """
    from limbeck.app.run import mistakes
    from limbeck.contract.recipe import load_any_recipe

    bad = 0
    for reference in recipes:
        try:
            recipe = load_any_recipe(reference, overrides=overrides or ())
            found = mistakes(recipe)
        except LimbeckError as error:
            print(f"{error}", file=sys.stderr)
            bad += 1
            continue
        if found:
            count = "1 thing is" if len(found) == 1 else f"{len(found)} things are"
            print(
                "\n".join([f"{reference}: {count} missing here", *(f"  {line}" for line in found)]),
                file=sys.stderr,
            )
            bad += 1
        else:
            print(f"{reference}: valid; {recipe.name}, digest {recipe.digest[:8]}")
    if bad:
        raise typer.Exit(2)


@app.command("init")
def init(
    teacher: Annotated[
        list[str],
        typer.Option(
            "--teacher",
            help="A model folder, .gguf file, hub id or recipe. Repeatable.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="A text file; quality is reported by file. Repeatable.",
            show_default=False,
        ),
    ],
    target_mb: Annotated[
        float,
        typer.Option(
            "--target-mb", min=0, help="Largest size of what is shipped, in MB.", show_default=False
        ),
    ],
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            help="Model the student starts from. Without it: the smallest teacher.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a short recipe for your own teachers, text and target size; the student is chosen by what fits.

    \b
    Example:
      limbeck init --teacher models/legal --teacher models/medical --data text.txt --target-mb 150
    """
    from limbeck.app.init import write_recipe

    choice = write_recipe(
        teachers=teacher, texts=data, target_mb=target_mb, student=student, out=out
    )
    caution = f"{choice.caution}\n" if choice.caution else ""
    print(
        f"{out}: {choice.why}; about {choice.megabytes:.1f} MB as {choice.form}\n{caution}next: limbeck run {out}"
    )


@app.command("plan")
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
    trial: Annotated[
        bool,
        typer.Option(
            "--trial", help="Time the student's layers here for ten seconds, and estimate the time."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe takes and gives before any weights are loaded: parameters, sizes, memory, operations, time.

    Needs the configuration of every model, which for a hub model means its config.json.

    \b
    Example:
      limbeck plan smollm2/135m-two-experts --trial
    """
    from limbeck.app.plan import plan_recipe

    found = plan_recipe(_load_any(recipe, overrides, shrink), trial=trial)
    print(json.dumps(found.as_json(), indent=1) if as_json else found.as_text())


# The job ---------------------------------------------------------------------------------------------------------


@app.command("run")
def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Do the whole job: distil, export, measure, report. Goes on where an earlier run of the same recipe stopped.

    \b
    Examples:
      limbeck run smollm2/135m-two-experts
      limbeck run my-recipe.yaml --out runs/mine --set training.tokens=20480
      limbeck run qwen3/0.6b-from-8b-4b --shrink-to pico
    """
    from limbeck.app import run as pipeline

    report = pipeline.run(_load_any(recipe, overrides, shrink), out=out)
    raise typer.Exit(report.exit_code if report else 0)


@app.command("compress")
def compress(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Stage 1: distil the student from its teachers, which are made first where they are products of other recipes.

    \b
    Example:
      limbeck compress my-recipe.yaml
    """
    _stage("compress", recipe, out, overrides, shrink)


@app.command("export")
def export(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Stage 2: turn the distilled student into ONNX graphs, quantise them, and check them against the student.

    \b
    Example:
      limbeck export my-recipe.yaml
    """
    _stage("export", recipe, out, overrides, shrink)


@app.command("bench")
def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|TARGET...",
            help="One recipe; or, without one, what to time: a run, an exported folder (#FORM picks a form), a model folder, "
            "hub:OWNER/NAME, or the URL of an OpenAI-compatible server.",
            show_default=False,
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="TARGET",
            help="What to compare the first target with. Repeatable.",
            show_default=False,
        ),
    ] = None,
    out: OutOption = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Stage 3: measure teachers, student and ONNX graphs on this machine, and give the verdict. Or time anything, without a recipe.

    Without a recipe, --out is the folder of the result (else runs/bench-DATE) and --set changes a field of bench, such as
    bench.prompt_tokens, bench.new_tokens, bench.threads, bench.minutes or bench.scenarios.

    \b
    Examples:
      limbeck bench my-recipe.yaml --set bench.minutes=10
      limbeck bench runs/pico-1a2b3c4d --against models/mine --set bench.new_tokens=32
      limbeck bench http://127.0.0.1:8000 --set "bench.scenarios=[single, server]"
    """
    from limbeck.app import run as pipeline

    if len(targets) > 1 or against or pipeline.is_target(targets[0]):
        if shrink is not None:
            raise RecipeError(
                "--shrink-to: only a recipe can be shrunk, and none is given here; leave it out."
            )
        pipeline.bench_targets(targets, against=against or (), out=out, overrides=overrides or ())
        return
    _stage("bench", targets[0], out, overrides, shrink)


@app.command("ablate")
def ablate(
    recipe: RecipeArgument,
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            help="Arms to train, separated by commas. Without it: all.",
            show_default=False,
        ),
    ] = "",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Seeds each arm is trained with.")
    ] = 3,
    out: OutOption = None,
    overrides: SetOption = None,
) -> None:
    """Does the fusion earn its keep? Train it beside its controls at equal tokens, and compare on held-out text.

    Controls: cross-entropy only, best single teacher, uniform, static, entropy in its forms, inverted, shuffled, label
    oracle. Teachers run once; an interrupted comparison goes on where it stopped.

    \b
    Example:
      limbeck ablate smollm2/135m-two-experts --arms uniform,entropy-token,label-sequence --seeds 3
    """
    from limbeck.app import run as pipeline

    names = [name.strip() for name in arms.split(",") if name.strip()]
    pipeline.ablate(_load(recipe, overrides), arms=names or None, seeds=seeds, out=out)


@app.command("search")
def search(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the search; default runs/search-NAME-DIGEST.",
            show_default=False,
        ),
    ] = None,
    overrides: SetOption = None,
    shrink: ShrinkOption = None,
) -> None:
    """Find the best student within a budget: plan, time a few exports, distil in rounds, measure the finalists.

    The budget is the recipe's: size_mb, quality.max_loss, hours, and of a language model tpot_ms and ttft_ms, of an encoder latency_ms. Writes chosen.yaml, a recipe that stands alone, or
    nearest.yaml and which bound cannot be kept. An interrupted search goes on, and an undecided one when it is given more budget.hours or bench.minutes; a
    second one in the same folder shares the work.
    Exit codes: 0 chosen, 1 no student keeps the budget, 3 undecided (bench.minutes or budget.hours did not suffice).

    \b
    Example:
      limbeck search smollm2/135m-two-experts --set budget.size_mb=120 --set budget.tpot_ms=8
      limbeck search minilm/spam-two-classifiers --set budget.size_mb=20 --set budget.latency_ms=5
    """
    from limbeck.app.search import search as run_search
    from limbeck.app.search.outcome import show

    found = run_search(_load_any(recipe, overrides, shrink), out=out)
    show(found)
    raise typer.Exit(found.exit_code)


def _stage(
    name: str, reference: str, out: Path | None, overrides: list[str] | None, shrink: str | None
) -> None:
    from limbeck.app import run as pipeline

    report = pipeline.run_stage(
        name, _load_any(reference, overrides, shrink), out=out, reference=reference
    )
    raise typer.Exit(report.exit_code if report else 0)


def _load_any(reference: str, overrides: list[str] | None, shrink: str | None) -> AnyRecipe:
    from limbeck.app.pico import shrink_to_pico
    from limbeck.contract.recipe import load_any_recipe

    recipe = load_any_recipe(reference, overrides=overrides or ())
    return shrink_to_pico(recipe) if _wants_pico(shrink) else recipe


def _load(reference: str, overrides: list[str] | None) -> Recipe:
    """As `_load_any`, where only a language model will do."""
    from limbeck.contract.recipe import load_recipe

    return load_recipe(reference, overrides=overrides or ())


def _wants_pico(shrink: str | None) -> bool:
    if shrink not in (None, "pico"):
        raise RecipeError(f"--shrink-to {shrink}: expected pico, the one size there is.")
    return shrink is not None


# What came out ---------------------------------------------------------------------------------------------------


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
) -> None:
    """Draw report.html and report.json of a finished run again, from the samples it kept.

    The exit code is the verdict's, as that of `limbeck run`.

    \b
    Example:
      limbeck report runs/pico-1a2b3c4d
    """
    from limbeck.app import run as pipeline

    raise typer.Exit(pipeline.report(run).exit_code)


@app.command("verify")
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="An artifact or a whole run folder.", show_default=False
        ),
    ],
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality", help="Score the shipped form on the held-out text again."
        ),
    ] = True,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time the shipped form again, shortly.")
    ] = True,
) -> None:
    """Check what a run made: every file's hash, that ONNX graphs still compute here what the student computed, and the certificate.

    The certificate of a run folder is replayed: quality to the digit where processor flags, provider and libraries are the
    same, speed within its interval or with what differs. Exit code 0 when all holds, 1 when a graph computes something else
    or a promise is broken without a reason, 2 when a file is changed, missing or extra.

    \b
    Examples:
      limbeck verify runs/pico-1a2b3c4d
      limbeck verify runs/pico-1a2b3c4d --no-speed
      limbeck verify runs/pico-1a2b3c4d/onnx
    """
    from limbeck.app import run as pipeline

    raise typer.Exit(pipeline.verify(path, quality=quality, speed=speed))


@app.command("compare")
def compare(
    before: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_A", help="Run folder or bench to compare with.", show_default=False
        ),
    ],
    after: Annotated[
        Path,
        typer.Argument(metavar="RUN_B", help="Run folder or bench to judge.", show_default=False),
    ],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="WHAT=SHARE",
            help="Relative change allowed, of speed (default 0.05), quality (0.01), size (0.01) or memory (0.05). Repeatable.",
            show_default=False,
        ),
    ] = None,
    across_machines: Annotated[
        bool,
        typer.Option(
            "--across-machines", help="Compare runs of different machines, with a warning."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of Markdown.")
    ] = False,
) -> None:
    """Did the shipped form get slower, larger or worse from RUN_A to RUN_B? A Markdown table for a pull request.

    Batches, cold starts and a server under load are compared where both runs measured them; a server's latencies at a rate that both
    tried, for which the recipe's scenario needs a first_rate.

    Exit code 0 when nothing is worse by more than its tolerance, 1 when something is, 3 when an interval still reaches past the
    tolerance, 2 when the runs cannot be compared.

    \b
    Examples:
      limbeck compare runs/main runs/branch
      limbeck compare runs/main runs/branch --tolerance speed=0.1 --tolerance size=0
    """
    from limbeck.app import run as pipeline

    raise typer.Exit(
        pipeline.compare(
            before,
            after,
            tolerances=_tolerances(tolerance or ()),
            across_machines=across_machines,
            as_json=as_json,
        )
    )


def _tolerances(given: Sequence[str]) -> dict[str, float]:
    from limbeck.contract.errors import UserError

    known, found = ("speed", "quality", "size", "memory"), {}
    for entry in given:
        what, _, share = entry.partition("=")
        try:
            found[what] = float(share)
        except ValueError:
            found[what] = -1.0
        if what not in known or not 0 <= found[what] < 10:
            raise UserError(
                f"--tolerance {entry}: expected one of {', '.join(known)} and a share of 0 or more, such as speed=0.05 for 5 %."
            )
    return found


@app.command("eval")
def evaluate(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT", help="An exported folder, or the run it is in.", show_default=False
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option("--tasks", help="Tasks of lm-eval, separated by commas.", show_default=False),
    ],
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            metavar="DIR",
            help="A folder with task files of your own.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="Form to run, such as fp32. Without it: the shipped one.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Most samples a task. Without it: all.", show_default=False
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            min=0,
            help="Examples before each question. Without it: the task's.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on the exported student, on local data, with what is deployed.

    Needs the extra [eval]; nothing is fetched, so a task's data has to be on this machine.

    \b
    Example:
      limbeck eval runs/pico-1a2b3c4d --tasks capitals --include-path my-tasks
    """
    from limbeck.contract.errors import UserError
    from serve_bench import evaluate as run_tasks
    from serve_bench.lm_eval import markdown

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks: found none; name at least one, such as --tasks capitals.")
    found = run_tasks(
        _exported(artifact),
        tasks=names,
        include_path=include_path,
        form=form,
        limit=limit,
        shots=shots,
        threads=threads,
    )
    print(json.dumps(found, indent=1) if as_json else markdown(found))


@app.command("generate")
def generate(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT", help="An exported folder, or the run it is in.", show_default=False
        ),
    ],
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="The text to go on from; - reads standard input.",
            show_default=False,
        ),
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")
    ] = 128,
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="Form to run, such as fp32. Without it: the shipped one.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="FILE|none",
            help="Adapter of another student of the same base; none is the base alone.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0, help="0 takes the likeliest token; higher is more varied."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            min=0,
            max=1,
            help="Draw from the likeliest tokens that hold this share; 0 is the likeliest alone.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw.")] = 0,
    threads: ThreadsOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
    ] = False,
) -> None:
    """Generate text with an exported student, under onnxruntime alone, and print it as it comes.

    \b
    Examples:
      limbeck generate runs/pico-1a2b3c4d/onnx "My fellow Americans,"
      limbeck generate runs/pico-1a2b3c4d "Who are you?" --chat --temperature 0.7 --top-p 0.9
    """
    from limbeck.contract.errors import DataError
    from limbeck.runtime.decoder import Decoder
    from limbeck.runtime.sampling import Sampling
    from limbeck.runtime.text import load_text

    folder = _exported(artifact)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise DataError("the prompt is empty; give the text to go on from.")
    decoder = Decoder(
        folder,
        form=form,
        threads=threads,
        adapter="own" if adapter is None else "none" if adapter == "none" else Path(adapter),
    )
    text = load_text(folder)
    ids = text.chat([{"role": "user", "content": prompt}]) if chat else text.encode(prompt)
    tokens = decoder.generate(
        ids,
        max_new_tokens,
        stop_ids=text.stop_ids,
        sampling=Sampling(temperature=temperature, top_p=max(top_p, 1e-9)),
        seed=seed,
    )
    for piece in text.stream(tokens):
        print(piece, end="", flush=True)
    print()


@app.command("serve")
def serve(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT", help="An exported folder, or the run it is in.", show_default=False
        ),
    ],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every one.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8000,
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="Form to run, such as fp32. Without it: the shipped one.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests that run at once.")
    ] = 64,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue", min=0, help="Requests that may wait; one more is answered with 429."
        ),
    ] = 256,
    cache_mb: Annotated[
        int, typer.Option("--cache-mb", min=1, help="Memory of all key-value caches, MB.")
    ] = 1000,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens one request may generate.")
    ] = Limits.max_tokens,
    max_body_bytes: Annotated[
        int,
        typer.Option(
            "--max-body-bytes", min=1, help="Largest request; a larger one is answered with 413."
        ),
    ] = Limits.max_body_bytes,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout", min=0.001, help="Seconds a request may take, waiting included."
        ),
    ] = Limits.request_timeout,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            min=0,
            help="Seconds that running requests have left after SIGTERM or Ctrl-C.",
        ),
    ] = 30.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="LIMBECK_API_KEY",
            help="Key that clients must send; better in the environment, where no list of processes shows it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve an exported student to many clients at once, as an OpenAI-compatible endpoint.

    /v1/models, /v1/completions, /v1/chat/completions, /health, and Prometheus /metrics. Needs: pip install 'limbeck[serve]'.

    \b
    Examples:
      limbeck serve runs/pico-1a2b3c4d
      limbeck serve runs/pico-1a2b3c4d/onnx --host 0.0.0.0 --port 8080 --max-batch 16 --threads 4
    """
    from limbeck.contract.errors import EnvironmentalError

    try:
        from serve_bench.serve.server import open_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "fastapi",
            "starlette",
            "uvicorn",
            "prometheus_client",
        ):
            raise
        raise EnvironmentalError(
            f"{error.name} is not installed; run: pip install 'limbeck[serve]'."
        ) from None
    server = open_server(
        _exported(artifact),
        host=host,
        port=port,
        form=form,
        threads=threads,
        max_batch=max_batch,
        max_queue=max_queue,
        cache_bytes=cache_mb * 1_000_000,
        grace=grace,
        limits=Limits(
            max_tokens=max_tokens,
            max_body_bytes=max_body_bytes,
            request_timeout=request_timeout,
            api_key=api_key or None,
        ),
    )
    server.run()


def _exported(artifact: Path) -> Path:
    """The exported folder of a run, or the folder itself."""
    from limbeck.app.run import RUN

    return artifact / "onnx" if (artifact / RUN).is_file() else artifact


@app.command("doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine has, what it lacks, and the command that installs what is missing.

    Exit code 0 when `limbeck run` can work here, 2 otherwise.

    \b
    Example:
      limbeck doctor
    """
    from limbeck.app.doctor import examine

    findings = examine()
    print(json.dumps(findings.as_json(), indent=1) if as_json else findings.as_text())
    raise typer.Exit(0 if findings.able else 2)
