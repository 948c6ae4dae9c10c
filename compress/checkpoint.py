"""Files of a training that is under way: the checkpoint it can go on from, and its log.

Both lie in a work folder beside the student's. The log goes into the student's artifact.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import disk_full_is_a_user_error

CHECKPOINT, LOG, BOARD = "checkpoint.pt", "log.jsonl", "tensorboard"


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
    """Read a checkpoint of the run ``key``; None where there is none, or that of another run.

    Raises `ArtifactError` for one that is damaged.
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


class Log:
    """One JSON line for each event, and the same numbers in TensorBoard where it is installed."""

    def __init__(self, work: Path) -> None:
        """Write into the folder ``work``."""
        self.path, self._board = work / LOG, work / BOARD
        self._writer = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._board))

    def write(self, event: str, figures: Mapping[str, Any]) -> None:
        """Add one line; ``figures`` hold the step. Raises `EnvironmentalError` when the disk is full."""
        with disk_full_is_a_user_error(self.path), self.path.open("a") as file:
            file.write(json.dumps({"event": event, **figures}) + "\n")
        if self._writer is not None:
            for name, value in _flat(figures):
                self._writer.add_scalar(f"{event}/{name}", value, figures["step"])

    def read(self, event: str) -> list[dict[str, Any]]:
        """Lines of one event, in order."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def cut(self, size: int) -> None:
        """Forget what was written after ``size`` bytes; 0 forgets everything."""
        if not size:
            self.path.unlink(missing_ok=True)
            return
        with self.path.open("r+b") as file:
            file.truncate(size)

    def close(self) -> None:
        """Finish TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()

    def copy(self, folder: Path) -> None:
        """Copy log and TensorBoard's files into ``folder``."""
        self.close()
        shutil.copy(self.path, folder / LOG)
        if self._board.is_dir():
            shutil.copytree(self._board, folder / BOARD)


def _flat(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            yield f"{path}{name}", value
