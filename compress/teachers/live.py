"""K teachers in memory: one model each, or several PEFT adapters on one base that is loaded once.

Shapes: R rows, L positions, d_k width. Teachers give last hidden states and heads; the loss makes
logits of them in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.aligned import AlignedStates, Pair
from compress.models.attention import use_short_attention
from compress.models.body import Body, causal_lm, require_faithful
from compress.models.language import cast_frozen, load_model, model_folder
from compress.states import TeacherStates
from compress.teachers.served import ServedTeacher, served_teacher
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.models.adapters import attach, can_join
from limbeck.contract.recipe import Recipe, RecipeModel, ServerModel, Teacher, fingerprint
from limbeck.contract.results.student import StudentResult
from limbeck.contract.sources.digests import adapter_digest, model_digest
from limbeck.contract.sources.models import adapter_tokenizer, context_of, require_fits


@dataclass(frozen=True)
class TeacherFolder:
    """A teacher on disk: the model to run, and a form that others (serve_bench) can load whole."""

    name: str
    base: Path  # weights in memory
    adapter: Path | None  # PEFT adapter on them
    whole: Path  # folder to load for deployment: the merged model where there is one
    whole_adapter: Path | None
    tokenizer: Path
    quantize: str
    dtype: str
    digest: str

    def entry(self, temperature: float) -> dict[str, Any]:
        """This teacher's entry in `teachers.json`."""
        adapter = str(self.whole_adapter) if self.whole_adapter else None
        return {
            "name": self.name, "model": str(self.whole), "adapter": adapter,
            "quantize": self.quantize, "dtype": self.dtype, "temperature": temperature,
            "digest": self.digest,
        }  # fmt: skip


def teacher_folders(
    recipe: Recipe, products: Mapping[str, Path]
) -> list[TeacherFolder | ServedTeacher]:
    """Find every teacher on disk, made into plain folders where need be. Raises `ModelError`."""
    return [
        served_teacher(teacher, recipe)
        if isinstance(teacher.model, ServerModel)
        else _teacher_folder(teacher, recipe, products)
        for teacher in recipe.teachers
    ]


def _teacher_folder(
    teacher: Teacher, recipe: Recipe, products: Mapping[str, Path]
) -> TeacherFolder:
    digest = model_digest(
        teacher.model, folder=recipe.folder, products=products, teacher=teacher.name
    )
    common = {
        "name": teacher.name,
        "quantize": teacher.quantize,
        "dtype": teacher.dtype,
        "digest": digest,
    }
    if isinstance(teacher.model, RecipeModel):
        product = open_artifact(products[teacher.name], kind="student")
        whole, adapter = product.path / "model", product.path / "adapter"
        made = StudentResult.of(product).figures_of_language
        base = Path(made.base) if adapter.is_dir() and made.base else whole
        if adapter.is_dir() and teacher.adapter is None and base.is_dir():
            return TeacherFolder(
                base=base,
                adapter=adapter,
                whole=whole,
                whole_adapter=None,
                tokenizer=whole,
                **common,
            )
        folder = whole
    else:
        assert not isinstance(teacher.model, ServerModel)
        folder = model_folder(teacher.model, folder=recipe.folder)
    require_fits(folder, block=recipe.data.block)
    own = (recipe.folder / teacher.adapter.expanduser()).resolve() if teacher.adapter else None
    if own is not None:
        common["digest"] = fingerprint([digest, adapter_digest(own)])
    return TeacherFolder(
        base=folder,
        adapter=own,
        whole=folder,
        whole_adapter=own,
        tokenizer=(adapter_tokenizer(own) if own is not None else None) or folder,
        **common,
    )


