"""Held-out text and examples: read back as written, and refused by name when they are something
else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from limbeck.contract.data.examples import Examples, load_examples, save_examples
from limbeck.contract.data.heldout import (
    load_calibration,
    load_heldout,
    save_calibration,
    save_heldout,
)
from limbeck.contract.errors import ArtifactError
from tests.pico import make_blocks


def test_blocks_are_read_as_they_were_written(tmp_path: Path) -> None:
    blocks = make_blocks()
    save_heldout(tmp_path / "x", blocks)
    found = load_heldout(tmp_path / "x")
    assert list(found) == sorted(blocks)
    for name, domain in blocks.items():
        for field in ("input_ids", "lengths", "utf8_bytes", "scored"):
            np.testing.assert_array_equal(getattr(found[name], field), getattr(domain, field))


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("input_ids", lambda v: v.astype(np.int64), "found int64 of shape"),
        ("input_ids", lambda v: v[:, 0], "expected int32 with 2 axes"),
        ("input_ids", lambda v: v - 300, "negative id"),
        ("lengths", lambda v: v * 0, "lengths: found 0 to 0, expected 1 to"),
        ("lengths", lambda v: v + 1000, "expected 1 to 24"),
        ("lengths", lambda v: v[1:], "lengths: found 2 rows, expected 3"),
        ("utf8_bytes", lambda v: v[:0], "utf8_bytes: found 0 rows"),
        ("scored", lambda v: v * 0 + 2, "marks a first token or padding, or is not 0 or 1"),
        ("scored", lambda v: v * 0 + 1, "marks a first token or padding, or is not 0 or 1"),
        ("scored", lambda v: v[:, 1:], "marks a first token"),
        ("scored", None, "no tensor 'letters/scored'"),
    ],
)
def test_another_file_is_refused_with_tensor_and_finding(
    tmp_path: Path, tensor: str, change: Any, message: str
) -> None:
    save_heldout(tmp_path / "x", make_blocks())
    tensors = load_file(tmp_path / "x")
    value = tensors.pop(f"letters/{tensor}")
    if change:
        tensors[f"letters/{tensor}"] = np.ascontiguousarray(change(value))
    save_file(tensors, tmp_path / "x")
    with pytest.raises(ArtifactError, match=message):
        load_heldout(tmp_path / "x")


def test_examples_are_refused_likewise(tmp_path: Path) -> None:
    good = Examples(np.ones((2, 3), np.int32), np.array([3, 1], np.int32), np.zeros(2, np.int32))
    save_examples(tmp_path / "x", good)
    assert len(load_examples(tmp_path / "x")) == 2
    save_examples(tmp_path / "x", Examples(good.input_ids, good.lengths, good.groups - 1))
    with pytest.raises(ArtifactError, match="groups: found the negative number -1"):
        load_examples(tmp_path / "x")
    save_examples(tmp_path / "x", Examples(good.input_ids, good.lengths[:1], good.groups))
    with pytest.raises(ArtifactError, match="lengths: found 1 rows, expected 2"):
        load_examples(tmp_path / "x")


def test_calibration_rows_are_refused_likewise(tmp_path: Path) -> None:
    save_calibration(tmp_path / "x", [np.array([3, 1], np.int32)])
    np.testing.assert_array_equal(load_calibration(tmp_path / "x")[0], [3, 1])
    save_calibration(tmp_path / "x", [np.array([], np.int32)])
    with pytest.raises(ArtifactError, match="an empty row or a negative token id"):
        load_calibration(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    for load in (load_heldout, load_examples, load_calibration):
        if content.endswith(b"{}") and load is load_calibration:
            assert not load(tmp_path / "x")  # an empty file of the right kind
            continue
        with pytest.raises(ArtifactError, match=r"not a safetensors file|no tensor"):
            load(tmp_path / "x")
