"""The teacher cache filled ahead of its training, in this process and by workers on Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import compress
from compress.caching import ray_pool
from compress.caching.filling import TeacherCache
from compress.teachers import live
from limbeck.contract.errors import EnvironmentalError, RecipeError
from limbeck.contract.recipe import Recipe
from tests.compress.test_compress import tiny

HIDDEN = {"training": {"teacher_cache": {"kind": "hidden"}}}
TOPK = {
    "training": {"teacher_cache": {"kind": "topk", "k": 8}},
    "features": {"weight": 0.0},
    "fusion": {"calibration": {"kind": "none"}},
}


def cached(folder: Path, **over: Any) -> Recipe:
    """A tiny recipe whose teachers answer from a cache of several shards."""
    training = {"tokens": 64 * 150, "teacher_cache": {"kind": "hidden"}, "threads": 1}
    text = {"kind": "stdlib", "paths": ["ast.py"]}
    data = {"domains": [{"name": "code", "text": text}]}
    return tiny(folder, data=data, training=training | over.pop("training", {}), **over)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIMBECK_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("kind", [HIDDEN, TOPK])
def test_a_training_finds_the_cache_that_was_filled_ahead(
    kind: dict[str, Any], tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"tokens": 64 * 8, **kind["training"]}
    recipe = cached(tmp_path, **{**kind, "training": training})
    shards = compress.fill_cache(recipe=recipe, products={})
    made = sorted(path.name for path in (empty_cache / "teachers").iterdir())

    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(live.Teachers, "__init__", runs)
    student = compress.distill(recipe=recipe, out=tmp_path / "student")
    assert student.result["steps"] == 8
    assert sorted(path.name for path in (empty_cache / "teachers").iterdir()) == made
    assert compress.fill_cache(recipe=recipe, products={}) == shards


def test_a_training_without_a_cache_is_refused(tmp_path: Path) -> None:
    recipe = cached(tmp_path, training={"teacher_cache": {"kind": "none"}})
    with pytest.raises(RecipeError, match="teacher_cache is none"):
        TeacherCache(recipe, {})


# On Ray -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two nodes on this machine, each with one core."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")
    node = {"num_cpus": 1}
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(**node)
    yield nodes.address
    nodes.shutdown()


@pytest.mark.slow
def test_two_nodes_make_the_bytes_of_one_process_though_workers_are_killed(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = cached(tmp_path)
    found: dict[str, dict[str, str]] = {}
    for name, workers in (("alone", 0), ("one", 1), ("two", 2), ("killed", 2)):
        monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / name))
        killed = list[int]()
        stop = threading.Event()
        if name == "killed":
            thread = threading.Thread(target=_kill_workers, args=(stop, killed, 3))
            thread.start()
        found[name] = compress.fill_cache(
            recipe=recipe, products={}, ray=cluster if workers else None, workers=workers or 1
        )
        stop.set()
        if name == "killed":
            thread.join()
            assert len(killed) == 3
    assert len(found["alone"]) > 6
    assert found["one"] == found["two"] == found["killed"] == found["alone"]


@pytest.mark.slow
def test_workers_that_write_elsewhere_are_named(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "here"))
    theirs = {"LIMBECK_CACHE": str(tmp_path / "elsewhere")}
    monkeypatch.setattr(ray_pool, "environment", lambda threads: theirs)
    with pytest.raises(EnvironmentalError, match="give all nodes one shared folder"):
        compress.fill_cache(recipe=cached(tmp_path), products={}, ray=cluster, workers=1)


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "no Ray cluster answers there"), ("nowhere", "this is no address")],
)
def test_a_cluster_that_does_not_answer_is_named(
    address: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentalError, match=message):
        compress.fill_cache(recipe=cached(tmp_path), products={}, ray=address)


def _kill_workers(stop: threading.Event, killed: list[int], count: int) -> None:
    """SIGKILL ``count`` actors, each once it has written something."""
    while not stop.is_set() and len(killed) < count:
        time.sleep(1.5)
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "ray::_Worker" in title and process.pid not in killed:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                break
