"""Commands about recipes: list, check, write, plan."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.app.cli.base import command, load
from limbeck.app.cli.options import (
    BaseOption,
    JsonOption,
    KeyOption,
    RecipeArgument,
    SetOption,
    ShrinkOption,
)
from limbeck.contract.errors import LimbeckError
from limbeck.contract.printable import printable


@command("recipes")
def recipes(
    max_mb: Annotated[
        float | None,
        typer.Option("--max-mb", min=0, help="Only students of at most this many MB, as shipped."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Only recipes that train on a CPU.")] = False,
    family: Annotated[
        str | None, typer.Option("--family", help="Only one model family, such as smollm2.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes that come with Limbeck by the size of the shipped student, smallest first.

    \b
    Examples:
      limbeck recipes
      limbeck recipes --max-mb 150 --cpu
    """
    from limbeck.app.library import library

    entries = library(max_mb=max_mb, cpu=cpu, family=family)
    if as_json:
        print(json.dumps([entry.as_json() for entry in entries], indent=1))
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(
            f"{entry.name:{width}}  {entry.megabytes:6g} MB  {entry.device:4}  "
            f"{entry.recipe.description}"
        )
    print(
        "\nlimbeck run NAME runs one; the comment at the top of its file says what it needs.",
        file=sys.stderr,
    )


@command("validate")
def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or shipped names.")
    ],
    overrides: SetOption = None,
    keys: KeyOption = None,
) -> None:
    """Check recipes, and that the files and packages they name are on this machine. Runs nothing.

    Every mistake of every file is reported at once; exit code 2 if there is any.

    \b
    Example:
      limbeck validate my-recipe.yaml smollm2/135m-two-experts
    """
    from limbeck.app.products import mistakes

    bad = 0
    for reference in recipes:
        try:
            recipe = load(reference, overrides, keys=keys)
            found = mistakes(recipe)
        except LimbeckError as error:
            print(printable(str(error)), file=sys.stderr)
            bad += 1
            continue
        if found:
            count = "1 thing is" if len(found) == 1 else f"{len(found)} things are"
            lines = [
                f"{reference}: {count} missing or wrong here",
                *(f"  {line}" for line in found),
            ]
            print(printable("\n".join(lines)), file=sys.stderr)
            bad += 1
        else:
            print(f"{reference}: valid; {recipe.name}, digest {recipe.digest[:8]}")
            _print_notes(recipe)
    if bad:
        raise typer.Exit(2)


@command("schema")
def schema(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File to write. Default: print it.")
    ] = None,
) -> None:
    """Write the JSON Schema of recipes, with which an editor completes keys and marks mistakes.

    Put the line `# yaml-language-server: $schema=recipe.schema.json` at the top of a recipe.

    \b
    Example:
      limbeck schema --out recipe.schema.json
    """
    from limbeck.app.schema import recipe_schema
    from limbeck.contract.files import unwritable_is_a_user_error, write_atomically

    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    if out is None:
        print(text, end="")
        return
    with unwritable_is_a_user_error(out.parent):
        write_atomically(out, text)
    print(f"{out}: written; name it in a recipe: # yaml-language-server: $schema={out.name}")


@command("init")
def init(
    teacher: Annotated[
        list[str],
        typer.Option(
            "--teacher",
            help="A model folder, PEFT adapter folder, .gguf file, hub id or recipe; or a server: "
            "URL[#MODEL]=TOKENIZER, with the folder or hub id of its tokenizer. Repeatable.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="A text file, a folder of them, or a glob in quotes; quality is reported for each "
            "--data. Repeatable.",
        ),
    ],
    target_mb: Annotated[
        float, typer.Option("--target-mb", min=0, help="Largest size of what is shipped, in MB.")
    ],
    student: Annotated[
        str | None,
        typer.Option(
            "--student", help="Model the student starts from. Default: the smallest teacher."
        ),
    ] = None,
    base: BaseOption = None,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a short recipe for your own teachers, text and target size; the student is chosen by
    what fits.

    \b
    Examples:
      limbeck init --teacher models/legal --teacher models/medical --data text.txt --target-mb 150
      limbeck init --teacher models/legal --data 'text/*.txt' --target-mb 150
      limbeck init --teacher models/legal --teacher http://gpu:8000=models/big --data text.txt \\
        --target-mb 150
    """
    from limbeck.app.init import write_recipe
    from limbeck.app.plan import merge_or_distil

    choice = write_recipe(
        teachers=teacher,
        texts=data,
        target_mb=target_mb,
        student=student,
        base_paths=base or (),
        out=out,
    )
    print(f"{out}: {choice.why}; about {choice.megabytes:.1f} MB as {choice.form}")
    if choice.caution:
        print(choice.caution)
    if advice := merge_or_distil(load(str(out), None)):
        print(advice)
    print(f"next: limbeck run {shlex.quote(str(out))}")


@command("plan")
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
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Plan for that many machines that train together."),
    ] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", min=0, help="Cards of each machine; 0: its processor.")
    ] = 0,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops",
            min=1e-6,
            help="Measured rate of one card, in 10^12 operations a second, for the time.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe takes before any weights are loaded: parameters, sizes, memory, operations,
    time.

    Needs the configuration of every model, which for a hub model means its config.json.

    \b
    Examples:
      limbeck plan smollm2/135m-two-experts --trial
      limbeck plan smollm2/135m-two-experts --nodes 2 --gpus 4
    """
    from limbeck.app.cluster import spread
    from limbeck.app.plan import plan_recipe

    read = load(recipe, overrides, shrink)
    found: Any = plan_recipe(read, trial=trial, cards=gpus > 0)
    many = nodes is not None or gpus > 0 or tflops is not None
    wide = spread(found, read, nodes=nodes or 1, gpus=gpus, tflops=tflops) if many else None
    if as_json:
        tree = found.as_json() | ({"cluster": asdict(wide)} if wide else {})
        print(json.dumps(tree, indent=1))
        return
    print(found.as_text())
    if wide is not None:
        print(wide.as_text())
    _print_notes(read)


def _print_notes(recipe: Any) -> None:
    """Say what is learned of preferences, and which teachers have another tokenizer."""
    from limbeck.contract.sources.texts import preference_notes

    for note in preference_notes(recipe):
        print(f"  {note}")
    if recipe.task != "causal-lm":
        return
    from limbeck.contract.sources.teacher_tokens import compare_tokenizers

    found = compare_tokenizers(recipe)
    for teacher in found if any(not t.relation.equal for t in found) else ():
        print(f"  {teacher}")
