"""Encoders: several classifiers or sentence encoders into one small one. Teachers answer once, then the loop runs without them.

Shapes: K teachers, R examples of a batch, N of the whole, L tokens, C classes, d student and d_k teacher width.

Classification is `compress.loss` with classes in place of the vocabulary: the answer z[R, C] goes in as the state of one
position under a head that changes nothing, so weights, divergences and calibration are the very same code.

Embedding, with unit vectors s_i of the student and e_ki of teacher k, and similarities within the batch:

    p_ki = softmax_{j != i}(e_ki . e_kj / tau)     q_i = softmax_{j != i}(s_i . s_j / tau)
    H_ki = -sum_j p_ki(j) log p_ki(j)              weights w_ki of `compress.loss.weigh` from it (no labels)
    cosine      1/R sum_i sum_k w_ki (1 - cos(P_k s_i, e_ki))
    relational  1/R sum_i KL(sum_k w_ki p_ki || q_i),  or the mean over i != j of (sum_k w_ki e_ki.e_kj - s_i.s_j)^2

Entropy weights after Meng et al. (arXiv 2507.15198), the entropy replaced by that of the similarities; the KL between similarity
distributions after CompRess (arXiv 2010.14713) and SEED (arXiv 2101.04731), the squared form after RKD (arXiv 1904.05068). P_k is
a Linear a teacher, the identity to begin with where widths agree: the teachers' spaces have nothing to do with one another, so
no one vector could be near all of them. It lies outside the student and is thrown away.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn

from compress.data.examples import load_examples, training_order
from compress.features import Projections, feature_loss
from compress.head import Head, fit_temperature
from compress.host import give_memory_back, prepare_host
from compress.loop import learning_rate, read_checkpoint, resolve_precision, write_checkpoint
from compress.loss import fused_loss
from compress.models.encoders import (
    base_folder,
    build_student,
    class_names,
    encoder_folder,
    load_body,
    load_classifier,
    pooled,
    require_context,
)
from compress.models.language import (
    folder_config,
    load_tokenizer,
    require_same_tokenizer,
    resolve_device,
)
from compress.models.students import load_trainable_state, trainable_state
from compress.states import TeacherStates
from compress.weights import weigh
from limbeck.contract import sources
from limbeck.contract.artifact import Artifact, open_artifact, work_folder, write_artifact
from limbeck.contract.errors import DivergenceError, EnvironmentalError, ModelError
from limbeck.contract.examples import EXAMPLES, Examples, accuracy, macro_f1, save_examples
from limbeck.contract.files import disk_full_is_a_user_error
from limbeck.contract.heldout import CALIBRATION, save_calibration
from limbeck.contract.licences import sources_of
from limbeck.contract.progress import processes, say, task
from limbeck.contract.recipe import (
    ClassificationRecipe,
    EmbeddingRecipe,
    EncoderRecipe,
    EncoderShrinkStudent,
    FittedCalibration,
    FixedCalibration,
    Weights,
)

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
ROWS = 32  # examples of a batch that is not trained on
_CALIBRATION_ROWS = 64  # training examples that travel with a student, for the export's calibration

Answers = Tensor  # logits [N, C], or unit vectors [N, d]
Model = Callable[[Tensor, Tensor], Answers]  # of ids and mask [R, L]


class Objective(Protocol):
    """What differs between the tasks."""

    temperatures: list[float]  # calibration, by teacher

    def answer(self, model: Any, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """What a student says of a batch, in fp32."""

    def loss(
        self, answers: Answers, rows: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the training examples ``rows``, and what the log says of it."""

    def measure(self, answers: Answers) -> dict[str, float]:
        """Figures of what someone says of the held-out examples."""


@dataclass(frozen=True)
class Teacher:
    """One teacher on disk, and what it says of every example."""

    name: str
    folder: Path
    digest: str
    pooling: str
    train: Answers
    heldout: Answers