class Teachers:
    """All teachers of a recipe, ready to run."""

    def __init__(
        self,
        folders: Sequence[TeacherFolder],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        pairs: Sequence[Pair | None] | None = None,
    ) -> None:
        """Load the teachers, to be run under autocast to ``compute_dtype``.

        ``pairs`` are given for teachers with another tokenizer than the student's.
        Raises `ModelError` for an adapter that does not fit its base.
        """
        self.names = [f.name for f in folders]
        self.temperatures = [1.0] * len(folders)
        shared: dict[tuple[Path, str, str], Any] = {}
        self.bodies = [
            self._load(folder, f"teacher_{k}", shared, device) for k, folder in enumerate(folders)
        ]
        # now that all of them are loaded
        for body, folder in zip(self.bodies, folders, strict=True):
            if folder.adapter is not None:
                require_faithful(body, f"{folder.adapter} on {folder.base}")
        heads = [body.head for body in self.bodies]  # before frozen matrices are cast
        for model in {id(body.model): body.model for body in self.bodies}.values():
            cast_frozen(model, compute_dtype)
            use_short_attention(causal_lm(model))
        cast: dict[int, Tensor] = {}
        self.heads = []
        for head in heads:
            weight = cast.setdefault(id(head.weight_Vd), head.weight_Vd.to(compute_dtype))
            bias = head.bias_V.to(compute_dtype) if head.bias_V is not None else None
            self.heads.append(replace(head, weight_Vd=weight, bias_V=bias))
        self.widths, self.depths = [b.width for b in self.bodies], [b.layers for b in self.bodies]
        self._contexts = [context_of(folder.base) for folder in folders]
        self.pairs = list(pairs) if pairs is not None else [None] * len(folders)
        self.targets = [
            pair.target(len(head.weight_Vd), device) if pair is not None else None
            for pair, head in zip(self.pairs, self.heads, strict=True)
        ]

    @staticmethod
    def _load(
        folder: TeacherFolder,
        name: str,
        shared: dict[tuple[Path, str, str], Any],
        device: torch.device,
    ) -> Body:
        """One teacher. Adapters share an earlier teacher's base if they stay independent there."""
        place = (folder.base, folder.quantize, folder.dtype)
        if folder.adapter is None:
            return Body(_base(folder, device))
        facts = adapter_facts(folder.adapter)
        if place in shared and can_join(shared[place], facts):
            return Body(attach(shared[place], folder.adapter, name=name), adapter=name)
        model = attach(_base(folder, device), folder.adapter, name=name)
        if can_join(model, facts):
            shared[place] = model
        return Body(model, adapter=name)

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def states(
        self,
        input_ids_RL: Tensor,
        layers: Sequence[Sequence[int]] | None = None,
        *,
        only: int | None = None,
        labels_RL: Tensor | None = None,
    ) -> tuple[list[TeacherStates | AlignedStates], list[list[Tensor]]]:
        """Last states of each teacher (or ``only`` one), and inner states [K][P] of [R, L, d_k].

        Inner states are taken after the given ``layers`` of each teacher. Tokens are the
        student's; a teacher with another tokenizer reads their text. ``labels_RL`` says which
        tokens are labels; None: all but the first. Raises `ModelError` for a row that takes more
        of a teacher's tokens than it reads.
        """
        last: list[TeacherStates | AlignedStates] = []
        inner: list[list[Tensor]] = []
        for k in range(len(self)) if only is None else [only]:
            body, head = self.bodies[k], self.heads[k]
            wanted = list(layers[k]) if layers else []
            pair, target_V = self.pairs[k], self.targets[k]
            if pair is not None and target_V is not None:
                a = pair.align(input_ids_RL, labels_RL)
                self._require_room(k, a.ids_RM.shape[1])
                hidden_RMd, states = body.states(a.ids_RM, wanted)
                hidden_RMd = hidden_RMd.to(head.weight_Vd.dtype)
                last.append(
                    AlignedStates(hidden_RMd, head, a, target_V, self.temperatures[k], pair.renames)
                )
                inner.append([a.gathered(states[i]) for i in wanted])
                continue
            self._require_room(k, input_ids_RL.shape[1])
            hidden_RLd, states = body.states(input_ids_RL, wanted)
            last.append(
                TeacherStates(hidden_RLd.to(head.weight_Vd.dtype), head, self.temperatures[k])
            )
            inner.append([states[i] for i in wanted])
        return last, inner

    def _require_room(self, k: int, tokens: int) -> None:
        """Raise `ModelError` unless teacher ``k`` reads so many of its tokens at once."""
        context = self._contexts[k]
        if context is not None and tokens > context:
            raise ModelError(
                f"teacher {self.names[k]}: a block of the text takes {tokens} of its tokens, but "
                f"it reads {context} at most; make data.block smaller."
            )


def _base(folder: TeacherFolder, device: torch.device) -> Any:
    return load_model(
        folder.base, dtype=folder.dtype, quantize=folder.quantize, device=device, as_stored=True
    )
