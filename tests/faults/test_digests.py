"""The same recipe gives the same digests in any folder, at any time, with any cache."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import onnx
import pytest
import torch

from limbeck.contract.artifact import MANIFEST
from tests.faults.killing import job


def test_two_runs_in_two_folders_give_equal_digests_and_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    for count, name in enumerate(("here", "there"), 1):
        monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / name / "cache"))
        for stage in ("compress", "export"):
            # What a process has done before: an export after a training, or one on its own.
            torch.set_num_threads(count)
            job.run_stage(stage, tmp_path / name)
    torch.set_num_threads(threads)
    here, there = (job.digests(tmp_path / name) for name in ("here", "there"))
    assert here == there
    assert set(here) == {"student", "onnx"}
    for graph in here["onnx"][1]:
        files = [tmp_path / name / "run" / "onnx" / graph for name in ("here", "there")]
        assert files[0].read_bytes() == files[1].read_bytes()
        # The builder's version alone, without the commit of the repository around this environment.
        if graph.endswith(".onnx"):
            made = onnx.load(files[0], load_external_data=False)
            assert made.producer_version == importlib.metadata.version("onnxruntime-genai")
    manifests = [
        json.loads((tmp_path / name / "run" / "student" / MANIFEST).read_text())
        for name in ("here", "there")
    ]
    # The logs have times, so this test would fail if they counted.
    assert manifests[0]["files"]["log.jsonl"] != manifests[1]["files"]["log.jsonl"]