def train_encoder(
    *,
    recipe: EncoderRecipe,
    out: Path,
    products: Mapping[str, Path],
    key: str,
    parents: Mapping[str, str],
) -> Artifact:
    """Train the recipe's student and write its artifact to ``out``. See `compress.distill`.

    The weights after the last step are kept: to choose among steps by the held-out examples would flatter them.
    """
    if processes() > 1:
        raise EnvironmentalError(
            "encoders are trained by one process; start limbeck without torchrun."
        )
    started, config = time.monotonic(), recipe.training
    device = resolve_device(config.device)
    prepare_host(config.threads)
    torch.manual_seed(recipe.seed)
    folders = [
        encoder_folder(t.model, folder=recipe.folder, product=products.get(t.name))
        for t in recipe.teachers
    ]
    base = base_folder(recipe.student, folder=recipe.folder, teachers=folders)
    places = {"the student": base} | {
        t.name: place for t, place in zip(recipe.teachers, folders, strict=True)
    }
    require_same_tokenizer(places)
    for name, place in places.items():
        require_context(name, folder_config(place), recipe.data.max_tokens)
    known = sources_of(recipe, base=base, teachers=folders)
    tokenizer = load_tokenizer(base)
    train, heldout = load_examples(recipe, tokenizer)
    give_memory_back()  # of the texts
    say(f"  {len(train)} training and {len(heldout)} held-out examples")
    order = training_order(
        config.examples // config.batch * config.batch, examples=len(train), seed=recipe.seed
    )
    classes = (
        [c.name for c in recipe.data.classes] if isinstance(recipe, ClassificationRecipe) else None
    )
    model, importance, kept = build_student(
        recipe.student,
        folder=base,
        classes=classes,
        calibration=_calibration(recipe, train, order),
        seed=recipe.seed,
    )
    require_context(
        "the student", model.config, recipe.data.max_tokens
    )  # a fresh one has sizes of its own
    if kept:
        say(
            f"  student: {kept['parameters'] / 1e6:.1f}M of {kept['parameters_before'] / 1e6:.1f}M parameters kept"
        )
    teachers = [
        _ask(
            recipe,
            index,
            folder,
            train,
            heldout,
            products=products,
            used=np.unique(order),
            device=device,
        )
        for index, folder in enumerate(folders)
    ]
    objective: Objective
    if isinstance(recipe, ClassificationRecipe):
        objective = Classification(recipe, teachers, train, heldout, device)
    else:
        objective = Embedding(recipe, teachers, model.config.hidden_size, device)
    reports: dict[str, dict[str, Any]] = {
        t.name: {"metrics": objective.measure(t.heldout), "temperature": c}
        for t, c in zip(teachers, objective.temperatures, strict=True)
    }
    for name, report in reports.items():
        say(f"  teacher {name}: {_shown(report['metrics'])}")

    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    trained = nn.ModuleDict({"model": model})
    if isinstance(objective, Embedding):
        trained["projections"] = objective.projections
    run = Run(recipe, objective, trained.to(device), train, heldout, order, work, key, device)
    prepared = time.monotonic() - started
    give_memory_back()  # of the teachers
    state = fit(run)
    give_memory_back()  # of the optimiser: the student is read once more
    with write_artifact(out, kind="student", key=key, parents=parents, recipe=recipe) as draft:
        model.save_pretrained(draft.folder / "model")
        tokenizer.save_pretrained(draft.folder / "model")
        if importance is not None:
            save_file(importance.tensors(), draft.folder / "importance.safetensors")
        save_examples(draft.folder / EXAMPLES, heldout)
        save_calibration(draft.folder / CALIBRATION, _rows(train, order[:_CALIBRATION_ROWS]))
        entries = [
            {
                "name": t.name,
                "model": str(t.folder),
                "pooling": t.pooling,
                "temperature": c,
                "digest": t.digest,
            }
            | known["teachers"][t.name]
            for t, c in zip(teachers, objective.temperatures, strict=True)
        ]
        (draft.folder / "teachers.json").write_text(json.dumps(entries, indent=1))
        shutil.copy(work / LOG, draft.folder / LOG)
        load = load_body if classes is None else load_classifier
        saved = load(draft.folder / "model").to(device)  # as it will be loaded, in fp32
        draft.result = {
            "task": recipe.task,
            "classes": classes,
            "metrics": objective.measure(
                _answers(lambda i, m: objective.answer(saved, i, m), heldout, device=device)
            ),
            "teachers": reports,
            "examples": {"train": len(train), "heldout": len(heldout), "seen": len(order)},
            "steps": state.step,
            "seconds": round(prepared + state.seconds, 1),
            "parameters": {"total": saved.num_parameters()},
            "precision": resolve_precision(config.precision, device),
            "device": str(device),
            "shrink": kept or None,
            "sources": {name: known[name] for name in ("base", "texts")},
        }
    shutil.rmtree(work)
    return open_artifact(out, kind="student", verify=False)


