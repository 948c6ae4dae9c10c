"""Which teachers of a recipe have another tokenizer than its student, before anything is loaded.

Only tokenizer.json files on this machine are read. Of a GGUF file, which holds its tokenizer in a
form of its own, and of models that are not here yet, the run tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.contract.errors import UserError
from limbeck.contract.models.tokens import read_tokenizer, same_chat
from limbeck.contract.recipe import (
    ChatRows,
    LocalModel,
    PackageModel,
    Recipe,
    ServerModel,
    Teacher,
    TopkCache,
)
from limbeck.contract.sources.models import model_path, tokenizer_path

if TYPE_CHECKING:
    from limbeck.contract.models.alignment import Relation


@dataclass(frozen=True)
class TeacherTokens:
    """A teacher's tokenizer beside the student's."""

    name: str
    relation: Relation

    def __str__(self) -> str:
        match self.relation.same, len(self.relation.differ):
            case True, 0:
                return f"teacher {self.name}: the student's tokenizer"
            case True, count:
                return f"teacher {self.name}: the student's tokenizer, but for {count} added tokens"
            case _:
                return (
                    f"teacher {self.name}: another tokenizer; aligned with the student's on bytes "
                    "of the text"
                )


def compare_tokenizers(recipe: Recipe) -> list[TeacherTokens]:
    """Compare the tokenizers that are on this machine with that of the student's base.

    Raises `ModelError` for one that cannot be aligned.
    """
    own = _tokenizer_file(recipe.base, recipe.folder) if recipe.base is not None else None
    files = {n: _tokenizer_file(model, recipe.folder) for n, model in recipe.teacher_models.items()}
    paths = {name: path for name, path in files.items() if path is not None}
    if own is None or not paths:
        return []
    from limbeck.contract.models.alignment import Pieces, relate

    mine, found = read_tokenizer(own), list[TeacherTokens]()
    for name, path in paths.items():
        theirs = read_tokenizer(path)
        begins = reads_plain_text(recipe) or not same_chat(own.parent, path.parent)
        relation = relate(mine, theirs, begins=begins)
        if not relation.same:
            Pieces(mine, name="the student")
            Pieces(theirs, name=f"teacher {name}")
        found.append(TeacherTokens(name, relation))
    return found


def tokenizer_mistakes(recipe: Recipe) -> Iterator[str]:
    """Check that teachers of other tokenizers can be aligned, and that there is text for them."""
    try:
        others = [t.name for t in compare_tokenizers(recipe) if not t.relation.same]
    except UserError as error:
        yield f"teachers: {error}"
        return
    for teacher in recipe.teachers:
        if teacher.name in others and (why := sorted_is_unknown(recipe, teacher)):
            yield why
        if teacher.name in others and (why := conversations_are_unknown(recipe, teacher.name)):
            yield why


def reads_plain_text(recipe: Recipe) -> bool:
    """Whether any text of a recipe is no conversation, so that tokens before a text matter."""
    return not all(isinstance(text.format, ChatRows) for _, text in recipe.texts())


def sorted_is_unknown(recipe: Recipe, teacher: Teacher) -> str | None:
    """Why `across: uld` cannot be used with a teacher of another tokenizer; None where it can."""
    served = isinstance(teacher.model, ServerModel)
    if recipe.fusion.across != "uld" or not (
        served or isinstance(recipe.training.teacher_cache, TopkCache)
    ):
        return None
    knows = "its server gives" if served else "the cache topk keeps"
    return (
        f"fusion.across: uld compares whole distributions, and {knows} the likeliest tokens of "
        f"teacher {teacher.name} only; use projected or chunk"
    )


def conversations_are_unknown(recipe: Recipe, teacher: str) -> str | None:
    """Why conversations cannot be aligned with a teacher of another tokenizer, or None."""
    own, domains = recipe.training.on_policy, recipe.data.domains
    chats = [i for i, d in enumerate(domains) if isinstance(d.text.format, ChatRows)]
    prompts = own.prompts.text if own is not None and own.share else None
    if prompts is not None and isinstance(prompts.format, ChatRows):
        return (
            f"training.on_policy.prompts.text: teacher {teacher} has another tokenizer, and own "
            "text is aligned with it in plain text only; name plain text"
        )
    if not chats:
        return None
    if own is not None and own.share and prompts is None:
        return (
            f"training.on_policy: teacher {teacher} has another tokenizer, and own text is aligned "
            f"with it in plain text only, but data.domains.{chats[0]} holds conversations; leave "
            "on_policy out, or name plain text as prompts.text"
        )
    if recipe.data.packing != "document":
        return (
            f"data.packing: teacher {teacher} has another tokenizer, and reads conversations one "
            "by one in its own chat template; set it to document"
        )
    return None


def _tokenizer_file(source: object, folder: Path) -> Path | None:
    """tokenizer.json of a model that is a folder here; None where it is not known yet."""
    try:
        if isinstance(source, ServerModel):
            path = tokenizer_path(source.tokenizer, folder=folder)
        elif isinstance(source, LocalModel | PackageModel):
            path = model_path(source, folder=folder)
        else:
            return None
    except UserError:  # preflight has named it
        return None
    if path is None or not (path / "tokenizer.json").is_file():
        return None
    return path / "tokenizer.json"
