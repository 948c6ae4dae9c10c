"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.contract.limits import MOST_THREADS

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name from `limbeck recipes`.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Run folder. Default: runs/NAME-DIGEST in the working directory.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one field of the recipe, such as training.tokens=20480 or "
        "teachers.0.quantize=int8. Repeatable.",
    ),
]
ShrinkOption = Annotated[
    str | None,
    typer.Option(
        "--shrink-to",
        metavar="pico",
        help="Try the recipe out: tiny random models of the same architectures, built-in text, "
        "a few steps.",
    ),
]
KeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-key",
        metavar="VARIABLE",
        help="Environment variable that the recipe may send as an API key, besides LIMBECK_* and "
        "OPENAI_API_KEY. Repeatable.",
    ),
]
BaseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--base",
        metavar="[ID=]PATH",
        help="Local folder of an adapter's base model, where the adapter names it by its hub id. "
        "Repeatable.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=MOST_THREADS, help="CPU threads. Default: every core available."
    ),
]
FormOption = Annotated[
    str | None, typer.Option("--form", help="Form to run, such as fp32. Default: the shipped one.")
]
ExportedArgument = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="An exported folder, or the run it is in.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
MadeArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or its exported folder.")
]
