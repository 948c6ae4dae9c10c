"""Text that the stages share: held-out blocks by domain, training rows for calibration, and the
mean NLL over domains.

Shape letters: N rows, L tokens, S tokens of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from limbeck.contract.data.tensors import Array, damaged, load_tensors, require_rows, take

HELDOUT = "heldout.safetensors"
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True)
class Blocks:
    """Held-out blocks of one domain. Every scored token is predicted from all tokens before it."""

    input_ids: npt.NDArray[np.int32]  # [N, L], right-padded with 0
    lengths: npt.NDArray[np.int32]  # [N], tokens of each row
    utf8_bytes: npt.NDArray[np.int32]  # [N], bytes of the text of the scored tokens
    scored: npt.NDArray[np.uint8]  # [N, L], 1 where the token is a label; never the first of a row

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def labels(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())


def all_but_first(lengths: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.uint8]:
    """Mask [N, width] of plain text: all tokens of a row but the first are scored, no padding."""
    positions = np.arange(width)
    return ((positions > 0) & (positions < lengths[:, None])).astype(np.uint8)


def save_heldout(path: Path, domains: Mapping[str, Blocks]) -> None:
    """Write blocks by domain name to ``path``."""
    save_file(
        {
            f"{name}/{field}": getattr(blocks, field)
            for name, blocks in domains.items()
            for field in Blocks.__annotations__
        },
        path,
    )


def load_heldout(path: Path) -> dict[str, Blocks]:
    """Read what `save_heldout` wrote, domains in the order of their names.

    Raises `ArtifactError` naming file and tensor for anything else.
    """
    tensors = load_tensors(path)
    names = sorted({name.rpartition("/")[0] for name in tensors})
    if not names:
        raise damaged(path, "found no tensor, expected at least one domain")
    return {name: _blocks(path, tensors, name) for name in names}


def _blocks(path: Path, tensors: Mapping[str, Array], domain: str) -> Blocks:
    blocks = Blocks(
        input_ids=take(path, tensors, f"{domain}/input_ids", np.int32, 2),
        lengths=take(path, tensors, f"{domain}/lengths", np.int32, 1),
        utf8_bytes=take(path, tensors, f"{domain}/utf8_bytes", np.int32, 1),
        scored=take(path, tensors, f"{domain}/scored", np.uint8, 2),
    )
    more: dict[str, Array] = {"utf8_bytes": blocks.utf8_bytes, "scored": blocks.scored}
    require_rows(path, blocks.input_ids, blocks.lengths, more)
    allowed = all_but_first(blocks.lengths, blocks.input_ids.shape[1])
    if blocks.scored.shape != allowed.shape or (blocks.scored > allowed).any():
        raise damaged(
            path, f"{domain}/scored: marks a first token or padding, or is not 0 or 1 everywhere"
        )
    return blocks


def save_calibration(path: Path, rows: Sequence[npt.NDArray[np.int32]]) -> None:
    """Write token rows of training text, ``[S]`` each, to ``path``."""
    save_file(
        {f"{index:04d}": np.ascontiguousarray(row, np.int32) for index, row in enumerate(rows)},
        path,
    )


def load_calibration(path: Path) -> list[npt.NDArray[np.int64]]:
    """Read what `save_calibration` wrote, in the same order.

    Raises `ArtifactError` for anything else.
    """
    tensors = load_tensors(path)
    rows = [take(path, tensors, name, np.int32, 1).astype(np.int64) for name in sorted(tensors)]
    if any(len(row) == 0 or row.min() < 0 for row in rows):
        raise damaged(path, "found an empty row or a negative token id")
    return rows


def mean_nll(nll_by_domain: Mapping[str, float]) -> float:
    """Unweighted mean over domains, so that a large domain does not hide a small one."""
    return float(np.mean(list(nll_by_domain.values())))