# The loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Everything the loop holds that does not change."""

    recipe: EncoderRecipe
    objective: Objective
    trained: nn.ModuleDict  # the student, and projections beside it
    train: Examples
    heldout: Examples
    order: Any  # rows of the training examples, [steps x batch]
    work: Path
    key: str
    device: torch.device


@dataclass
class State:
    """Everything that changes: what a checkpoint holds beside weights, optimiser and random state."""

    step: int = 0
    seconds: float = 0.0


def fit(run: Run) -> State:
    """Train to the end of the budget, from the checkpoint of an interrupted run where there is one."""
    config, model = run.recipe.training, run.trained["model"]
    parameters = [p for p in run.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    state = _load_checkpoint(run, optimizer)
    steps, resumed, started = len(run.order) // config.batch, state.seconds, time.monotonic()
    half = resolve_precision(config.precision, run.device) == "bf16"
    model.train()
    with task(f"training {run.recipe.name}", steps, done=state.step) as progress:
        while state.step < steps:
            done = state.step / steps
            rate = learning_rate(config, done, 1 / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = run.order[state.step * config.batch : (state.step + 1) * config.batch]
            ids, mask = (torch.from_numpy(a).to(run.device) for a in run.train.batch(rows))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=half):
                answers = run.objective.answer(model, ids, mask)
            loss, figures = run.objective.loss(answers, torch.from_numpy(rows), done)
            loss.backward()
            norm, value = (
                float(nn.utils.clip_grad_norm_(parameters, config.clip)),
                float(loss.detach()),
            )
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise DivergenceError(
                    f"training of {run.recipe.name} diverged at step {state.step + 1}: loss {value}, gradient norm {norm}. "
                    f"Lower training.learning_rate (now {config.learning_rate}) or use precision: fp32."
                )
            optimizer.step()
            state.step += 1
            state.seconds = resumed + time.monotonic() - started
            entry = {
                "step": state.step,
                "examples": state.step * config.batch,
                "loss": value,
                **figures,
            }
            _record(run, "step", entry | {"gradient_norm": norm, "learning_rate": rate})
            progress.advance(1, loss=value)
            if (
                state.step % config.evaluate_every == 0 and state.step < steps
            ):  # the last is measured as it is saved
                _evaluate(run, state)
                model.train()
            if state.step % config.checkpoint_every == 0 and state.step < steps:
                _save_checkpoint(run, optimizer, state)
    model.eval()
    return state


def _evaluate(run: Run, state: State) -> None:
    model = run.trained["model"].eval()
    answers = _answers(
        lambda i, m: run.objective.answer(model, i, m), run.heldout, device=run.device
    )
    _record(run, "evaluate", {"step": state.step, **run.objective.measure(answers)})


def _record(run: Run, event: str, figures: Mapping[str, Any]) -> None:
    with disk_full_is_a_user_error(run.work / LOG), (run.work / LOG).open("a") as file:
        file.write(json.dumps({"event": event, **figures}) + "\n")


def _save_checkpoint(run: Run, optimizer: Any, state: State) -> None:
    saved = {
        "key": run.key, "trained": trainable_state(run.trained), "optimizer": optimizer.state_dict(), "state": vars(state),
        "rng": torch.get_rng_state(), "log_bytes": (run.work / LOG).stat().st_size,
    }  # fmt: skip
    write_checkpoint(run.work / CHECKPOINT, saved)


def _load_checkpoint(run: Run, optimizer: Any) -> State:
    """The state of an interrupted run of the same key; anything else in the folder is cleared."""
    path = run.work / CHECKPOINT
    saved = read_checkpoint(path, key=run.key, device=run.device)
    if saved is None:
        (run.work / LOG).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        torch.manual_seed(run.recipe.seed)  # of dropout, whatever was drawn before
        return State()
    load_trainable_state(run.trained, saved["trained"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"].cpu())
    with (run.work / LOG).open("r+b") as file:
        file.truncate(saved["log_bytes"])
    state = State(**saved["state"])
    say(f"  going on at step {state.step + 1}")
    return state


def _calibration(recipe: EncoderRecipe, train: Examples, order: Any) -> list[Tensor]:
    """Rows without padding that a shrunk student's importance is measured on."""
    if not isinstance(recipe.student, EncoderShrinkStudent):
        return []
    chosen = _rows(train, order[: recipe.student.calibration_examples])
    return [torch.from_numpy(row).long()[None] for row in chosen]


def _rows(train: Examples, chosen: Any) -> list[npt.NDArray[np.int32]]:
    """Token rows without padding."""
    return [train.input_ids[row, : train.lengths[row]] for row in chosen]


@torch.no_grad()
def _answers(
    model: Model, examples: Examples, *, device: torch.device, label: str = "held-out examples"
) -> Answers:
    """What ``model`` says of every example, in their order; rows of like length go together, which saves padding."""
    order = np.argsort(examples.lengths, kind="stable")
    parts = []
    with task(label, len(order)) as progress:
        for at in range(0, len(order), ROWS):
            ids, mask = examples.batch(order[at : at + ROWS])
            parts.append(
                model(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)).float()
            )
            progress.advance(len(ids))
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, torch.from_numpy(order).to(device), found)


def _ask(
    recipe: EncoderRecipe, index: int, folder: Path, train: Examples, heldout: Examples, *,
    products: Mapping[str, Path], used: Any, device: torch.device,
) -> Teacher:  # fmt: skip
    """Load a teacher, let it answer every example that training or measuring will need, and let it go."""
    entry = recipe.teachers[index]
    digest = sources.model_digest(
        entry.model, folder=recipe.folder, products=products, teacher=entry.name
    )
    pooling = str(getattr(entry, "pooling", ""))
    if isinstance(recipe, ClassificationRecipe):
        loaded = load_classifier(folder).to(device)
        _require_classes(
            entry.name, class_names(loaded), [c.name for c in recipe.data.classes], folder
        )

        def model(ids: Tensor, mask: Tensor) -> Answers:
            logits: Tensor = loaded(input_ids=ids, attention_mask=mask).logits
            return logits
    else:
        loaded = load_body(folder).to(device)

        def model(ids: Tensor, mask: Tensor) -> Answers:
            return pooled(loaded, ids, mask, pooling=pooling)

    some = _answers(
        model, train.take(used), device=device, label=f"teacher {entry.name}: training examples"
    )
    every = torch.zeros(len(train), some.shape[1], device=device)
    every[torch.from_numpy(used)] = some
    said = _answers(model, heldout, device=device)
    return Teacher(entry.name, folder, digest, pooling, every, said)


def _require_classes(
    name: str, found: Sequence[str], expected: Sequence[str], folder: Path
) -> None:
    if list(found) != list(expected):
        raise ModelError(
            f"{folder}: teacher {name} tells apart {', '.join(found)}; the recipe's classes are {', '.join(expected)}, in this "
            "order. Name them alike in data.classes, or set id2label in the teacher's config.json."
        )


# Classification --------------------------------------------------------------------------------------------------


class Classification:
    """Cross-entropy with the label plus the divergence from the fused teachers, of `compress.loss`."""

    def __init__(
        self,
        recipe: ClassificationRecipe,
        teachers: Sequence[Teacher],
        train: Examples,
        heldout: Examples,
        device: Any,
    ) -> None:
        self.config, self.teachers, self.device = recipe.fusion, teachers, device
        self.labels_N = torch.from_numpy(train.groups).long().to(device)
        self.heldout_N = torch.from_numpy(heldout.groups).long().to(device)
        self.names = [t.name for t in teachers]
        self.head = Head(torch.eye(len(recipe.data.classes), device=device))
        self.temperatures = [self._calibrated(t) for t in teachers]

    def answer(self, model: Any, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """Logits ``[R, C]``."""
        logits: Tensor = model(input_ids=ids_RL, attention_mask=mask_RL).logits.float()
        return logits

    def loss(
        self, answers: Answers, rows: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """See `Objective`; terms are means over the batch."""
        rows = rows.to(self.device)
        states = [
            TeacherStates(t.train[rows][:, None], self.head, c)
            for t, c in zip(self.teachers, self.temperatures, strict=True)
        ]
        R = len(rows)
        terms = fused_loss(
            self.config, hidden_RLd=answers[:, None], head=self.head, teachers=states, labels_RL=self.labels_N[rows][:, None],
            denominator=R, names=self.names, progress=progress,
        )  # fmt: skip
        figures = {
            "cross_entropy": terms.cross_entropy / R,
            "fusion": terms.divergence / R if states else None,
        }
        return terms.loss, figures | _weights(self.names, terms.weights_KRL, terms.entropy_KRL)

    def measure(self, answers: Answers) -> dict[str, float]:
        """Accuracy, macro F1, and nats an example."""
        predicted, labels = answers.argmax(1).cpu().numpy(), self.heldout_N.cpu().numpy()
        return {
            "accuracy": accuracy(predicted, labels),
            "macro_f1": macro_f1(predicted, labels, answers.shape[1]),
            "nll": float(nn.functional.cross_entropy(answers.double(), self.heldout_N)),
        }

    def _calibrated(self, teacher: Teacher) -> float:
        match self.config.calibration:
            case FixedCalibration(values=values):
                return values[teacher.name]
            case FittedCalibration(bounds=bounds):
                return fit_temperature(
                    teacher.heldout[:, None], self.head, self.heldout_N[:, None], bounds=bounds
                )
        return 1.0


# Embedding -------------------------------------------------------------------------------------------------------


class Embedding:
    """Cosine distance through projections plus the relational loss; the formulas are at the top of the file."""

    def __init__(
        self, recipe: EmbeddingRecipe, teachers: Sequence[Teacher], width: int, device: Any
    ) -> None:
        self.config, self.teachers, self.device = recipe.fusion, teachers, device
        self.names, self.temperatures = [t.name for t in teachers], [1.0] * len(teachers)
        self.projections = Projections(
            student_width=width,
            teacher_widths=[t.train.shape[1] for t in teachers],
            pairs=[[(1, 1)]] * len(teachers),
        )
        self.reference = mixed_similarities([t.heldout for t in teachers])

    def answer(self, model: Any, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """Unit vectors ``[R, d]``."""
        return pooled(model, ids_RL, mask_RL)

    def loss(
        self, answers: Answers, rows: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """See `Objective`."""
        theirs = [t.train[rows.to(self.device)] for t in self.teachers]
        weights_KR, entropy_KR = similarity_weights(
            self.config.weights,
            theirs,
            temperature=self.config.temperature,
            names=self.names,
            progress=progress,
        )
        projected = self.projections({1: answers[:, None]})
        valid = torch.ones(len(rows), 1, dtype=torch.bool, device=self.device)
        cosine = feature_loss(
            projected, [[t[:, None]] for t in theirs], weights_KR[..., None], valid, distance="cosine", denominator=len(rows)
        )  # fmt: skip
        relational = relational_loss(
            answers,
            theirs,
            weights_KR,
            temperature=self.config.temperature,
            relation=self.config.relation,
        )
        figures = {"cosine": float(cosine.detach()), "relational": float(relational.detach())}
        loss = self.config.cosine * cosine + self.config.relational * relational
        return loss, figures | _weights(self.names, weights_KR, entropy_KR)

    def measure(self, answers: Answers) -> dict[str, float]:
        """Spearman's correlation of the similarities of all pairs with their mean over the teachers."""
        return {"spearman": spearman(answers @ answers.T, self.reference)}


def similarity_logits(vectors_Rd: Tensor, temperature: float) -> Tensor:
    """Cosine similarities over the temperature ``[R, R]`` of unit vectors; an example's own is out of it (-inf)."""
    logits = vectors_Rd @ vectors_Rd.T / temperature
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(own, -math.inf)


def similarity_weights(
    config: Weights,
    teachers: Sequence[Tensor],
    *,
    temperature: float,
    names: Sequence[str],
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights and entropies ``[K, R]`` of the teachers' unit vectors ``[R, d_k]`` of one batch; entropy in nats."""
    p_KRR = torch.stack(
        [torch.softmax(similarity_logits(v, temperature), dim=-1) for v in teachers]
    )
    entropy_KR = -torch.special.xlogy(p_KRR, p_KRR).sum(-1)
    no_labels = torch.zeros(p_KRR.shape[1], 1, dtype=torch.long, device=p_KRR.device)
    entropy_KR1 = entropy_KR[..., None]
    weights = weigh(
        config,
        entropy_KR1,
        torch.zeros_like(entropy_KR1),
        no_labels,
        names=names,
        progress=progress,
    )
    return weights[..., 0], entropy_KR


def relational_loss(
    student_Rd: Tensor,
    teachers: Sequence[Tensor],
    weights_KR: Tensor,
    *,
    temperature: float,
    relation: str,
) -> Tensor:
    """The relational term of the loss: a scalar. ``relation`` is `kl` or `mse`."""
    R = len(student_Rd)
    if relation == "mse":
        target_RR = torch.stack(
            [w[:, None] * (v @ v.T) for w, v in zip(weights_KR, teachers, strict=True)]
        ).sum(0)
        others = ~torch.eye(R, dtype=torch.bool, device=student_Rd.device)
        squares: Tensor = (student_Rd @ student_Rd.T - target_RR)[others].square()
        return squares.mean()
    p_RR = torch.zeros(R, R, device=student_Rd.device)
    for w, v in zip(weights_KR, teachers, strict=True):
        p_RR += w[:, None] * torch.softmax(similarity_logits(v, temperature), dim=-1)
    own = torch.eye(R, dtype=torch.bool, device=student_Rd.device)
    logq_RR = torch.log_softmax(similarity_logits(student_Rd, temperature), dim=-1).masked_fill(
        own, 0.0
    )
    kl_R: Tensor = (torch.special.xlogy(p_RR, p_RR) - p_RR * logq_RR).sum(-1)
    return kl_R.mean()


def mixed_similarities(teachers: Sequence[Tensor]) -> Tensor:
    """Mean over the teachers of the cosine similarities of all pairs, ``[N, N]``."""
    return torch.stack([v.double() @ v.double().T for v in teachers]).mean(0)


def spearman(ours_NN: Tensor, theirs_NN: Tensor) -> float:
    """Rank correlation over the pairs i < j."""
    above = np.triu_indices(len(ours_NN), 1)
    return float(
        stats.spearmanr(ours_NN.cpu().numpy()[above], theirs_NN.cpu().numpy()[above]).statistic
    )


def _weights(names: Sequence[str], weights: Tensor, entropy: Tensor) -> dict[str, Any]:
    """Mean weight and entropy of each teacher over the batch."""
    return {
        figure: {name: round(float(value[k].mean()), 4) for k, name in enumerate(names)}
        for figure, value in (("weights", weights), ("entropy", entropy))
    }


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
