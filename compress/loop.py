"""The one training loop, for every task, read from top to bottom: set up, fit, measure, save.

It knows budgets, steps, checkpoints and logs. What a batch is, its loss and its figures belong to
the task (`compress.tasks`). The number of micro-batches and processes changes nothing, because
every term is divided by the count of the global batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed import DistError

from compress.checkpoint import (
    CHECKPOINT,
    TRACKERS,
    Log,
    read_checkpoint,
    require_trackers,
    write_checkpoint,
)
from compress.host import give_memory_back, prepare_host, resolve_precision
from compress.models.language import resolve_device
from compress.models.sharded import like, whole
from compress.models.students import load_trainable_state, trainable_state
from compress.tasks import Figures, Step, Task, task_of
from limbeck.contract.artifact import Artifact, open_artifact, work_folder, write_artifact
from limbeck.contract.environment import require_launcher
from limbeck.contract.errors import DivergenceError, EnvironmentalError, ModelError
from limbeck.contract.files import write_atomically
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import AnyRecipe, EncoderTraining, Training
from limbeck.contract.results.student import StudentResult, TeacherResult

_FORMAT = 3  # of the checkpoint
Trained = Training | EncoderTraining


def train(
    *,
    recipe: AnyRecipe,
    out: Path,
    products: Mapping[str, Path],
    key: str,
    parents: Mapping[str, str],
) -> Artifact:
    """Train the recipe's student and write its artifact to ``out``. See `compress.distill`."""
    started = time.monotonic()
    run = setup(recipe=recipe, products=products, work=work_folder(out), key=key)
    reports = measure_teachers(run)
    prepared = time.monotonic() - started
    state = fit(run)
    if run.accelerator.is_main_process:
        spent = prepared + state.seconds
        _save(run, state, reports, out=out, key=key, parents=parents, spent=spent)
        shutil.rmtree(run.work)
    run.accelerator.wait_for_everyone()
    return open_artifact(out, kind="student", verify=False)


# Set up ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that does not change while the loop runs."""

    recipe: AnyRecipe
    accelerator: Any
    task: Task
    precision: str
    work: Path
    key: str
    log: Log | None  # of the first process only

    def record(self, event: str, figures: Figures) -> None:
        """Log an event, on the first process."""
        if self.log is not None:
            self.log.write(event, figures)

    def keep(self, samples: Sequence[Figures]) -> None:
        """Keep texts that the student wrote, on the first process."""
        if self.log is not None:
            self.log.write_samples(samples)

    def share(self, state: State) -> float:
        """Share of the budget that is spent, 1 at the end."""
        if self.task.steps is not None:
            return state.step / self.task.steps
        assert self.task.minutes is not None
        return state.seconds / (60 * self.task.minutes)


@dataclass
class State:
    """Everything that changes: a checkpoint holds it beside weights, optimiser and random state."""

    step: int = 0
    seen: int = 0  # label positions, or examples
    seconds: float = 0.0
    best_value: float = math.inf
    best_step: int = 0
    stale: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def setup(
    *, recipe: AnyRecipe, products: Mapping[str, Path], work: Path, key: str, model: Any = None
) -> Run:
    """Load teachers, text and student, and check that they fit together.

    ``work`` holds checkpoint and log. ``model`` is a causal LM to train further; None builds the
    recipe's student. Raises `ModelError`, `DataError`, `RecipeError` or `EnvironmentalError`.
    """
    config: Trained = recipe.training
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    prepare_host(config.threads)
    torch.manual_seed(recipe.seed)
    # A teacher's own recipe may have run in this process with another precision.
    AcceleratorState._reset_state()
    require_trackers(config.trackers, work)
    require_launcher(trains=True)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(config.trackers) or None,
            project_dir=work / TRACKERS,
        )
    except DistError as error:
        raise EnvironmentalError(
            "the processes of this job do not find each other; check MASTER_ADDR and MASTER_PORT, "
            f"which torchrun sets: {str(error).splitlines()[0]}"
        ) from error
    loaded = task_of(
        recipe, products=products, accelerator=accelerator, precision=precision, model=model
    )
    work.mkdir(parents=True, exist_ok=True)
    log = Log(work, accelerator, name=recipe.name) if accelerator.is_main_process else None
    give_memory_back()  # texts, and teachers that have answered
    return Run(recipe, accelerator, loaded, precision, work, key, log)


def measure_teachers(run: Run) -> dict[str, TeacherResult]:
    """Calibrate each teacher and measure it on held-out text.

    The figures are kept beside the checkpoint, for a training that goes on.
    """
    kept, names = run.work / "teachers.json", run.task.names
    if kept.exists() and (found := json.loads(kept.read_text("utf-8"))).get("key") == run.key:
        reports = {name: TeacherResult(**report) for name, report in found["reports"].items()}
    else:
        reports = {name: run.task.measure_teacher(k) for k, name in enumerate(names)}
        for name, report in reports.items():
            _require_finite(name, report)
        shown = {name: asdict(report) for name, report in reports.items()}
        write_atomically(kept, json.dumps({"key": run.key, "reports": shown}))
    run.task.temperatures[:] = [reports[name].temperature for name in names]
    for name in names:
        say(f"  teacher {name}: {run.task.describe_teacher(reports[name])}")
    return reports


