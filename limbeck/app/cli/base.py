"""Shared by all commands: the program, its colours, and errors as messages with exit codes."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from limbeck import __version__
from limbeck.contract.environment import require_launcher
from limbeck.contract.errors import LimbeckError, RecipeError, UserError
from limbeck.contract.printable import printable
from limbeck.contract.process import end_with_parent

if TYPE_CHECKING:
    from limbeck.contract.recipe import AnyRecipe

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda")
_AGAIN = 0.05  # seconds until a stop that was lost is raised again
_BOLD, _CYAN, _PLAIN = "\x1b[1m", "\x1b[36m", "\x1b[0m"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the work is, so that everything is cleaned up as on Ctrl-C."""


class Command(TyperCommand):
    """A command whose help has colours on a terminal, and that takes no empty argument.

    `--data "$TEXT"` without such a variable would read the folder that the command runs in.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that belong to no option. Raises `UserError` for an empty one."""
        before = str(self.name)
        for given in args:
            option = (
                before if not given else given[:-1] if re.fullmatch("--[a-z-]+=", given) else ""
            )
            if option and option != "--api-key":  # that one says what an empty key would do
                raise UserError(
                    f"{ctx.command_path}: what follows {option} is empty; give it a value, or "
                    "leave it out. A variable of the shell may not be set."
                )
            before = given
        return list(super().parse_args(ctx, args))

    def get_help(self, ctx: Any) -> str:
        """The help text."""
        return _coloured(super().get_help(ctx))


class Commands(TyperGroup):
    """The program: every error that a user can meet becomes one message and an exit code."""

    def get_help(self, ctx: Any) -> str:
        """The help text."""
        return _coloured(super().get_help(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with _stoppable():
                require_launcher()
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except LimbeckError as error:
            print(f"limbeck: {printable(str(error))}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            print("\nstopped; run the same command again to go on", file=sys.stderr)
            raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None
        except Exception as error:
            _end(error)


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def command(
    name: str, kind: type[Command] = Command
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a function that is the command ``name``.

    Its paths may begin with ``~``, which a shell leaves as it is in `--out=~/x`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def at_home_too(**given: Any) -> None:
            paths = {n: Path(at_home(str(v))) for n, v in given.items() if isinstance(v, Path)}
            function(**given | paths)

        app.command(name, cls=kind)(at_home_too)
        return function

    return register


def main() -> None:
    """Entry point of the `limbeck` command."""
    _open_standard_files()
    end_with_parent()
    try:
        try:
            app(prog_name="limbeck")
        finally:
            sys.stdout.flush()
    except OSError as error:  # of `--help`, and of commands that end with a code of their own
        _end(error)


def _open_standard_files() -> None:
    """Open those of stdin, stdout and stderr that are closed (``>&-``).

    Otherwise the next file that is opened takes the number, and what a library prints goes into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _end(error: Exception) -> NoReturn:
    """End with a message for an error of the system. Raises ``error`` again for a defect."""
    from limbeck.contract.files import explained  # slow to import

    left = isinstance(error, BrokenPipeError)  # our reader
    shown = None if left else explained(error)
    if shown is None and not left:
        raise error
    if left or (isinstance(error, OSError) and error.filename is None):
        # Standard output; the interpreter would try again on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if shown is None:
        raise SystemExit(141) from None
    print(f"limbeck: {shown}", file=sys.stderr)
    raise SystemExit(shown.exit_code) from None


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise `KeyboardInterrupt` where the work is, on Ctrl-C and SIGTERM.

    A library that is being loaded may turn it into an error of its own, so every error after a
    signal is the stop. Where Python can raise nothing (in a callback of a weak reference), it is
    raised again a little later. Before and after the work both signals end the command at once and
    without words.
    """
    stops: list[type[KeyboardInterrupt]] = []

    def stop(number: int, _: object) -> NoReturn:
        stops.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise stops[-1]

    def ignored(event: sys.UnraisableHookArgs) -> None:
        if not issubclass(event.exc_type, KeyboardInterrupt):
            shown(event)
            return
        number = signal.SIGTERM if issubclass(event.exc_type, Terminated) else signal.SIGINT
        threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()

    before, shown, sys.unraisablehook = {}, sys.unraisablehook, ignored
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if before[signal.SIGINT] is not signal.SIG_IGN:  # a shell ignores it for work in background
            signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception as error:
        if stops:
            raise stops[0] from error
        raise
    finally:
        sys.unraisablehook = shown
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was set by C


def _coloured(text: str) -> str:
    """Help with bold headings and cyan names; typer drops the colours outside a terminal."""
    if "NO_COLOR" in os.environ:
        return text
    text = re.sub(r"^( *[A-Z][\w ]*:)(?= |$)", rf"{_BOLD}\1{_PLAIN}", text, flags=re.MULTILINE)
    return re.sub(
        r"^  (-[\w, /-]+|[a-z]+)(?=  )", rf"  {_CYAN}\1{_PLAIN}", text, flags=re.MULTILINE
    )


def _version(wanted: bool) -> None:
    if not wanted:
        return
    import importlib.metadata  # slow to import

    print(f"limbeck {__version__}")
    for name in _RUNTIMES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the versions of Limbeck and its runtime and exit.",
        ),
    ] = False,
) -> None:
    """Several teacher language models and one recipe in; one small, quantised, measured student
    out.

    A recipe is a YAML file that names the teachers, the text, the student and what must hold before
    it ships. `limbeck run` does the whole job and ends with a verdict and a report; a second run
    goes on where the first one stopped.

    \b
    Start here:
      limbeck doctor                            can this machine do it?
      limbeck recipes                           what is there to run?
      limbeck run pico                          a smoke test on tiny random models
      limbeck run smollm2/135m-two-experts      the demo, on real models and real text

    \b
    Exit codes: 0 done and every gate passed, 1 done but not good enough, 2 a mistake in what was
    given, 3 undecided (more measuring time is needed), 130 stopped by Ctrl-C.
    """


def load(
    reference: str,
    overrides: list[str] | None,
    shrink: str | None = None,
    keys: list[str] | None = None,
) -> AnyRecipe:
    """The recipe named on the command line, with the changes made there."""
    from limbeck.app.pico import shrink_to_pico
    from limbeck.contract.recipe import allow_keys, load_any_recipe

    if shrink not in (None, "pico"):
        raise RecipeError(f"--shrink-to {shrink}: expected pico, the one size there is.")
    allow_keys(keys or ())
    recipe = load_any_recipe(reference, overrides=overrides or ())
    return shrink_to_pico(recipe) if shrink else recipe


def at_home(path: str) -> str:
    """``path`` with the home folder in place of ``~``. Raises `RecipeError` for an unknown user.

    A file here may begin with ``~`` too, as an editor's copy does.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        if Path(path).exists():
            return str(Path.cwd() / path)
        raise RecipeError(
            f"{path}: there is no such user here; write the path without ~."
        ) from None


def names_in(given: str) -> list[str]:
    """Names that were given separated by commas."""
    return [name.strip() for name in given.split(",") if name.strip()]
