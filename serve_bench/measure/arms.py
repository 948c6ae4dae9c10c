"""What is measured against what: the arms of a bench, and the process that runs one of them.

One process an arm, so that memory, threads and libraries of one are never another's. Knows artifacts and pipes; the other
end of the pipe is `serve_bench.measure.worker`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from limbeck.contract import errors
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, EnvironmentalError
from limbeck.contract.recipe import Bench, CompiledRuntime, GenaiRuntime, OpenAiRuntime
from serve_bench.measure.fairness import require_same_work
from serve_bench.measure.machine import child_environment

Role = Literal["teacher", "student", "form", "twin", "extra"]
RuntimeName = Literal["torch", "torch-compile", "onnxruntime", "onnxruntime-genai", "openai"]
_TAIL = 2000  # characters of a worker's stderr in an error


@dataclass(frozen=True)
class Arm:
    """One thing to measure. ``spec`` says how the worker opens it (see `serve_bench.measure.runtimes`)."""

    id: str
    label: str  # in tables and pictures
    role: Role
    runtime: RuntimeName
    bytes: int  # on disk, of what is needed to run it: weights, and graph or adapter
    spec: Mapping[str, Any] = field(repr=False)

    @property
    def scored(self) -> bool:
        """Whether its quality is measured; a twin is the form that is judged itself, and extra runtimes run what is scored."""
        return self.role not in ("twin", "extra")


def list_arms(*, onnx: Artifact, student: Artifact, bench: Bench | None = None) -> list[Arm]:
    """Teachers and student in torch, every form under onnxruntime, the shipped form once more, and what the bench adds.

    Raises `ArtifactError` when a teacher's folder is gone.
    """
    bench, arms = bench or Bench(), list[Arm]()
    shipped = str(onnx.result["shipped"])
    device = bench.device or provider_of(onnx, shipped)
    for teacher in json.loads((student.path / "teachers.json").read_text()):
        folders = [Path(teacher[key]) for key in ("model", "adapter") if teacher.get(key)]
        for folder in folders:
            if not folder.is_dir():
                raise ArtifactError(
                    f"{folder}: the folder of teacher {teacher['name']} is gone, so the student cannot be measured "
                    "against it; run the recipe again, which makes it."
                )
        spec = {key: teacher.get(key) for key in ("model", "adapter", "quantize", "dtype")} | {
            "device": device
        }
        if bench.torch_dtype is not None:
            spec["dtype"] = bench.torch_dtype
        arms.append(
            Arm(
                f"teacher:{teacher['name']}",
                teacher["name"],
                "teacher",
                "torch",
                weights_on_disk(*folders),
                spec,
            )
        )
    model = student.path / "model"
    plain = {"model": str(model), "dtype": bench.torch_dtype or "fp32", "device": device}
    arms.append(Arm("student", "student", "student", "torch", weights_on_disk(model), plain))
    arms += [form_arm(onnx, name) for name in onnx.result["forms"]]
    arms.append(form_arm(onnx, shipped, twin=True))
    for extra in bench.runtimes:
        match extra:
            case GenaiRuntime():
                size, spec = (
                    int(onnx.result["forms"][shipped]["bytes"]),
                    {"artifact": str(onnx.path), "device": provider_of(onnx, shipped)},
                )
                arms.append(
                    Arm("genai", f"{shipped}, genai", "extra", "onnxruntime-genai", size, spec)
                )
            case CompiledRuntime():
                size = weights_on_disk(model)
                arms.append(
                    Arm("compiled", "student, compiled", "extra", "torch-compile", size, plain)
                )
            case OpenAiRuntime():
                arms.append(
                    Arm(
                        "openai",
                        extra.url,
                        "extra",
                        "openai",
                        0,
                        extra.model_dump(exclude={"kind"}),
                    )
                )
    return arms


def provider_of(onnx: Artifact, form: str) -> str:
    """The execution provider that a form was made for."""
    return str(onnx.result["forms"][form].get("provider", "cpu"))


def form_arm(onnx: Artifact, form: str, *, twin: bool = False) -> Arm:
    """A form of an ``onnx`` artifact under onnxruntime; ``twin`` makes it the copy that shows the noise."""
    spec = {"artifact": str(onnx.path), "form": form, "device": provider_of(onnx, form)}
    name, label, role = (
        (f"onnx:{form}:twin", f"{form} (copy)", "twin") if twin else (f"onnx:{form}", form, "form")
    )
    return Arm(
        name, label, cast(Role, role), "onnxruntime", int(onnx.result["forms"][form]["bytes"]), spec
    )


def context_of(model: Path) -> int | None:
    """Tokens that a model folder's configuration allows; none when it does not say."""
    config = json.loads((model / "config.json").read_text())
    found = config.get(
        "max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings")
    )
    return int(found) if found else None


