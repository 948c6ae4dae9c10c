"""The command about this machine: doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from limbeck.app.cli.base import command
from limbeck.app.cli.options import JsonOption


@command("doctor")
def doctor(
    everything: Annotated[
        bool, typer.Option("--all", help="Show the versions of all libraries too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with this machine and the command that mends it, then what the machine has.

    Exit code 0 when `limbeck run` can work here, 2 otherwise.

    \b
    Examples:
      limbeck doctor
      limbeck doctor --all
    """
    from limbeck.app.doctor import examine

    findings = examine()
    text = json.dumps(findings.as_json(), indent=1) if as_json else findings.as_text(everything)
    print(text)
    raise typer.Exit(0 if findings.able else 2)
