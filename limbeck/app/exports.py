"""The exports of a run: the student, the recovered student, and the shipped one.

``onnx`` in a run folder is a relative link to the export that ships; nothing else records it. The
link is replaced atomically, so a killed run shows either the former export or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from limbeck.contract.artifact import MANIFEST, RECOVERED, Artifact, open_artifact
from limbeck.contract.errors import ArtifactError, ParityError
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe, Recipe

SHIPPED = "onnx"
PLAIN, SECOND = "onnx-plain", "onnx-recovered"  # of `student` and of `student-recovered`

Timed = Callable[[str, Path, Callable[[], Artifact]], None]  # title, what is made, how


def export_run(
    recipe: AnyRecipe, folder: Path, *, timed: Timed, products: Callable[[], dict[str, Path]]
) -> None:
    """Export the student of the run in ``folder``, and point ``onnx`` at the export that ships.

    When the shipped form misses its gate and the recipe asks for it, the student is distilled again
    through the rounding (`compress.recover`, with ``products`` as its teachers), exported too, and
    the better of the two ships.
    """
    import compress
    import export

    adopt(folder)
    student, recovered = folder / "student", folder / RECOVERED
    plain, second = folder / PLAIN, folder / SECOND
    try:
        timed(
            "export",
            plain,
            lambda: export.export_student(student=student, out=plain, recipe=recipe),
        )
    except ParityError:
        # Either the form to ship failed and the others are kept, or an older export remains. In
        # both cases a recovered export, if there is one, belongs to an older export than this.
        if (plain / MANIFEST).exists():
            point(folder / SHIPPED, PLAIN)
        raise
    if not open_artifact(plain, verify=False).result.get("needs_recovery"):
        point(folder / SHIPPED, PLAIN)
        return
    if not (folder / SHIPPED).exists():
        point(folder / SHIPPED, PLAIN)  # usable while the recovery trains
    teachers = products()
    timed(
        "recover",
        recovered,
        lambda: compress.recover(
            student=student,
            onnx=plain,
            out=recovered,
            recipe=cast("Recipe", recipe),  # of other tasks no export asks for a recovery
            products=teachers,
        ),
    )
    timed(
        "export of the recovered student",
        second,
        lambda: export.export_student(student=recovered, out=second, recipe=recipe),
    )
    ships = bool(open_artifact(second, verify=False).result["recovery"]["ships"])
    say(f"   the {'recovered' if ships else 'first'} student ships")
    point(folder / SHIPPED, SECOND if ships else PLAIN)


def point(link: Path, target: str) -> None:
    """Let ``link`` name its neighbour ``target``; at any moment it names the old or the new."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.pointer")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(link)
    handle = os.open(link.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name, not only the new link
    finally:
        os.close(handle)


def adopt(folder: Path) -> None:
    """Give the exports that an older version wrote their places under the link.

    Raises `ArtifactError` when ``onnx`` is a folder that no run wrote.
    """
    shipped, plain, second = folder / SHIPPED, folder / PLAIN, folder / SECOND
    former = folder / "onnx-unrecovered"  # beside a recovered export named `onnx`
    if shipped.is_dir() and not shipped.is_symlink():
        target = second if former.exists() else plain
        if target.exists():
            raise ArtifactError(
                f"{shipped}: found a folder, expected a link to {PLAIN} or {SECOND}; "
                "move it out of the run folder."
            )
        shipped.rename(target)
    if former.exists() and not plain.exists():
        former.rename(plain)
    if plain.exists() and not shipped.exists():  # also after a stop between two of these steps
        point(shipped, PLAIN)
