"""The student: built from the recipe, seen by the loop as hidden states and a head, saved as a plain folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.features import Projections
from compress.models import load_model, load_tokenizer, model_folder, random_model
from compress.shrink import Importance, shrink
from compress.teachers import Body, TeacherFolder, causal_lm
from limbeck.errors import EnvironmentalError, ModelError
from limbeck.recipe import FreshStudent, LoraStudent, Recipe, ShrinkStudent


class Student(nn.Module):
    """A causal LM being trained, with the feature projections beside it (never inside)."""

    def __init__(self, model: Any, projections: Projections | None) -> None:
        super().__init__()
        self.model, self.projections = model, projections
        self.layers = sorted({i for pairs in projections.pairs for i, _ in pairs}) if projections else []

    def forward(self, input_ids_RL: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Last hidden states [R, L, d] and projected inner states [K][P] of [R, L, d_k]."""
        hidden_RLd, states = Body(self.model).states(input_ids_RL, self.layers)
        return hidden_RLd, self.projections(states) if self.projections is not None else []


def student_folder(recipe: Recipe, teachers: Sequence[TeacherFolder]) -> Path:
    """Folder of the base model, or for a fresh student of the first teacher's tokenizer. Raises `ModelError`."""
    if isinstance(recipe.student, FreshStudent):
        return teachers[0].tokenizer
    return model_folder(recipe.student.base, folder=recipe.folder)


def build_model(
    recipe: Recipe, *, folder: Path, calibration: Sequence[Tensor], device: torch.device
) -> tuple[Any, Importance | None, dict[str, Any]]:
    """The trainable model; for a shrunk one also the importance it was cut by and the sizes kept.

    ``calibration`` are token ids [R, L] of training text. Raises `ModelError`.
    """
    match recipe.student:
        case LoraStudent() as config:
            if config.quantize == "nf4" and device.type == "cpu":
                # Its packed kernel for the CPU has no gradient, and bitsandbytes only warns of it.
                raise EnvironmentalError(
                    "student.quantize: nf4 cannot be trained on a CPU; use int8 or none, or train on a GPU."
                )
            base = load_model(folder, quantize=config.quantize, device=device)
            return _with_lora(base, config, recipe.seed), None, {}
        case ShrinkStudent() as config:
            base = load_model(folder, device=device)
            model, importance, kept = shrink(base, config, [ids.to(device) for ids in calibration])
            return model.to(device), importance, kept
        case FreshStudent() as config:
            tokenizer = load_tokenizer(folder)
            model = random_model(config.config, vocab_size=len(tokenizer), seed=recipe.seed, where="student.config")
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.config, name, getattr(tokenizer, name))
                setattr(model.generation_config, name, getattr(tokenizer, name))
            return model.to(device), None, {}


def save_student(model: Any, *, tokenizer_folder: Path, out: Path) -> None:
    """Write ``out/model`` (merged, fp32) and, for LoRA, ``out/adapter`` as it was before merging.

    The adapter is merged into the base as it is on disk; the one in memory may be quantised or cast.
    """
    if hasattr(model, "merge_and_unload"):
        from peft import PeftModel

        model.save_pretrained(out / "adapter")
        (out / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty model card
        model = PeftModel.from_pretrained(load_model(tokenizer_folder), str(out / "adapter")).merge_and_unload()
    model.save_pretrained(out / "model")
    load_tokenizer(tokenizer_folder).save_pretrained(out / "model")


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter that is trained, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def load_trainable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trainable_state` copied."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])


def _with_lora(base: Any, config: LoraStudent, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(base, options)
        except ValueError as error:
            names = sorted(
                {n.rpartition(".")[2] for n, m in causal_lm(base).named_modules() if isinstance(m, nn.Linear)}
            )
            raise ModelError(f"student.targets: {error} Linear layers of this model: {', '.join(names)}.") from error
