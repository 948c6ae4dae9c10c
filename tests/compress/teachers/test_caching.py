"""The teacher cache filled ahead of its training, in this process and by workers on Ray."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from fsspec.implementations.local import LocalFileSystem

import compress
from compress.caching.filling import TeacherCache
from compress.teachers import live
from limbeck.contract import ray_cluster
from limbeck.contract.errors import EnvironmentalError, RecipeError, UserError
from limbeck.contract.files import explained, read_json
from limbeck.contract.recipe import Recipe
from limbeck.contract.sources.stores import file_system
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


# At a URL -----------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go on as on another machine: with a cache folder of its own."""
    return lambda name: monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / name))


def stored(folder: Path, url: str | None, kind: dict[str, Any], *, blocks: int) -> Recipe:
    cache = {**kind["training"]["teacher_cache"], "store": url}
    return cached(folder, **{**kind, "training": {"teacher_cache": cache, "tokens": 64 * blocks}})


@pytest.mark.parametrize("kind", [HIDDEN, TOPK], ids=["hidden", "topk"])
def test_a_training_reads_the_store_that_another_machine_filled(
    kind: dict[str, Any],
    tmp_path: Path,
    machine: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"memory://{tmp_path.name}/teachers"
    machine("local")
    local = stored(tmp_path, None, kind, blocks=8)
    shards = compress.fill_cache(recipe=local, products={})
    expected = compress.distill(recipe=local, out=tmp_path / "expected")
    machine("first")
    shared = stored(tmp_path, url, kind, blocks=8)
    assert compress.fill_cache(recipe=shared, products={}) == shards
    assert shared.digest == local.digest
    for mine in (tmp_path / "local" / "teachers").glob("*/*.safetensors"):
        theirs = fsspec.open(f"{url}/{mine.parent.name}/{mine.name}").open().read()
        assert theirs == mine.read_bytes()

    machine("second")
    monkeypatch.setattr(live.Teachers, "__init__", lambda *_, **__: pytest.fail("a teacher ran"))
    assert compress.fill_cache(recipe=shared, products={}) == shards
    found = compress.distill(recipe=shared, out=tmp_path / "found")
    assert found.digest == expected.digest


def test_damaged_and_half_written_shards_of_a_store_are_made_again(
    tmp_path: Path,
    machine: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    recipe = stored(tmp_path, store.as_uri(), HIDDEN, blocks=150)
    machine("first")
    shards = compress.fill_cache(recipe=recipe, products={})
    changed, cut, bare, headless, unread, of_another, whole = sorted(store.glob("rows-*"))[:7]
    rows = bytearray((changed / "rows.safetensors").read_bytes())
    rows[-1] ^= 1
    (changed / "rows.safetensors").write_bytes(rows)
    os.truncate(cut / "rows.safetensors", 100)
    (bare / "rows.safetensors").unlink()
    (headless / "manifest.json").unlink()
    os.truncate(unread / "manifest.json", 100)
    for file in of_another.iterdir():
        file.write_bytes((whole / file.name).read_bytes())

    machine("second")
    capsys.readouterr()
    assert compress.fill_cache(recipe=recipe, products={}) == shards
    told = capsys.readouterr().err
    for shard in (changed, cut, bare, unread, of_another):
        assert f"{shard.name} is damaged or half-written, and is made again" in told

    machine("third")
    monkeypatch.setattr(live.Teachers, "__init__", lambda *_, **__: pytest.fail("a teacher ran"))
    assert compress.fill_cache(recipe=recipe, products={}) == shards
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_store_is_not_called_unreachable(
    tmp_path: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    machine("first")
    recipe = stored(tmp_path, (tmp_path / "store").as_uri(), HIDDEN, blocks=8)
    monkeypatch.setattr(LocalFileSystem, "put_file", full)
    with pytest.raises((EnvironmentalError, OSError)) as caught:
        compress.fill_cache(recipe=recipe, products={})
    told = caught.value if isinstance(caught.value, EnvironmentalError) else explained(caught.value)
    assert "no space left" in str(told)


def test_a_store_that_cannot_be_used_is_named(
    tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("first")
    (tmp_path / "file").write_text("no folder")
    recipe = stored(tmp_path, (tmp_path / "file").as_uri(), HIDDEN, blocks=8)
    with pytest.raises(EnvironmentalError, match=r"file:.*cannot be read or written \(NotADir"):
        compress.fill_cache(recipe=recipe, products={})
    if importlib.util.find_spec("adlfs") is None:
        with pytest.raises(UserError, match="adlfs is not installed; run: pip install adlfs"):
            file_system("az://container/folder")
    with pytest.raises(UserError, match="fsspec knows no nowhere://"):
        file_system("nowhere://folder")
    if importlib.util.find_spec("paramiko") is None:
        with pytest.raises(UserError, match='SFTPFileSystem requires "paramiko" to be installed'):
            file_system("sftp://host/folder")


@pytest.mark.parametrize(
    "url", ["reference://x", "jlab://x", "generic://x", "tar://x", "ftp://127.0.0.1:9/x"]
)
def test_a_store_of_a_kind_that_is_no_folder_is_refused(url: str) -> None:
    """Their plug-ins want more than a URL, or ask their service at once."""
    with pytest.raises(UserError, match=f"^{url}: fsspec cannot open it .*or use file, s3"):
        file_system(url)


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
def test_two_nodes_copy_the_bytes_of_one_process_to_a_store(
    cluster: str, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("alone")
    expected = compress.fill_cache(recipe=stored(tmp_path, None, HIDDEN, blocks=150), products={})
    machine("shared")
    store = tmp_path / "store"
    recipe = stored(tmp_path, store.as_uri(), HIDDEN, blocks=150)
    assert compress.fill_cache(recipe=recipe, products={}, ray=cluster, workers=2) == expected

    def shards_in(folder: Path) -> dict[str, Any]:
        """Every file's bytes; of manifests, which have times too, the hashes of their files."""
        files = {path.parent.name: read_json(path)["files"] for path in folder.rglob("*.json")}
        arrays = folder.rglob("*.safetensors")
        return files | {f"{path.parent.name}/{path.name}": path.read_bytes() for path in arrays}

    made = shards_in(store)
    alone = shards_in(tmp_path / "alone" / "teachers")
    assert len(made) > 2 * 6
    assert {name: alone[name] for name in made} == made


@pytest.mark.slow
def test_workers_that_write_elsewhere_are_named(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "here"))
    theirs = {"LIMBECK_CACHE": str(tmp_path / "elsewhere")}
    monkeypatch.setattr(ray_cluster, "environment", lambda threads: theirs)
    with pytest.raises(EnvironmentalError, match="give all nodes one shared folder"):
        compress.fill_cache(recipe=cached(tmp_path), products={}, ray=cluster, workers=1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("nowhere", "this is no address"),
        ("host:²", "this is no address"),
        (f"{'a' * 70}.com:1", "no Ray cluster answers there"),
        ("host:" + "9" * 5000, "no Ray cluster answers there"),
    ],
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
