"""Files of a training that is under way: its checkpoint, log and samples.

They lie in a work folder beside the student's. The log goes into the student's artifact, and so do
the texts that the student wrote (`training.on_policy`), if there are any.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from limbeck.contract.errors import ArtifactError, EnvironmentalError
from limbeck.contract.files import disk_full_is_a_user_error

CHECKPOINT, LOG, SAMPLES, TRACKERS = "checkpoint.pt", "log.jsonl", "samples.jsonl", "trackers"


def write_checkpoint(path: Path, saved: Mapping[str, Any]) -> None:
    """Write ``saved`` so that ``path`` holds either the old checkpoint or all of the new one.

    Raises `EnvironmentalError` when the disk is full.
    """
    temporary = path.with_name(f"{path.name}.writing")
    with disk_full_is_a_user_error(path):
        with temporary.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def read_checkpoint(path: Path, *, key: str, device: torch.device | str) -> dict[str, Any] | None:
    """Read the checkpoint of the run ``key``; None if it is missing or another run's.

    Raises `ArtifactError` for a damaged file.
    """
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except FileNotFoundError:
        return None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}); delete it, "
            "and the same command starts this training over."
        ) from error
    return saved if saved["key"] == key else None


_chosen: dict[str, str] = {}  # environment variables that this process has set for trackers


class Log:
    """One JSON line for each event, and the same numbers in the recipe's experiment trackers."""

    def __init__(self, work: Path, accelerator: Any, *, name: str) -> None:
        """Write into the folder ``work``; ``name`` is the run's in the trackers."""
        self.path, self._accelerator = work / LOG, accelerator
        self._files = [self.path, work / SAMPLES]
        self._folder = work / TRACKERS
        if accelerator.log_with:
            accelerator.init_trackers(name)

    def write(self, event: str, figures: Mapping[str, Any]) -> None:
        """Add one line; ``figures`` hold the step. Raises `EnvironmentalError` on a full disk."""
        self._append(self.path, {"event": event, **figures})
        values = {f"{event}/{name}": value for name, value in _flat(figures)}
        self._accelerator.log(values, step=figures["step"])

    def write_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add texts of the student to their own file. Raises `EnvironmentalError` as `write`."""
        for sample in samples:
            self._append(self._files[1], sample)

    @staticmethod
    def _append(path: Path, line: Mapping[str, Any]) -> None:
        with disk_full_is_a_user_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self, event: str) -> list[dict[str, Any]]:
        """Lines of one event, in order."""
        lines = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
        return [line for line in lines if line["event"] == event]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes on disk, by the name of the file; synced, as the checkpoint that counts on them."""
        written = [path for path in self._files if path.exists()]
        for path in written:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return {path.name: path.stat().st_size for path in written}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Forget what was written after ``sizes``; without a size, all of a file."""
        for path in self._files:
            if path.name not in sizes:
                path.unlink(missing_ok=True)
                continue
            with path.open("r+b") as file:
                file.truncate(sizes[path.name])

    def close(self) -> None:
        """Finish what the trackers write."""
        for tracker in self._accelerator.trackers:  # `end_training` would part the processes too
            tracker.finish()

    def copy(self, folder: Path) -> None:
        """Copy the log, the samples and the trackers' files into ``folder``."""
        self.close()
        for path in self._files:
            if path.exists():
                shutil.copy(path, folder / path.name)
        if self._folder.is_dir():
            shutil.copytree(self._folder, folder / TRACKERS)


def require_trackers(wanted: Sequence[str], work: Path) -> None:
    """Let the trackers write to ``work`` and to no other machine, unless the user chose otherwise.

    Raises `EnvironmentalError` for one whose package is not installed or writes elsewhere.
    """
    missing = sorted(set(wanted) - {str(name) for name in get_available_trackers()})
    if missing:
        raise EnvironmentalError(
            f"training.trackers: {', '.join(missing)} cannot be imported here; run: pip install "
            f"{' '.join(missing)}, or leave it out of the recipe."
        )
    if not wanted:
        return
    folder = (work / TRACKERS).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",  # it would name the folder that the training works in
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    for name, value in chosen.items():
        # Keep what the user has set, but not the folder of an earlier training in this process.
        if os.environ.get(name) in (None, _chosen.get(name)):
            os.environ[name] = _chosen[name] = value
    trackio = sys.modules.get("trackio.utils") if "trackio" in wanted else None
    if trackio and Path(os.environ["TRACKIO_DIR"]) != trackio.TRACKIO_DIR:
        raise EnvironmentalError(
            f"training.trackers: trackio was imported before and writes to {trackio.TRACKIO_DIR} "
            "for as long as this process lives; train in another process."
        )


def _flat(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            yield f"{path}{name}", value
