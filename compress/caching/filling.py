"""The teacher cache of a recipe, filled before its training and without its student.

A shard's content depends on the recipe alone, and its name on its content. So any process may make
any shard, in any order, and what a killed one has not finished another one makes anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from compress.data.blocks import load_blocks
from compress.data.training_text import TrainingText
from compress.features import aligned_layers
from compress.footprint.language import describe, student_config
from compress.host import prepare_host, resolve_precision
from compress.models.language import DTYPES, model_config, resolve_device
from compress.models.students import student_folder
from compress.teachers.cache import CachedTeachers
from compress.teachers.conversations import with_conversations
from compress.teachers.live import teacher_folders
from compress.teachers.mixed import MixedTeachers, open_teachers
from compress.teachers.pairs import pair_teachers, require_coverage
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.progress import task
from limbeck.contract.recipe import Recipe
from limbeck.contract.sources.teacher_tokens import packing_of_conversations, reads_plain_text
from limbeck.contract.sources.tokenizer import load_tokenizer


class TeacherCache:
    """Everything that the teachers of a recipe will be asked, and the means to answer it."""

    def __init__(self, recipe: Recipe, products: Mapping[str, Path]) -> None:
        """Load the text. A teacher is loaded when it first has to answer.

        Raises `RecipeError` for a recipe whose training keeps no cache, and `ModelError` and
        `DataError` as a training does.
        """
        recipe.require_cache()
        device = resolve_device(recipe.training.device)
        precision = resolve_precision(recipe.training.precision, device)
        prepare_host(recipe.training.threads)
        folders = teacher_folders(recipe, products)
        folder = student_folder(recipe, [f.tokenizer for f in folders])
        tokenizers = {f.name: f.tokenizer for f in folders}
        pairs = pair_teachers(
            folder,
            tokenizers,
            plain=reads_plain_text(recipe),
            chats=packing_of_conversations(recipe),
        )
        tokenizer = load_tokenizer(folder)
        blocks = load_blocks(recipe, tokenizer)
        pairs = with_conversations(recipe, pairs, folder, tokenizers)
        require_coverage(recipe, pairs, blocks)
        text = TrainingText(recipe, blocks)
        found = open_teachers(
            folders,
            pairs=pairs,
            cache=recipe.training.teacher_cache,
            device=device,
            compute_dtype=DTYPES[precision],
        )
        local = found.local if isinstance(found, MixedTeachers) else found
        assert isinstance(local, CachedTeachers)
        self._teachers, self._local, self._autocast = found, local, precision == "bf16"
        self._device = device
        base = model_config(recipe.base, folder=recipe.folder) if recipe.base else None
        config = student_config(recipe, base=base, vocabulary=len(tokenizer))
        layers = aligned_layers(recipe.features, describe(config).layers, found.depths)
        self._rows = text.rows()
        mine = [[j for _, j in of] for of in layers] if layers is not None else None
        if isinstance(found, MixedTeachers) and mine is not None:
            mine = found.of_local(mine)
        self._shards = local.shards(self._rows, mine)

    @property
    def jobs(self) -> list[tuple[int, int]]:
        """Teacher and shard of everything that teachers in this process answer."""
        return [(k, at) for k in range(len(self._local)) for at in range(len(self._shards))]

    def missing(self) -> list[tuple[int, int]]:
        """The jobs whose shard is not in the store."""
        return [(k, at) for k, at in self.jobs if not self._local.has(k, self._shards[at])]

    def require_all(self) -> None:
        """Raise `EnvironmentalError` unless every shard is where this machine looks for it."""
        if missing := self.missing():
            raise EnvironmentalError(
                f"the workers have made every shard, but {len(missing)} of {len(self.jobs)} are "
                f"not in {self._local.store.place}; give all nodes one shared folder and name it "
                "with LIMBECK_CACHE, or name a URL that all nodes reach with --to."
            )

    def make(self, teacher: int, shard: int) -> str:
        """Make one shard unless it is there; its digest."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return self._local.fill(teacher, self._shards[shard])

    def complete(self) -> dict[str, str]:
        """Make what is missing, ask servers too, check every file; digests of all local shards.

        One shard is in memory at a time.
        """
        found = {}
        with task("teacher cache, shards", len(self.jobs)) as progress:
            for k, at in self.jobs:
                found[f"{k}/{at}"] = self.make(k, at)
                progress.advance()
        if isinstance(self._teachers, MixedTeachers):
            self._teachers.served.prepare(self._rows)
        return found
