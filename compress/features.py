"""Feature alignment: projected hidden states of the student against those of each teacher.

Teachers count with the weights of the fusion. Projections lie outside the student: they are trained
beside it and never saved, exported or counted with it.

Shapes: K teachers, P layer pairs, R rows, L positions, d widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contract.errors import ModelError, RecipeError
from limbeck.contract.recipe import Features


def layer_pairs(
    config: Features, *, student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """Return (student layer, teacher layer) pairs, counted from 1.

    Layer L is the state after the final norm. Depth map: j = round(i L_k / L_S) at ``config.pairs``
    student layers, spread evenly, the last included.
    Raises `RecipeError` when an explicit pair names a layer that does not exist.
    """
    if config.layers is not None:
        for student, teacher in config.layers:
            if student > student_layers or teacher > teacher_layers:
                raise RecipeError(
                    f"features.layers: ({student}, {teacher}) is past the last layer; the student "
                    f"has {student_layers} layers and the teacher {teacher_layers}"
                )
        return list(config.layers)
    count = min(config.pairs, student_layers)
    chosen = [round((index + 1) * student_layers / count) for index in range(count)]
    return [(i, max(1, round(i * teacher_layers / student_layers))) for i in chosen]


def aligned_layers(
    config: Features, student_layers: int, teacher_layers: Sequence[int]
) -> list[list[tuple[int, int]]] | None:
    """The layer pairs of each teacher; None where no layer is aligned.

    A served teacher, which has 0 layers here, shows no states and has no pairs. Raises as
    `layer_pairs`.
    """
    if not any(teacher_layers) or config.weight == 0:
        return None
    return [
        layer_pairs(config, student_layers=student_layers, teacher_layers=depth) if depth else []
        for depth in teacher_layers
    ]


def require_even_width(config: Any, where: str) -> None:
    """Raise `ModelError` for a model whose layers and head have states of different widths."""
    outer = getattr(config, "word_embed_proj_dim", None)  # of OPT
    if outer is not None and outer != config.hidden_size:
        raise ModelError(
            f"{where}: its layers give {config.hidden_size} numbers a token and its head takes "
            f"{outer} (word_embed_proj_dim), so its layers cannot be aligned with those of another "
            "model; set features.weight to 0."
        )


class Projections(nn.Module):
    """One Linear(d_S -> d_k, no bias) for each teacher and layer pair.

    It starts as the identity where widths agree.
    """

    def __init__(
        self,
        *,
        student_width: int,
        teacher_widths: Sequence[int],
        pairs: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        super().__init__()
        self.pairs = [list(p) for p in pairs]
        self.linears = nn.ModuleList()
        for mine, width in zip(self.pairs, teacher_widths, strict=True):
            linears = [nn.Linear(student_width, width, bias=False) for _ in mine]
            if width == student_width:
                for linear in linears:
                    nn.init.eye_(linear.weight)
            self.linears.append(nn.ModuleList(linears))

    def forward(self, student_states: dict[int, Tensor]) -> list[list[Tensor]]:
        """Return projected student states [K][P] of [R, L, d_k] from the states by layer number."""
        projected = []
        for linears, pairs in zip(self.linears, self.pairs, strict=True):
            assert isinstance(linears, nn.ModuleList)
            projected.append(
                [linear(student_states[i]) for linear, (i, _) in zip(linears, pairs, strict=True)]
            )
        return projected


def feature_loss(
    projected: Sequence[Sequence[Tensor]],
    teacher_states: Sequence[Sequence[Tensor]],
    weights_KRL: Tensor,
    valid_RL: Tensor,
    *,
    distance: str,
    denominator: int,
) -> Tensor:
    """Return sum_t sum_k w_k mean_pairs dist(projected, teacher) / denominator, a scalar.

    The first sum goes over label positions t. ``distance`` is `cosine` (1 - cos) or `mse` (mean
    squared difference of layer-normed states).
    """
    total = torch.zeros((), device=weights_KRL.device)
    for k, (mine, theirs) in enumerate(zip(projected, teacher_states, strict=True)):
        weight_T = weights_KRL[k][valid_RL]
        for student_RLd, teacher_RLd in zip(mine, theirs, strict=True):
            student_Td = student_RLd[valid_RL].float()
            teacher_Td = teacher_RLd[valid_RL].float().detach()
            if distance == "cosine":
                gap_T = 1 - torch.nn.functional.cosine_similarity(student_Td, teacher_Td, dim=-1)
            else:
                width = student_Td.shape[-1:]
                gap_T = (
                    (
                        nn.functional.layer_norm(student_Td, width)
                        - nn.functional.layer_norm(teacher_Td, width)
                    )
                    .square()
                    .mean(-1)
                )
            total = total + (weight_T * gap_T).sum() / len(mine)
    return total / denominator
