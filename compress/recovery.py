"""Win back what rounding cost: distil a finished student through its quantised forward pass.

The rounding of a form is data here, from the manifest of an ``onnx`` artifact. Weights and the
activations that meet them are rounded in the forward pass, and gradients pass straight through
both (straight-through estimator). Teachers, teacher cache and text are the same as before. The
activations that enter the head are not rounded.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.head import label_nll
from compress.loop import Run, State, fit, setup
from compress.models.body import Body
from compress.models.language import load_model
from compress.models.students import Student
from compress.tasks.language import LanguageTask, evaluate, per_token
from limbeck.contract.artifact import Artifact, open_artifact, work_folder, write_artifact
from limbeck.contract.data.evals import EVALS
from limbeck.contract.data.heldout import CALIBRATION, HELDOUT, mean_nll
from limbeck.contract.progress import say
from limbeck.contract.recipe import Features, Recipe, Recover
from limbeck.contract.results.student import StudentResult
from limbeck.contract.sources.tokenizer import load_tokenizer

_PARAMETRIZED = re.compile(r"parametrizations\.(?=[^.]+\.original$)|\.original$")
_COPIED = (HELDOUT, CALIBRATION, EVALS, "teachers.json")


class FakeQuantize(nn.Module):
    """Round a matrix as a form does, bit for bit, with a gradient that ignores the rounding."""

    def __init__(self, rounding: Mapping[str, Any], *, turned: bool) -> None:
        """``rounding`` is the manifest's; ``turned`` matrices are stored [K, N], not [N, K]."""
        super().__init__()
        self.rounding, self.turned = dict(rounding), turned

    def forward(self, weights: Tensor) -> Tensor:
        """Rounded weights of the same shape."""
        with torch.no_grad():
            weights_NK = (weights.T if self.turned else weights).float()
            rounded_NK = (
                self._blocks(weights_NK)
                if "bits" in self.rounding
                else rounded_columns(weights_NK, **self.rounding)
            )
            rounded = (rounded_NK.T if self.turned else rounded_NK).to(weights.dtype)
        through: Tensor = _StraightThrough.apply(weights, rounded)  # type: ignore[no-untyped-call]
        return through

    def _blocks(self, weights_NK: Tensor) -> Tensor:
        codes, scales, zeros = quantize_blocks(weights_NK, **self.rounding)
        back = (codes - zeros[:, :, None]) * scales[:, :, None]
        return back.reshape(len(weights_NK), -1)[:, : weights_NK.shape[1]]


class RoundInput:
    """Forward pre-hook that rounds a layer's input to 8 bits, as the kernels of the forms do.

    There is a scale for each block of ``block`` inputs where weights have blocks (MatMulNBits at
    accuracy level 4), else one for each token.
    """

    def __init__(self, block: int | None) -> None:
        self.block = block

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (values,) = inputs
        with torch.no_grad():
            rounded = round_activations(values, self.block)
        return (_StraightThrough.apply(values, rounded),)  # type: ignore[no-untyped-call]


def round_activations(values: Tensor, block: int | None) -> Tensor:
    """Round ``values[..., K]`` to 127 steps either side of 0, scaled by the largest of each block.

    None for ``block`` means all K inputs.
    """
    width = values.shape[-1]
    block = block or width
    grouped = nn.functional.pad(values.float(), (0, -width % block)).unflatten(-1, (-1, block))
    scales = grouped.abs().amax(-1, keepdim=True) / 127
    rounded: Tensor = (grouped * _inverse(scales)).round() * scales
    return rounded.flatten(-2)[..., :width].to(values.dtype)


