"""Held-out text as the stages share it: token blocks by domain in one safetensors file, and the one way NLL is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

HELDOUT = "heldout.safetensors"


@dataclass(frozen=True)
class Blocks:
    """Held-out blocks of one domain. Every token of a row but the first is scored, given the tokens before it."""

    input_ids: npt.NDArray[np.int32]  # [N, L], right-padded with 0
    lengths: npt.NDArray[np.int32]  # [N], tokens of each row
    utf8_bytes: npt.NDArray[np.int32]  # [N], bytes of the text of the scored tokens

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def labels(self) -> int:
        """Scored tokens."""
        return int((self.lengths - 1).sum())


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
    return {name: Blocks(**{field: tensors[f"{name}/{field}"] for field in Blocks.__annotations__}) for name in names}


def mean_nll(nll_by_domain: Mapping[str, float]) -> float:
    """Unweighted mean over domains of their nats a token: a large domain does not hide a small one."""
    return float(np.mean(list(nll_by_domain.values())))
