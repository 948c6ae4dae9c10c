"""The command line: one file a group of commands, in the order that `limbeck --help` lists them.

Everything heavier than typer is imported inside the command that needs it, so that help answers at
once.
"""

from limbeck.app.cli import recipes, job, outcome, use, machine  # isort: skip
from limbeck.app.cli.base import app, main

__all__ = ["app", "job", "machine", "main", "outcome", "recipes", "use"]
