"""The machine and the facts that affect its speed: processor, clock, container limits, cards, load.

Only reads.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import limbeck
from limbeck.contract.machine import host, versions, watch_other_work
from limbeck.contract.process import PARENT

_CPU = Path("/sys/devices/system/cpu/cpu0")
_ROOT = Path(limbeck.__file__).resolve().parents[1]
_WATCHED = 0.5  # seconds


def child_environment(**variables: str) -> dict[str, str]:
    """Environment of a child process: it imports the same packages, and ends with this process.

    ``variables`` are added.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid()), **variables}


def fingerprint(*, threads: int, device: str) -> dict[str, Any]:
    """The part of environment.json that is known before anything runs."""
    return {
        "host": host(),
        "governor": _read(_CPU / "cpufreq/scaling_governor"),
        "cpu": {"mhz": _mhz(), "cache_bytes": cache_bytes()},
        "limits": limits(),
        "gpus": gpus(),
        "threads": threads,
        "device": device,
        "versions": versions(),
    }


def load() -> dict[str, Any]:
    """How busy the machine is now."""
    return {"load_average": [round(value, 2) for value in os.getloadavg()], "at": time.time()}


def load_before() -> dict[str, Any]:
    """As `load`, and the processor time that other programs take now.

    The load average alone cannot tell: it still holds the training that this run has just done.
    """
    with watch_other_work() as other_work:
        time.sleep(_WATCHED)
        return load() | {"other_work": asdict(other_work())}


def limits(
    root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")
) -> dict[str, Any]:
    """Processors and bytes of memory that a container allows; None without a limit.

    The tightest limit of this group and its parents counts.

    Reads version 2 of cgroups (one tree), else version 1 (a tree a controller).
    """
    groups = dict[str, str]()
    for line in (_read(member) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path.strip("/"))
    if (root / "cgroup.controllers").exists():
        own = _upwards(root, groups.get("", ""))
        quotas = [q.split() for folder in own if (q := _read(folder / "cpu.max"))]
        cpus = [int(quota) / int(period) for quota, period in quotas if quota != "max"]
        memory = [int(m) for folder in own if (m := _read(folder / "memory.max")) and m != "max"]
    else:
        cpus = []
        for folder in _upwards(root / "cpu", groups.get("cpu", "")):
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            if quota and period and int(quota) > 0:
                cpus.append(int(quota) / int(period))
        found = (
            _read(f / "memory.limit_in_bytes")
            for f in _upwards(root / "memory", groups.get("memory", ""))
        )
        # version 1 writes a huge number for none
        memory = [int(m) for m in found if m and int(m) < 1 << 60]
    return {"cpus": min(cpus, default=None), "memory_bytes": min(memory, default=None)}


def _upwards(root: Path, path: str) -> list[Path]:
    """The folder of a group and those above it; a container sees its own as the root."""
    own = root / path
    return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]


def cache_bytes() -> int | None:
    """Size of the first core's last-level cache; None if the system does not report it."""
    sizes = [_read(path) for path in sorted(_CPU.glob("cache/index*/size"))]
    units = {"K": 1024, "M": 1024**2}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units),
        default=None,
    )


def gpus() -> list[dict[str, Any]]:
    """Cards that NVML lists: name, driver, memory in bytes; empty without a card or the binding."""
    with Nvml() as nvml:
        return [
            {
                "name": nvml.text(nvml.lib.nvmlDeviceGetName(card)),
                "driver": nvml.text(nvml.lib.nvmlSystemGetDriverVersion()),
                "memory_bytes": int(nvml.lib.nvmlDeviceGetMemoryInfo(card).total),
            }
            for card in nvml.cards
        ]


class Nvml:
    """NVIDIA's management library while it is open.

    Without it ``cards`` is empty and ``why`` has the reason.
    """

    def __enter__(self) -> Nvml:
        self.cards: list[Any] = []
        self.why = ""
        self.lib: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except ImportError:
            self.why = "nvidia-ml-py is not installed"
        except (
            Exception
        ) as error:  # no driver, no card, no permission: NVML has an error class for each
            self.why = f"NVML does not answer ({error})"
        else:
            self.lib = pynvml
            self.cards = [
                pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
            ]
        return self

    def __exit__(self, *_: object) -> None:
        if self.lib is not None:
            self.lib.nvmlShutdown()

    @staticmethod
    def text(value: Any) -> str:
        """A name; older bindings return bytes."""
        return value.decode() if isinstance(value, bytes) else str(value)

    def used_bytes(self) -> int:
        """Memory in use on all cards, by every process."""
        return sum(int(self.lib.nvmlDeviceGetMemoryInfo(card).used) for card in self.cards)

    def joules(self) -> float:
        """Energy that all cards took since their driver was loaded.

        Raises NVML's error where a card does not count it.
        """
        return (
            sum(int(self.lib.nvmlDeviceGetTotalEnergyConsumption(card)) for card in self.cards)
            / 1e3
        )


def _mhz() -> float | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2])
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return None
