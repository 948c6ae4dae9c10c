"""Check this machine: what is there, what is missing, and the command that installs it.

Reads package metadata, /proc and `nvidia-smi`. Imports onnxruntime for its execution providers,
never torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from limbeck.contract.errors import LimbeckError
from limbeck.contract.machine import host, sums_overflow, versions
from limbeck.contract.recipe import PackageModel, PackageText, load_recipe
from limbeck.contract.sources.places import cache_folder, package_root
from limbeck.runtime.session import import_onnxruntime

_ROOM = 4_000_000_000  # bytes that the demo writes, cache and run folder together
_MEMORY = 8_000_000_000  # bytes that the demo needs
_FOLDED = ("python", "libraries", "onnx runtime", "server", "demo")  # shown by --all only
_DEMO = "smollm2/135m-two-experts"


@dataclass
class Findings:
    """Findings. ``missing`` stops the job, ``advice`` does not; each names a command to run."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def able(self) -> bool:
        """Whether `limbeck run` can work here."""
        return not self.missing

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"able": self.able, "missing": self.missing, "advice": self.advice, **self.facts}

    def as_text(self, everything: bool = False) -> str:
        """Lines for a terminal, problems first; ``everything`` adds all versions."""
        able = (
            "this machine can run Limbeck" if self.able else "this machine cannot run Limbeck yet"
        )
        lines = [able]
        for title, items in (("missing", self.missing), ("advice", self.advice)):
            if items:
                lines += [title, *(f"  - {item}" for item in items)]
        for title, facts in self.facts.items():
            if title in _FOLDED and not everything:
                continue
            lines.append(title)
            width = max(map(len, facts), default=0)
            lines += [f"  {name:{width}}  {_shown(value)}" for name, value in facts.items()]
        if not everything:
            lines.append("limbeck doctor --all shows the versions of all libraries")
        return "\n".join(lines)


def examine() -> Findings:
    """Look at Python, libraries, runtime, processor, memory, disk, GPU and the demo's packages."""
    findings = Findings()
    findings.facts["python"] = {"version": versions()["python"], "executable": sys.executable}
    _libraries(findings)
    _runtime(findings)
    _machine(findings)
    _gpu(findings)
    _server(findings)
    _demo(findings)
    return findings


def _libraries(findings: Findings) -> None:
    """Every declared dependency of the core, from the metadata of the installed Limbeck."""
    found: dict[str, Any] = {}
    try:
        declared = importlib.metadata.requires("limbeck") or []
    except importlib.metadata.PackageNotFoundError:
        declared = []
        findings.missing.append(
            "limbeck itself is not installed; run in its folder: pip install -e '.[cpu]'"
        )
    for wanted in map(Requirement, declared):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found[wanted.name] = _version(wanted.name)
        if found[wanted.name] is None:
            findings.missing.append(f"{wanted.name} is not installed; run: pip install '{wanted}'")
        elif not wanted.specifier.contains(found[wanted.name], prereleases=True):
            findings.missing.append(
                f"{wanted.name} is {found[wanted.name]}, expected {wanted.specifier}; run: "
                f"pip install '{wanted}'"
            )
    findings.facts["libraries"] = found


def _runtime(findings: Findings) -> None:
    facts: dict[str, Any] = {
        name: _version(name)
        for name in (
            "onnxruntime",
            "onnxruntime-gpu",
            "onnxruntime-genai",
            "onnxruntime-genai-cuda",
        )
    }
    try:
        facts["execution providers"] = import_onnxruntime().get_available_providers()
    except LimbeckError as error:
        findings.missing.append(str(error))
    if facts["onnxruntime-genai"] is None and facts["onnxruntime-genai-cuda"] is None:
        findings.missing.append(
            "onnxruntime-genai is not installed and builds the graphs; run: pip install "
            "'limbeck[cpu]' (or 'limbeck[gpu]')"
        )
    findings.facts["onnx runtime"] = facts


def _machine(findings: Findings) -> None:
    machine = host()
    findings.facts["machine"] = {
        "system": machine["system"],
        "processor": machine["processor"],
        "vector flags": machine["flags"],
        "cores": machine["cores"],
        "memory": _gigabytes(machine["memory_bytes"]),
    }
    if sums_overflow():
        findings.advice.append(
            "this processor has no VNNI: 8-bit arithmetic is slower than it could be, and "
            "int8-dynamic and int8-static get "
            "weights of 7 bits here (reduce_range), since those of 8 would overflow"
        )
    if machine["memory_bytes"] < _MEMORY:
        findings.advice.append(
            f"the demo needs about {_gigabytes(_MEMORY)} of memory; `limbeck run pico` needs 2 GB"
        )
    folders = {"cache": cache_folder(), "runs": Path("runs").resolve()}
    findings.facts["disk"] = {}
    for name, folder in folders.items():
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        room = shutil.disk_usage(existing).free
        findings.facts["disk"][name] = f"{folder} ({_gigabytes(room)} free)"
        if not os.access(existing, os.W_OK):
            remedy = (
                "set LIMBECK_CACHE to another folder"
                if name == "cache"
                else "go to another folder, or use --out"
            )
            findings.missing.append(f"{existing} cannot be written; {remedy}")
        if room < _ROOM:
            findings.advice.append(
                f"{folder}: the demo writes about {_gigabytes(_ROOM)}; free some room or "
                + ("set LIMBECK_CACHE" if name == "cache" else "name another disk with --out")
            )


def _gpu(findings: Findings) -> None:
    tool = shutil.which("nvidia-smi")
    cards: list[str] = []
    if tool:
        asked = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            findings.advice.append("nvidia-smi does not answer; look at the driver")
        else:
            cards = [
                line.strip()
                for line in answer.stdout.splitlines()
                if line.strip() and answer.returncode == 0
            ]
    torch = _version("torch") or ""
    findings.facts["gpu"] = {"cards": cards or "none found", "torch": torch or "not installed"}
    if cards and torch.endswith("+cpu"):
        findings.advice.append(
            "there is a GPU, but this torch is built for the CPU; run: pip install "
            "--force-reinstall torch"
        )
    if cards and _version("onnxruntime-gpu") is None:
        findings.advice.append(
            "there is a GPU, but onnxruntime is built for the CPU; run: pip uninstall -y "
            "onnxruntime onnxruntime-genai, then pip install 'limbeck[gpu]'"
        )


def _server(findings: Findings) -> None:
    """Packages that only `limbeck serve` needs."""
    facts = {name: _version(name) for name in ("fastapi", "uvicorn", "prometheus-client")}
    if absent := [name for name, version in facts.items() if version is None]:
        findings.advice.append(
            f"limbeck serve needs {', '.join(absent)}, which nothing else does; run: pip "
            "install 'limbeck[serve]'"
        )
    findings.facts["server"] = facts


def _demo(findings: Findings) -> None:
    """The packages that the demo takes its model and its text from."""
    recipe = load_recipe(_DEMO)
    facts: dict[str, Any] = {}
    for source in (*(domain.text for domain in recipe.data.domains), recipe.base):
        assert isinstance(source, PackageModel | PackageText)
        facts[source.package] = _version(source.package)
        try:
            package_root(source.package, source.version)
        except LimbeckError as error:
            findings.advice.append(f"the demo: {error}")
    findings.facts["demo"] = facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)