class _StraightThrough(torch.autograd.Function):
    """The second argument forward; the gradient to the first."""

    @staticmethod
    def forward(_: Any, weights: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def quantize_blocks(
    weights_NK: Tensor, *, bits: int, block: int, zero_points: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [N, ceil(K / block), block], scales and zero points [N, ceil(K / block)].

    All of them as floats, of ``weights[N, K]``.
    """
    rows, width = weights_NK.shape
    grouped = nn.functional.pad(weights_NK, (0, -width % block)).reshape(rows, -1, block)
    steps, middle = 2**bits - 1, 2 ** (bits - 1)
    if zero_points:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        # a plain number may be multiplied by its inverse on a GPU
        scales = (high - low) / torch.full_like(high, steps)
        zeros = (-low * _inverse(scales)).round()
    else:
        largest = grouped.abs().amax(2)
        scales = largest / torch.full_like(largest, middle - 1)
        zeros = torch.full_like(scales, middle)
    codes = ((grouped * _inverse(scales)[:, :, None]).round() + zeros[:, :, None]).clamp(0, steps)
    return codes, scales, zeros


def rounded_columns(weights_NK: Tensor, *, most: int) -> Tensor:
    """Round ``weights[N, K]`` to signed codes up to ``most``, a scale for each output channel."""
    largest = weights_NK.abs().amax(1)
    scales = largest / torch.full_like(largest, most)
    return (weights_NK * _inverse(scales)[:, None]).round() * scales[:, None]


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))


def train_through(
    *,
    student: Artifact,
    onnx: Artifact,
    recipe: Recipe,
    out: Path,
    products: Mapping[str, Path],
    key: str,
) -> Artifact:
    """Distil ``student`` again through the rounding of the form that ``onnx`` ships.

    Writes it to ``out``. See `compress.recover`.
    """
    started = time.monotonic()
    asked = recipe.export.recover
    assert asked is not None
    rounding: Mapping[str, Mapping[str, Any]] = onnx.result["parameters"]
    model = load_model(student.path / "model")
    run = setup(
        recipe=_short(recipe, asked), products=products, work=work_folder(out), key=key, model=model
    )
    loaded = run.task
    assert isinstance(loaded, LanguageTask)
    before = StudentResult.of(student)
    loaded.temperatures[:] = [before.teachers[name].temperature for name in loaded.names]
    prepare(loaded.student, rounding, activations=recipe.export.provider == "cpu")
    state = fit(run)
    if run.accelerator.is_main_process:
        _save(
            run,
            loaded,
            state,
            student=student,
            onnx=onnx,
            recipe=recipe,
            out=out,
            key=key,
            started=started,
        )
        shutil.rmtree(run.work)
    run.accelerator.wait_for_everyone()
    return open_artifact(out, kind="student", verify=False)


def _save(
    run: Run,
    task: LanguageTask,
    state: State,
    *,
    student: Artifact,
    onnx: Artifact,
    recipe: Recipe,
    out: Path,
    key: str,
    started: float,
) -> None:
    """Write the artifact with the best weights, in fp32 and not rounded: the exporter does that."""
    assert run.log is not None
    measured = {row["step"]: row["nll"] for row in run.log.read("evaluate")}
    if state.best_step == 0:
        say(
            f"  recovery: no step lowered the held-out loss of the rounded student, "
            f"{mean_nll(measured[0]):.4f} nats a token"
        )
    with write_artifact(
        out, kind="student", key=key, parents={"student": student.digest}, recipe=recipe
    ) as draft:
        model: Any = load_model(student.path / "model")
        _, unknown = model.load_state_dict(plain_weights(state.best), strict=False)
        assert not unknown, unknown
        model.save_pretrained(draft.folder / "model")
        load_tokenizer(student.path / "model").save_pretrained(draft.folder / "model")
        for name in _COPIED:
            if (student.path / name).is_file():
                shutil.copy(student.path / name, draft.folder / name)
        run.log.copy(draft.folder)
        body = Body(load_model(draft.folder / "model", device=task.device))
        sums = evaluate(
            lambda ids, labels: label_nll(body.states(ids)[0], body.head, labels),
            task.blocks, device=task.device, label="recovered student, fp32",
        )  # fmt: skip
        nll = per_token(sums, task.blocks)
        before, form = onnx.result["heldout"], str(onnx.result["shipped"])
        was = StudentResult.of(student)
        recovery = {
            "form": form,
            "mixed": onnx.result["forms"][form]["mixed"],
            "tokens": state.seen,
            "steps": state.step,
            "best_step": state.best_step,
            "rounded": {"before": measured[0], "after": measured[state.best_step]},
            "before": {"fp32": before["fp32"], "form": before[form]},
            "distilled": onnx.result["blocks"]["fp32"],
        }
        figures = replace(
            was.figures_of_language, nll=nll, mean_nll=mean_nll(nll), base=None, recovery=recovery
        )
        seconds = round(time.monotonic() - started, 1)
        draft.result = replace(was, seconds=seconds, language=figures).to_json()


def prepare(
    student: Student, rounding: Mapping[str, Mapping[str, Any]], *, activations: bool
) -> None:
    """Round every parameter that ``rounding`` names in the forward pass, and train it.

    The vectors of the model are trained too. Layer inputs are rounded where ``activations`` are in
    8 bits; CUDA multiplies blocks of weights with activations as they are. Embedding and head are
    rounded once and not trained, since 8 bits cost them next to nothing.
    """
    model = student.model
    fixed = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for name, parameter in list(model.named_parameters()):
        quantizer = _quantizer(rounding.get(name))
        trained = id(parameter) not in fixed and (quantizer is not None or parameter.ndim < 2)
        parameter.requires_grad_(trained)
        if quantizer is None:
            continue
        if trained:
            owner, _, attribute = name.rpartition(".")
            layer = model.get_submodule(owner)
            parametrize.register_parametrization(layer, attribute, quantizer)
            if activations:
                layer.register_forward_pre_hook(RoundInput(quantizer.rounding.get("block")))
        else:
            parameter.copy_(quantizer(parameter))


def plain_weights(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights of a prepared student by the names they have in the model's own file."""
    return {
        _PARAMETRIZED.sub("", name.removeprefix("model.")): values
        for name, values in trained.items()
    }


def _quantizer(rounding: Mapping[str, Any] | None) -> FakeQuantize | None:
    if rounding is None:
        return None
    rest = {name: value for name, value in rounding.items() if name != "turned"}
    return FakeQuantize(rest, turned=bool(rounding["turned"]))


def _short(recipe: Recipe, asked: Recover) -> Recipe:
    """The recipe of the recovery: its own budget and rate, no feature alignment, no own text."""
    steps = max(asked.tokens // recipe.training.batch_tokens, 1)
    training = recipe.training.model_copy(
        update={
            "tokens": steps * recipe.training.batch_tokens,
            "minutes": None,
            "learning_rate": asked.learning_rate,
            "evaluate_every": max(math.ceil(steps / 4), 1),
            "patience": None,
            "on_policy": None,  # every token would round all weights anew
        }
    )
    return recipe.model_copy(update={"training": training, "features": Features(weight=0)})