def _require_finite(name: str, report: TeacherResult) -> None:
    for domain, nats in (report.nll or {}).items():
        if not math.isfinite(nats):
            raise ModelError(
                f"teacher {name}: its loss on the held-out text of {domain} is {nats} nats a "
                "token. Look for damaged weights, or give the model more range (precision: fp32)."
            )


# Fit -------------------------------------------------------------------------------------------


def fit(run: Run, *, ends: Callable[[], bool] = lambda: False) -> State:
    """Train to the end of the budget, or until held-out text has not improved for `patience` times.

    ``ends`` is asked after every measurement but the first, once the log has it, and may end the
    training early. Goes on from the checkpoint of an interrupted run.
    """
    if run.task.steps == 0:  # a merge: there is nothing to train
        return _first_state(run)
    config: Trained = run.recipe.training
    loaded, accelerator = run.task, run.accelerator
    trained = [p for p in loaded.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    student, optimizer = accelerator.prepare(loaded.student, optimizer)
    student.train()
    # FSDP has put sharded parameters in their place.
    trained = [p for p in student.parameters() if p.requires_grad]
    state = _load_checkpoint(run, optimizer) or _first_state(run)
    resumed, started, done = state.seconds, time.monotonic(), run.share(state)
    share_of_step = 1 / loaded.steps if loaded.steps else 0.0
    given = 60 * loaded.minutes - resumed if loaded.steps is None and loaded.minutes else None
    with task(
        f"training {run.recipe.name}",
        loaded.steps,
        done=state.step,
        unit=loaded.loss_unit,
        main=True,
        seconds=given,
    ) as progress:
        while done < 1 and (loaded.patience is None or state.stale < loaded.patience):
            rate = learning_rate(config, done, share_of_step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            step_started = time.monotonic()
            step = loaded.step(state.step, progress=done)
            figures = _step(run, step, student, optimizer, trained, state=state)
            state.step += 1
            state.seen += step.count
            state.seconds = _seconds_of_all(run, resumed + time.monotonic() - started)
            _log_step(run, state, step, figures, rate, time.monotonic() - step_started)
            progress.advance(1, loss=figures["loss"], **_best(state))
            before, done = done, run.share(state)
            share_of_step = share_of_step if loaded.steps else done - before
            if _is_measured(run, state, done):
                _measure(run, state)
                if ends():
                    if done < 1:
                        _save_checkpoint(run, optimizer, state)  # so that it can go on from here
                    break
                done = run.share(state)
            if state.step % config.checkpoint_every == 0 and done < 1:
                _save_checkpoint(run, optimizer, state)
    return state


def _step(
    run: Run, step: Step, student: Any, optimizer: Any, trained: list[Any], *, state: State
) -> Figures:
    """One optimiser step on the global batch. Raises `DivergenceError`."""
    accelerator, world = run.accelerator, run.accelerator.num_processes
    optimizer.zero_grad(set_to_none=True)
    for index, part in enumerate(step.parts):
        last = index == len(step.parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(student):
            # Processes average their gradients, and each loss is already a share of the whole.
            accelerator.backward(step.loss(student, part) * world)
    norm = float(whole(accelerator.clip_grad_norm_(trained, run.recipe.training.clip)))
    figures = step.figures() | {"gradient_norm": norm}
    if not (math.isfinite(figures["loss"]) and math.isfinite(norm)):
        checkpoint = run.work / CHECKPOINT
        good = (
            f"the last good checkpoint is {checkpoint}"
            if checkpoint.exists()
            else "there is no checkpoint yet"
        )
        wrong = [name for name, nats in figures["entropy"].items() if not math.isfinite(nats)]
        remedy = (
            f"The teacher {wrong[0]} answered with NaN or infinite numbers; leave it out, or use "
            "precision: fp32."
            if wrong
            else f"Lower training.learning_rate (now {run.recipe.training.learning_rate}) or use "
            "precision: fp32."
        )
        raise DivergenceError(
            f"training of {run.recipe.name} diverged at step {state.step + 1}: loss "
            f"{figures['loss']}, gradient norm {norm}; batch {step.fingerprint()}; {good}. {remedy}"
        )
    optimizer.step()
    return figures


def _log_step(
    run: Run, state: State, step: Step, figures: Figures, rate: float, seconds: float
) -> None:
    """Log a step that took ``seconds``, and keep the texts that the student wrote for it."""
    unit = run.task.unit
    seen = {"step": state.step, unit: state.seen, "seconds": round(state.seconds, 3)}
    speed = {"learning_rate": rate, f"{unit}_per_second": round(step.count / seconds, 1)}
    run.record("step", seen | figures | speed)
    run.keep(step.samples())


def learning_rate(config: Trained, done: float, step: float) -> float:
    """Linear warm-up to the peak, then cosine, linear or constant.

    ``done`` and ``step`` are shares of the budget: the part spent, and one step's part.
    """
    if done < config.warmup:
        return config.learning_rate * min(1.0, (done + step) / config.warmup)
    share = (done - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1.0
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return config.learning_rate * (1 - share)
        case "constant":
            return config.learning_rate


def _seconds_of_all(run: Run, seconds: float) -> float:
    """Take the first process's clock where the budget is in minutes.

    Learning rate and last step depend on it, and must be equal in all processes.
    """
    if run.task.steps is not None:
        return seconds
    device = run.accelerator.device
    return float(broadcast(torch.tensor(seconds, dtype=torch.float64, device=device)))


# Measure ---------------------------------------------------------------------------------------


def _first_state(run: Run) -> State:
    """The state before the first step; the student is measured where a measurement selects."""
    if run.task.selects is None:
        return State()
    state = State(best=trainable_state(run.task.student))
    _measure(run, state, count_stale=False)
    return state


def _is_measured(run: Run, state: State, done: float) -> bool:
    """Whether to measure after this step. Weights that are kept anyway are measured when saved."""
    if done >= 1:
        return run.task.selects is not None
    return state.step % run.recipe.training.evaluate_every == 0


def _measure(run: Run, state: State, *, count_stale: bool = True) -> None:
    """Measure and log the student; copy the weights if it is the best so far."""
    figures = run.task.measure(f"student, step {state.step}")
    if run.task.selects is not None:
        value = figures[run.task.selects]
        if value < state.best_value:
            state.best_value, state.best_step, state.stale = value, state.step, 0
            state.best = trainable_state(run.task.student)
        elif count_stale:
            state.stale += 1
    run.record("evaluate", {"step": state.step, run.task.unit: state.seen, **figures})


def _best(state: State) -> dict[str, float]:
    return {"held-out": state.best_value} if math.isfinite(state.best_value) else {}


# Save ------------------------------------------------------------------------------------------


def _save_checkpoint(run: Run, optimizer: Any, state: State) -> None:
    model, moments = trainable_state(run.task.student), whole(optimizer.state_dict())
    if run.log is None:
        return
    saved = {
        "format": _FORMAT,
        "key": run.key,
        "model": model,
        "optimizer": moments,
        "state": vars(state),
        "rng": torch.get_rng_state(),
        "files": run.log.sizes,
    }
    write_checkpoint(run.work / CHECKPOINT, saved)


def _load_checkpoint(run: Run, optimizer: Any) -> State | None:
    """Restore an interrupted run of the same key; clear anything else from the folder."""
    path, student = run.work / CHECKPOINT, run.task.student
    saved = read_checkpoint(path, key=run.key, device="cpu")
    if saved is None or saved.get("format") != _FORMAT:
        run.accelerator.wait_for_everyone()  # no process clears what another has not looked at
        if run.log is not None:
            run.log.cut({})
            path.unlink(missing_ok=True)
        return None
    load_trainable_state(student, saved["model"])
    moments, trained = saved["optimizer"], [p for p in student.parameters() if p.requires_grad]
    moments["state"] = {
        i: {n: like(trained[i], v) for n, v in s.items()} for i, s in moments["state"].items()
    }
    optimizer.load_state_dict(moments)
    torch.set_rng_state(saved["rng"].cpu())
    if run.log is not None:
        run.log.cut(saved["files"])
    state = State(**saved["state"])
    of = f" of {run.task.steps}" if run.task.steps else ""
    say(f"  going on at step {state.step + 1}{of}")
    return state


def _save(
    run: Run,
    state: State,
    reports: Mapping[str, TeacherResult],
    *,
    out: Path,
    key: str,
    parents: Mapping[str, str],
    spent: float,
) -> None:
    """Write the artifact, its student measured again as it will be loaded: merged, in fp32."""
    started, loaded = time.monotonic(), run.task
    assert run.log is not None
    give_memory_back()  # the student is about to be loaded a second time
    with write_artifact(out, kind="student", key=key, parents=parents, recipe=run.recipe) as draft:
        saved = loaded.save(draft.folder, state.best, seen=state.seen, best_step=state.best_step)
        entries = loaded.teacher_entries()
        (draft.folder / "teachers.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
        run.log.copy(draft.folder)
        draft.result = StudentResult(
            task=run.recipe.task,
            teachers=reports,
            steps=state.step,
            seconds=round(spent + time.monotonic() - started, 1),
            precision=run.precision,
            device=str(run.accelerator.device),
            **vars(saved),
        ).to_json()
