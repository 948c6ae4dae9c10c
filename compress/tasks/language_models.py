"""A language model's recipe, loaded: text, teachers, and the student with projections beside it.

Shapes: R rows (blocks), L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import AutoConfig

from compress.data.blocks import IGNORED, load_blocks
from compress.data.training_text import TrainingText
from compress.features import Projections, aligned_layers, require_even_width
from compress.head import Head, label_nll
from compress.models.attention import use_short_attention
from compress.models.body import Body, causal_lm
from compress.models.language import DTYPES, cast_frozen
from compress.models.students import Student, build_model, student_folder
from compress.tasks.own_text import OwnText
from compress.teachers.conversations import with_conversations
from compress.teachers.live import TeacherFolder, Teachers, teacher_folders
from compress.teachers.mixed import MixedTeachers, open_teachers
from compress.teachers.pairs import (
    pair_teachers,
    require_coverage,
    require_known_tokens,
    require_whole_distributions,
)
from compress.teachers.start import NothingToMergeError, Start, choose_start, merges_to_try
from limbeck.contract.errors import RecipeError
from limbeck.contract.progress import say
from limbeck.contract.recipe import (
    FreshStudent,
    LoraStudent,
    MergeStudent,
    Recipe,
    ShrinkStudent,
    fingerprint,
)
from limbeck.contract.recipe.checks import require_share_for_all
from limbeck.contract.sources.licences import sources_of
from limbeck.contract.sources.teacher_tokens import packing_of_conversations, reads_plain_text
from limbeck.contract.sources.tokenizer import load_tokenizer

_START_ROWS = 8  # training blocks of each domain that merges of teachers are scored on


class LanguageModels:
    """Everything that a training of a language model holds and does not change."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        products: Mapping[str, Path],
        accelerator: Any,
        precision: str,
        model: Any = None,
    ) -> None:
        """Load everything. ``model`` is a causal LM to train further; None builds the recipe's."""
        require_share_for_all(
            recipe,
            processes=accelerator.num_processes,
            sharded=accelerator.distributed_type == DistributedType.FSDP,
        )
        self.recipe, self.accelerator, self.precision = recipe, accelerator, precision
        self.device: torch.device = accelerator.device
        self.minutes, self.patience = recipe.training.minutes, recipe.training.patience
        self._frozen_head: Head | None = None
        with accelerator.main_process_first():  # the first one fills the cache, the others read it
            self.folders = teacher_folders(recipe, products)
            self.folder = student_folder(recipe, [f.tokenizer for f in self.folders])
            tokenizers = {f.name: f.tokenizer for f in self.folders}
            self.pairs = pair_teachers(
                self.folder,
                tokenizers,
                plain=reads_plain_text(recipe),
                chats=packing_of_conversations(recipe),
            )
            require_whole_distributions(recipe, self.pairs)
            tokenizer = load_tokenizer(self.folder)
            self.blocks = load_blocks(recipe, tokenizer)
            self.pairs = with_conversations(recipe, self.pairs, self.folder, tokenizers)
            self.text = TrainingText(recipe, self.blocks)
            self.steps, self.batch = self.text.steps, self.text.batch
            self.coverage = require_coverage(recipe, self.pairs, self.blocks)
            require_known_tokens(recipe, self.pairs, self.folder, self.blocks)
            # Licences are read now: the folders may be gone when the training is over.
            whole = [f.whole for f in self.folders]
            self.sources = sources_of(recipe, base=self.folder, teachers=whole)
            self.student = self._build(model)
        self.names, self.temperatures = self.teachers.names, self.teachers.temperatures
        self.vocabulary = self._shared_rows()  # now: sharded heads have other rows
        asked = recipe.training.on_policy
        self.own: OwnText | None = None
        if asked is not None and asked.share and self.steps != 0:
            others = not all(self.pairs.same_tokens)
            self.own = OwnText(recipe, asked, tokenizer, vocabulary=self.vocabulary, plain=others)
        self._fill_cache()

    def _build(self, model: Any) -> Student:
        """The student with projections beside it, after the teachers that it is aligned with."""
        recipe, made = self.recipe, model is None
        self.importance, self.kept = None, dict[str, Any]()
        self.start: Start | None = None
        if made:
            self.start = self._start()
            model, self.importance, self.kept = build_model(
                recipe,
                folder=self.folder,
                calibration=self._calibration(),
                device=self.device,
                begin=self.begin,
            )
        if self.kept:
            now, before = (self.kept[n] / 1e6 for n in ("parameters", "parameters_before"))
            say(f"  student: {now:.1f}M of {before:.1f}M parameters kept")
        dtype = DTYPES[self.precision]
        self.teachers = open_teachers(
            self.folders,
            pairs=self.pairs,
            cache=recipe.training.teacher_cache,
            device=self.device,
            compute_dtype=dtype,
        )
        use_short_attention(causal_lm(model))
        student = Student(model, self._projections(Body(model))).to(self.device)
        # DoRA takes norms of the base's weights; how a given model is trained is not known here.
        if made and isinstance(recipe.student, LoraStudent) and not recipe.student.dora:
            cast_frozen(model, dtype)
        if recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return student

    def _start(self) -> Start | None:
        """The merge of teachers that the student starts from; None where it starts from its base.

        Raises `RecipeError` where the recipe wants a merge and no teacher can be merged.
        """
        student = self.recipe.student
        # Embeddings of another tokenizer have other rows, even if their shape is equal.
        local = [
            f
            for f, same in zip(self.folders, self.pairs.same_tokens, strict=True)
            if isinstance(f, TeacherFolder) and same
        ]
        if isinstance(student, FreshStudent) or not local:
            return None
        init = "merge" if isinstance(student, MergeStudent) else student.init
        quantized = isinstance(student, LoraStudent) and student.quantize != "none"
        if init == "base" or quantized:  # `merge` and quantised is refused when the recipe is read
            return None
        ids, labels = self.text.first_rows(_START_ROWS * len(self.blocks))
        found = choose_start(
            self.folder,
            local,
            text=fingerprint([self.precision, ids.tolist(), labels.tolist()]),
            score=lambda model: self._loss_of(model, ids, labels),
            among=lambda names: merges_to_try(student, names),
            seed=self.recipe.seed,
            device=self.device,
        )
        if found is None and init == "merge":
            raise NothingToMergeError(
                "student: no teacher has the shape of the student's base, so there is nothing to "
                "merge; use student.kind: lora or shrink with init: base, or name teachers that "
                "were made from the base."
            )
        separate = self.recipe.export.adapters == "separate"
        dora = isinstance(student, LoraStudent) and student.dora
        if found is not None and separate and not found.can_join(self.folder, dora=dora):
            raise RecipeError(
                f"export.adapters: the student starts from {found.merge}, which is more than LoRA "
                "adapters can say; use student.init: base, or export.adapters: merged."
            )
        return found

    def begin(self, base: Any) -> None:
        """Give a freshly loaded base the weights that the student starts from."""
        if self.start is not None:
            self.start.apply(base, self.folder)

    @torch.no_grad()
    def _loss_of(self, model: Any, ids_RL: Tensor, labels_RL: Tensor) -> float:
        """Nats a token of a causal LM."""
        body, total = Body(model), 0.0
        for ids, labels in zip(ids_RL.split(4), labels_RL.split(4), strict=True):
            with self.accelerator.autocast():
                states = body.states(ids.to(self.device))[0]
            total += float(label_nll(states.float(), body.head, labels.to(self.device)).sum())
        return total / int((labels_RL != IGNORED).sum())

    def _projections(self, student: Body) -> Projections | None:
        teachers = self.teachers
        pairs = aligned_layers(self.recipe.features, student.layers, teachers.depths)
        if pairs is None:
            return None
        require_even_width(causal_lm(student.model).config.get_text_config(), "the student")
        for folder, depth in zip(self.folders, teachers.depths, strict=True):
            if depth and isinstance(folder, TeacherFolder):
                config = AutoConfig.from_pretrained(folder.base).get_text_config()
                require_even_width(config, f"teacher {folder.name}")
        return Projections(student_width=student.width, teacher_widths=teachers.widths, pairs=pairs)

    def _fill_cache(self) -> None:
        """Let the teachers read every block that training and measuring will need, once."""
        if isinstance(self.teachers, Teachers):
            return
        with self.accelerator.main_process_first(), self.accelerator.autocast():
            self.teachers.prepare(self.text.rows(), self.teacher_layers)

    # Text --------------------------------------------------------------------------------------

    def _shared_rows(self) -> int:
        """Token ids that student and teachers share: rows of the smallest head.

        A teacher with another tokenizer can weigh all of the student's ids.
        """
        theirs = zip(self.teachers.heads, self.pairs.pairs, strict=True)
        heads = [Body(self.student.model).head, *(head for head, pair in theirs if pair is None)]
        sizes = [len(head.weight_Vd) for head in heads if head is not None]
        if isinstance(self.teachers, MixedTeachers):
            sizes += self.teachers.served_vocabularies
        return min(sizes)

    @property
    def teacher_layers(self) -> list[list[int]] | None:
        """Layers of each teacher that feature alignment looks at."""
        projections = self.student.projections
        if projections is None:
            return None
        return [[j for _, j in pairs] for pairs in projections.pairs]

    def _calibration(self) -> list[Tensor]:
        """Training blocks that a shrunk student's importance is measured on."""
        if not isinstance(self.recipe.student, ShrinkStudent):
            return []
        rows = self.text.first_texts(self.recipe.student.calibration_blocks)
        return [torch.from_numpy(row).long()[None] for row in rows]

    def student_head(self) -> Head:
        """Return the student's head in the number type of the training.

        Call it inside the student's forward pass: only there FSDP has gathered the weights.
        """
        head, dtype = Body(self.student.model).head, DTYPES[self.precision]
        if head.weight_Vd.dtype == dtype:
            return head
        if self._frozen_head is not None:
            return self._frozen_head
        bias = head.bias_V.to(dtype) if head.bias_V is not None else None
        cast = replace(head, weight_Vd=head.weight_Vd.to(dtype), bias_V=bias)
        if not head.weight_Vd.requires_grad:
            self._frozen_head = cast  # it never changes, so it is cast once
        return cast
