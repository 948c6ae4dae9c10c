"""Text as the stages share it: held-out blocks by domain, a few training rows for calibration, and the one way NLL is averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

HELDOUT = "heldout.safetensors"
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True)
class Blocks:
    """Held-out blocks of one domain. Each scored token counts, given all the tokens before it."""

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
    """[N, width] mask of plain text: every token of a row is scored but the first, and no padding."""
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
    """Read what `save_heldout` wrote, domains in the order of their names."""
    tensors = load_file(path)
    names = sorted({name.rpartition("/")[0] for name in tensors})
    for name in names:  # students made before there was chat data have no mask
        ids, lengths = tensors[f"{name}/input_ids"], tensors[f"{name}/lengths"]
        tensors.setdefault(f"{name}/scored", all_but_first(lengths, ids.shape[1]))
    return {
        name: Blocks(**{field: tensors[f"{name}/{field}"] for field in Blocks.__annotations__})
        for name in names
    }


def save_calibration(path: Path, rows: Sequence[npt.NDArray[np.int32]]) -> None:
    """Write token rows of training text, ``[S]`` each, to ``path``."""
    save_file(
        {f"{index:04d}": np.ascontiguousarray(row, np.int32) for index, row in enumerate(rows)},
        path,
    )


def load_calibration(path: Path) -> list[npt.NDArray[np.int64]]:
    """Read what `save_calibration` wrote, in the same order."""
    return [row.astype(np.int64) for _, row in sorted(load_file(path).items())]


def mean_nll(nll_by_domain: Mapping[str, float]) -> float:
    """Unweighted mean over domains of their nats a token: a large domain does not hide a small one."""
    return float(np.mean(list(nll_by_domain.values())))
