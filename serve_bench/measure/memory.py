"""Memory and energy, in a pass of its own: one arm after the other starts and is watched while it
generates. Those that were started before it wait.

Nothing is timed here, so that watching disturbs no figure. Knows process trees, NVML and RAPL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.contract.progress import task
from limbeck.contract.results.bench import Arm
from serve_bench.measure.host.machine import Nvml
from serve_bench.measure.units import Unit
from serve_bench.measure.workers import Worker, Workers

_EVERY = 0.01  # seconds between looks at the process tree
_ENERGY_RUNS = 3  # generations over which energy is counted, after a warm-up
_POWERCAP = Path("/sys/class/powercap")


def measure_memory(workers: Workers, arms: Sequence[Arm], unit: Unit) -> dict[str, dict[str, Any]]:
    """By arm id: ``peak_rss_bytes`` of its process tree from start to last token, ``device_bytes``,
    and ``energy``.

    Starts the arms, which stay open. Raises as the workers do.
    """
    found = {}
    with task("memory", len(arms)) as progress, Nvml() as nvml, Energy(nvml) as energy:
        for arm in arms:
            before = nvml.used_bytes() if nvml.cards else 0
            worker = workers.create(arm)
            with Watch(worker.pid, nvml) as watch:
                workers.open(arm)
                peak = unit.once(worker)
            # The kernel's own mark misses no moment of the process.
            peak = max(watch.peak_rss, peak)
            joules = energy.over(partial(_repeat, worker, unit))
            found[arm.id] = {
                "peak_rss_bytes": peak,
                "device_bytes": watch.peak_device - before
                if nvml.cards and arm.spec.get("device") == "cuda"
                else None,
                "energy": energy.per_token(joules, _ENERGY_RUNS * unit.tokens_made),
            }
            progress.advance()
    return found


def _repeat(worker: Worker, unit: Unit) -> None:
    for _ in range(_ENERGY_RUNS):
        unit.once(worker)


class Watch:
    """Peak memory of a process tree and of the cards until it is left, in bytes."""

    def __init__(self, pid: int, nvml: Nvml) -> None:
        self._pid, self._nvml = pid, nvml
        self.peak_rss = self.peak_device = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(_EVERY):
            self.peak_rss = max(self.peak_rss, tree_rss(self._pid))
            if self._nvml.cards:
                self.peak_device = max(self.peak_device, self._nvml.used_bytes())


def tree_rss(pid: int) -> int:
    """Bytes that a process and its descendants hold; shared pages count for each."""
    import psutil

    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in family:
        try:
            total += int(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue  # it ended between being listed and being asked
    return total


class Energy:
    """Joules by RAPL (every processor package) and NVML (every card), idle power included.

    Without a source it gives the reason.
    """

    def __init__(self, nvml: Nvml, powercap: Path = _POWERCAP) -> None:
        """Find the sources that can be read."""
        self._sources: dict[str, Callable[[], float]] = {}
        self._why: list[str] = []
        self._packages = [
            Package(path)
            for path in sorted(powercap.glob("intel-rapl:*"))
            if path.name.count(":") == 1
        ]
        if not self._packages:
            self._why.append(f"no RAPL package in {powercap}")
        else:
            self._offer("RAPL", lambda: sum(package.joules() for package in self._packages))
        if nvml.cards:
            self._offer("NVML", nvml.joules)
        elif nvml.why:
            self._why.append(nvml.why)

    def __enter__(self) -> Energy:
        return self

    def __exit__(self, *_: object) -> None:
        self._sources.clear()

    def over(self, work: Callable[[], object]) -> float | None:
        """Joules that ``work`` took; without a source, None and ``work`` is not done."""
        if not self._sources:
            return None
        before = {name: read() for name, read in self._sources.items()}
        work()
        return sum(read() - before[name] for name, read in self._sources.items())

    def per_token(self, joules: float | None, tokens: int) -> dict[str, Any]:
        """The entry of an arm in docs/artifacts.md."""
        if joules is None:
            return {"joules_per_token": None, "why": "; ".join(self._why)}
        return {"joules_per_token": joules / tokens, "source": " + ".join(self._sources)}

    def _offer(self, name: str, read: Callable[[], float]) -> None:
        try:
            read()
        except (
            Exception
        ) as error:  # RAPL is root's alone on many systems; old cards count no energy
            self._why.append(f"{name} cannot be read ({error})")
        else:
            self._sources[name] = read


class Package:
    """The energy counter of one processor package; it wraps around."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turns, self._last = 0, 0

    def joules(self) -> float:
        """Joules since a fixed moment in the past. Raises `OSError` if they cannot be read."""
        now = int((self._path / "energy_uj").read_text("utf-8"))
        if now < self._last:
            self._turns += int((self._path / "max_energy_range_uj").read_text("utf-8"))
        self._last = now
        return (now + self._turns) / 1e6