def weights_on_disk(*folders: Path) -> int:
    """Bytes of the safetensors files in some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


class Worker:
    """The process that runs one arm. It waits on its pipe and uses no processor between commands."""

    def __init__(
        self, arm: Arm, *, threads: int, log: Path, module: str = "serve_bench.measure.worker"
    ) -> None:
        """Start it, running ``module``; ``log`` receives its stderr, and what libraries print."""
        self.arm, self._log = arm, log
        self.spawned = time.perf_counter()
        environment = child_environment(
            OMP_NUM_THREADS=str(threads),
            OPENBLAS_NUM_THREADS="1",  # numpy is used for scoring only
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_OFFLINE="1",
        )
        with log.open("wb") as stderr:
            # -P: the user's working directory is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True, bufsize=1,
            )  # fmt: skip
        self.opened: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def open(self, *, threads: int) -> None:
        """Open the arm in it; raises as `ask`."""
        self.opened = self.ask(
            "open", runtime=self.arm.runtime, spec=dict(self.arm.spec), threads=threads
        )

    def generate(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """One greedy generation; times in seconds after its start. Raises `DataError` when it did other work than was asked."""
        answer = self.ask("generate", prompt=list(prompt), new_tokens=new_tokens)
        return self._checked(answer | {"rows": [answer["tokens"]]}, [prompt], new_tokens)

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """The same of several prompts of one length at once."""
        answer = self.ask(
            "batch", prompts=[list(prompt) for prompt in prompts], new_tokens=new_tokens
        )
        return self._checked(answer | {"rows": answer["tokens"]}, prompts, new_tokens)

    def _checked(
        self, answer: dict[str, Any], prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> dict[str, Any]:
        require_same_work(
            self.arm.id,
            answer,
            rows=len(prompts),
            prompt_tokens=len(prompts[0]),
            new_tokens=new_tokens,
        )
        answer["at"] = [round(t - answer["started"], 7) for t in answer["at"]]
        return answer

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
        hint = (
            " Signal 9 is how Linux takes memory back: is there enough for all arms at once?"
            if code == -9
            else ""
        )
        tail = self._log.read_text(errors="replace").strip()[-_TAIL:] or "(nothing)"
        return EnvironmentalError(
            f"{self.arm.id}: its process {how} during {command!r}.{hint} Its last words:\n{tail}"
        )


class Workers:
    """All arms' processes; leaving kills every one, whatever happened."""

    def __init__(
        self, folder: Path, *, threads: int, module: str = "serve_bench.measure.worker"
    ) -> None:
        """``folder`` receives their logs; ``module`` is what the processes run."""
        self._folder, self._threads, self._module = folder, threads, module
        self._all: dict[str, Worker] = {}

    def start(self, arm: Arm) -> Worker:
        """Start the process of an arm and open the arm in it."""
        worker = Worker(
            arm,
            threads=self._threads,
            log=self._folder / f"{len(self._all)}.log",
            module=self._module,
        )
        self._all[arm.id] = worker
        worker.open(threads=self._threads)
        return worker

    def stop(self, arms: Iterable[Arm]) -> None:
        """End the processes of some arms."""
        for arm in list(arms):
            self._all.pop(arm.id).kill()

    @property
    def running(self) -> list[Arm]:
        """Arms that are open."""
        return [worker.arm for worker in self._all.values()]

    def __getitem__(self, arm: Arm) -> Worker:
        return self._all[arm.id]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._all.values():
            worker.kill()
