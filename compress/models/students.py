"""The student: build it from the recipe, give hidden states and a head, save a plain folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.features import Projections
from compress.models.body import Body, causal_lm, require_faithful
from compress.models.language import load_model, model_folder, random_model
from compress.models.sharded import like, whole
from compress.models.shrink import Importance, shrink
from limbeck.contract.errors import EnvironmentalError, ModelError
from limbeck.contract.models.adapters import attach, merged
from limbeck.contract.recipe import FreshStudent, LoraStudent, MergeStudent, Recipe, ShrinkStudent
from limbeck.contract.sources.models import require_fits
from limbeck.contract.sources.tokenizer import load_tokenizer

Used = TypeVar("Used")


class Student(nn.Module):
    """A causal LM being trained, with the feature projections beside it (never inside)."""

    def __init__(self, model: Any, projections: Projections | None) -> None:
        super().__init__()
        self.model, self.projections = model, projections
        self.layers = (
            sorted({i for pairs in projections.pairs for i, _ in pairs}) if projections else []
        )
        self._no_split_modules = causal_lm(
            model
        )._no_split_modules  # where accelerate cuts for FSDP

    def forward(
        self, input_ids_RL: Tensor, use: Callable[[Tensor, list[list[Tensor]]], Used]
    ) -> Used:
        """Result of ``use(hidden, inner)``: last states [R, L, d], projected states [K][P].

        Inner states are [R, L, d_k], and are given in training only. ``use`` is called inside
        ``forward`` because under FSDP whole parameters, the head's included, exist only here.
        """
        hidden_RLd, states = Body(self.model).states(
            input_ids_RL, self.layers if self.training else ()
        )
        return use(
            hidden_RLd,
            self.projections(states) if self.projections is not None and self.training else [],
        )


def student_folder(recipe: Recipe, tokenizers: Sequence[Path]) -> Path:
    """Folder of the base model; for a fresh student the first of ``tokenizers``, the teachers'.

    Raises `ModelError`.
    """
    if isinstance(recipe.student, FreshStudent):
        return tokenizers[0]
    folder = model_folder(recipe.student.base, folder=recipe.folder)
    require_fits(folder, block=recipe.data.block)
    return folder


def build_model(
    recipe: Recipe,
    *,
    folder: Path,
    calibration: Sequence[Tensor],
    device: torch.device,
    begin: Callable[[Any], None] = lambda base: None,
) -> tuple[Any, Importance | None, dict[str, Any]]:
    """The trainable model; for a shrunk one also the importance it was cut by and the sizes kept.

    ``calibration`` are token ids [R, L] of training text. ``begin`` may give the base other
    weights, before adapters are put on it or a smaller model is cut out of it. Raises `ModelError`.
    """
    match recipe.student:
        case LoraStudent() as config:
            if config.quantize == "nf4" and device.type == "cpu":
                # Its packed kernel for the CPU has no gradient, and bitsandbytes only warns of it.
                raise EnvironmentalError(
                    "student.quantize: nf4 cannot be trained on a CPU; use int8 or none, or train "
                    "on a GPU."
                )
            if config.quantize == "int8" and config.dora and device.type == "cpu":
                # peft 0.21.2 loses the scales of the weights when DoRA reads them.
                raise EnvironmentalError(
                    "student.dora: DoRA cannot be trained on an int8 base on a CPU; set "
                    "student.dora: false or student.quantize: none, or train on a GPU."
                )
            base = load_model(folder, quantize=config.quantize, device=device)
            begin(base)
            model = with_lora(base, config, recipe.seed)
            with _stirred(model):
                require_faithful(Body(model), "student")
            return model, None, {}
        case ShrinkStudent() as config:
            base = load_model(folder, device=device)
            begin(base)
            model, importance, kept = shrink(base, config, [ids.to(device) for ids in calibration])
            model = model.to(device)
            require_faithful(Body(model), "student")
            return model, importance, kept
        case MergeStudent():
            base = load_model(folder, device=device)
            begin(base)
            require_faithful(Body(base), "student")
            return base, None, {}
        case FreshStudent() as config:
            tokenizer = load_tokenizer(folder)
            model = random_model(
                config.config, vocab_size=len(tokenizer), seed=recipe.seed, where="student.config"
            )
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.config, name, getattr(tokenizer, name))
                setattr(model.generation_config, name, getattr(tokenizer, name))
            model = model.to(device)
            require_faithful(Body(model), "student")
            return model, None, {}


@contextlib.contextmanager
def _stirred(model: Any) -> Iterator[None]:
    """Set trained matrices that start at zero to other values: a zero adapter cannot be checked."""
    zero = [p for p in model.parameters() if p.requires_grad and not p.any()]
    try:
        with torch.no_grad():
            for parameter in zero:
                parameter.fill_(0.01)
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


def save_student(
    model: Any,
    trained: Mapping[str, Tensor],
    *,
    tokenizer_folder: Path,
    out: Path,
    begin: Callable[[Any], None] = lambda base: None,
) -> None:
    """Write ``out/model`` (merged, fp32) and, for LoRA, the unmerged adapter as ``out/adapter``.

    ``trained`` is the result of `trainable_state`. The parameters of ``model`` are not read: under
    FSDP this process holds only shards. The adapter is merged into the base on disk, because the
    one in memory may be quantised or cast. ``begin`` gives that base the weights that the adapter
    was trained on, as in `build_model`.
    """
    weights = {
        name.removeprefix("model."): w for name, w in trained.items() if name.startswith("model.")
    }
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(out / "adapter", state_dict=weights)
        (out / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty model card
        base = load_model(tokenizer_folder)
        begin(base)
        adapted = attach(base, out / "adapter")
        merged(adapted, where=str(out / "adapter")).save_pretrained(out / "model")
    else:
        model.save_pretrained(out / "model", state_dict=weights or None)  # a merge trains nothing
    load_tokenizer(tokenizer_folder).save_pretrained(out / "model")


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter that is trained, by name, whole."""
    return {
        name: whole(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad
    }


def load_trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` copied."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(like(parameter, state[name]))


def with_lora(base: Any, config: LoraStudent, seed: int) -> Any:
    """``base`` with trainable adapters on it. Raises `ModelError` for targets it does not have."""
    from peft import LoraConfig, get_peft_model  # seconds, which only adapters need
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D  # GPT-2's, whose weights are stored turned

    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        use_rslora=config.rslora,
        use_dora=config.dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with (
                warnings.catch_warnings()
            ):  # of an adapter on a tied matrix, which is refused below
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                model = get_peft_model(base, options)
        except ValueError as error:
            modules = causal_lm(base).named_modules()
            names = sorted(
                {n.rpartition(".")[2] for n, m in modules if isinstance(m, nn.Linear | Conv1D)}
            )
            raise ModelError(
                f"student.targets: {error} Linear layers of this model: {', '.join(names)}."
            ) from error
    lm = causal_lm(model)
    for part in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        if isinstance(part, BaseTunerLayer):
            raise ModelError(
                "student.targets: the embedding and the head take no adapter: the loss reads them "
                "as they are, and many models "
                "share one matrix for both. Name other layers, or all-linear."
            )
    if not config.dora and config.quantize == "none":
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = (
                    False  # to fp32 and, by autocast, back: the same bits
                )
    return model
