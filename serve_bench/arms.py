"""What is measured against what: the arms of a bench, and the process that runs one of them.

One process an arm, so that memory, threads and libraries of one are never another's. Knows artifacts and pipes; the other
end of the pipe is `serve_bench.worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from limbeck import errors
from limbeck.artifact import Artifact
from limbeck.errors import ArtifactError, EnvironmentalError

Role = Literal["teacher", "student", "form", "twin"]
_TAIL = 2000  # characters of a worker's stderr in an error


@dataclass(frozen=True)
class Arm:
    """One thing to measure. ``spec`` says how the worker opens it (see `serve_bench.runtimes`)."""

    id: str
    label: str  # in tables and pictures
    role: Role
    runtime: Literal["torch", "onnxruntime"]
    bytes: int  # on disk, of what is needed to run it: weights, and graph or adapter
    spec: Mapping[str, Any] = field(repr=False)

    @property
    def scored(self) -> bool:
        """Whether its quality is measured; the twin is the shipped form itself."""
        return self.role != "twin"


def list_arms(*, onnx: Artifact, student: Artifact) -> list[Arm]:
    """Teachers and student in torch, every form under onnxruntime, and the shipped form once more.

    Raises `ArtifactError` when a teacher's folder is gone.
    """
    arms = []
    for teacher in json.loads((student.path / "teachers.json").read_text()):
        folders = [Path(teacher[key]) for key in ("model", "adapter") if teacher.get(key)]
        for folder in folders:
            if not folder.is_dir():
                raise ArtifactError(
                    f"{folder}: the folder of teacher {teacher['name']} is gone, so the student cannot be measured "
                    "against it; run the recipe again, which makes it."
                )
        spec = {key: teacher.get(key) for key in ("model", "adapter", "quantize", "dtype")}
        arms.append(Arm(f"teacher:{teacher['name']}", teacher["name"], "teacher", "torch", _weights(*folders), spec))
    model = student.path / "model"
    arms.append(Arm("student", "student", "student", "torch", _weights(model), {"model": str(model)}))
    shipped = str(onnx.result["shipped"])
    for name, form in onnx.result["forms"].items():
        spec = {"artifact": str(onnx.path), "form": name}
        arms.append(Arm(f"onnx:{name}", name, "form", "onnxruntime", int(form["bytes"]), spec))
    arms.append(
        Arm(
            f"onnx:{shipped}:twin",
            f"{shipped} (copy)",
            "twin",
            "onnxruntime",
            int(onnx.result["forms"][shipped]["bytes"]),
            {"artifact": str(onnx.path), "form": shipped},
        )
    )
    return arms


def context_of(model: Path) -> int | None:
    """Tokens that a model folder's configuration allows; none when it does not say."""
    config = json.loads((model / "config.json").read_text())
    found = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    return int(found) if found else None


def _weights(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


class Worker:
    """The process that runs one arm. It waits on its pipe and uses no processor between commands."""

    def __init__(self, arm: Arm, *, threads: int, log: Path) -> None:
        """Start it; ``log`` receives its stderr, and what libraries print."""
        self.arm, self._log = arm, log
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",  # numpy is used for scoring only
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as stderr:
            # -P: the user's working directory is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "serve_bench.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True, bufsize=1,
            )  # fmt: skip
        self.opened: dict[str, Any] = {}

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises the worker's `LimbeckError`, or `EnvironmentalError`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died(command)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], EnvironmentalError)
            raise kind(f"{self.arm.id}: {answer['error']}")
        return answer

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # it died with a command of ours unread
                    pipe.close()

    def _died(self, command: str) -> EnvironmentalError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        hint = " Signal 9 is how Linux takes memory back: is there enough for all arms at once?" if code == -9 else ""
        tail = self._log.read_text(errors="replace").strip()[-_TAIL:] or "(nothing)"
        return EnvironmentalError(f"{self.arm.id}: its process {how} during {command!r}.{hint} Its last words:\n{tail}")


class Workers:
    """All arms' processes; leaving kills every one, whatever happened."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        """``folder`` receives their logs."""
        self._folder, self._threads = folder, threads
        self._all: dict[str, Worker] = {}

    def start(self, arm: Arm) -> Worker:
        """Start the process of an arm and open the arm in it."""
        worker = Worker(arm, threads=self._threads, log=self._folder / f"{len(self._all)}.log")
        self._all[arm.id] = worker
        worker.opened = worker.ask("open", runtime=arm.runtime, spec=dict(arm.spec), threads=self._threads)
        return worker

    def stop(self, arms: Iterable[Arm]) -> None:
        """End the processes of some arms."""
        for arm in arms:
            self._all.pop(arm.id).kill()

    def __getitem__(self, arm: Arm) -> Worker:
        return self._all[arm.id]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._all.values():
            worker.kill()
