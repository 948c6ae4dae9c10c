"""Owner of a search folder, and the time spent in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from limbeck.app.products import plan_products
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import (
    disk_full_is_a_user_error,
    is_temporary,
    read_json,
    unwritable_is_a_user_error,
    write_atomically,
)
from limbeck.contract.lock import LOCK
from limbeck.contract.recipe import AnyRecipe, fingerprint
from limbeck.contract.sources.digests import input_digests

ASKED, SPENT, TIMING, MACHINE = "asked.json", "spent.json", "timing.json", "machine.json"
PATIENCE = ("minutes", "min_blocks")  # of the bench: how long it measures before "undecided"


def digest_of(recipe: AnyRecipe) -> str:
    """Fingerprint of the search's inputs: the recipe and the content of its models and texts.

    The hours and the time of the bench are left out: with more of them a search continues from its
    saved state.
    """
    products = plan_products(recipe)
    made = [
        [each.distillation(), input_digests(each, products=None)]
        for each in (recipe, *(product.recipe for product in products.order))
    ]
    asked = recipe.resolved()
    bounds = {name: bound for name, bound in asked["budget"].items() if name != "hours"}
    bench = {name: value for name, value in asked["bench"].items() if name not in PATIENCE}
    return fingerprint([made, bounds, bench, [asked[key] for key in ("search", "export", "gates")]])


def require_ours(folder: Path, digest: str) -> None:
    """Raise `ArtifactError` if ``folder`` cannot be made, or holds anything but this search."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ArtifactError(f"{place}: is a file, not a folder; name another with --out.")
    try:
        found = str(read_json(folder / ASKED)["digest"])
    except FileNotFoundError:
        # Another process, running or killed, may be about to write ASKED.
        if folder.exists() and any(
            entry.name != LOCK and not is_temporary(entry.name) for entry in folder.iterdir()
        ):
            raise ArtifactError(
                f"{folder}: holds files but no search ({ASKED} is missing); name an empty or "
                "new folder with --out."
            ) from None
        return
    except (ArtifactError, KeyError, TypeError):
        raise ArtifactError(
            f"{folder / ASKED}: not what Limbeck writes; name another folder with --out."
        ) from None
    if found != digest:
        raise ArtifactError(
            f"{folder}: holds a search of another recipe or budget, or of files that have changed "
            "since; leave --out away or name another folder."
        )


def claim(folder: Path, digest: str) -> None:
    """Make ``folder`` this search's. Raises `EnvironmentalError` if it cannot be written."""
    with disk_full_is_a_user_error(folder), unwritable_is_a_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ASKED).exists():
            write_atomically(folder / ASKED, json.dumps({"digest": digest}))


class Clock:
    """Seconds of work on a search, over all interruptions; for parallel workers, of the longest.

    ``longest`` is the longest time of a finalist. ``publish`` copies the file to where others work.
    """

    def __init__(self, path: Path, publish: Callable[[Path], None] | None = None) -> None:
        self._path, self._publish = path, publish
        kept = self._kept()
        self._before, self.longest, self._started = (
            kept["seconds"],
            kept["longest"],
            time.monotonic(),
        )

    def spent(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._started

    def save(self) -> None:
        """Save the seconds for the next start."""
        kept = self._kept()
        now = {"seconds": self.spent(), "longest": self.longest}
        write_atomically(
            self._path, json.dumps({name: round(max(now[name], kept[name]), 1) for name in now})
        )
        if self._publish is not None:
            self._publish(self._path)

    def _kept(self) -> dict[str, float]:
        found: dict[str, float] = {"seconds": 0.0, "longest": 0.0}
        return found | (json.loads(self._path.read_text("utf-8")) if self._path.exists() else {})
