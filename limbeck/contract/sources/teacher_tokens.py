"""Which teachers of a recipe have another tokenizer than its student, before anything is loaded.

Only folders on this machine are read. The run reports on GGUF files, which hold their tokenizers
in a form of their own, and on models that are not here yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from limbeck.contract.errors import UserError
from limbeck.contract.files import file_digest
from limbeck.contract.models.tokens import MORE_TEMPLATES
from limbeck.contract.recipe import (
    AnyRecipe,
    ChatRows,
    LocalModel,
    OnnxModel,
    PackageModel,
    Recipe,
    ServerModel,
    Teacher,
    TopkCache,
)
from limbeck.contract.sources.models import (
    adapter_tokenizer,
    model_path,
    require_tokenizer,
    tokenizer_path,
)
from limbeck.contract.sources.places import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from limbeck.contract.models.alignment import Relation


@dataclass(frozen=True)
class TeacherTokens:
    """A teacher's tokenizer beside the student's."""

    name: str
    relation: Relation

    def __str__(self) -> str:
        return f"teacher {self.name}: {self.relation}"


def compare_tokenizers(recipe: Recipe) -> list[TeacherTokens]:
    """Compare the tokenizers that are on this machine with that of the student's base.

    Raises `ModelError` for one that cannot be aligned.
    """
    own = _tokenizer_folder(recipe.base, recipe.folder) if recipe.base is not None else None
    folders = {
        name: _tokenizer_folder(model, recipe.folder, recipe.adapters.get(name))
        for name, model in recipe.teacher_models.items()
    }
    here = {name: _files(folder) for name, folder in folders.items() if folder is not None}
    if own is None or not here:
        return []
    plain, chats = reads_plain_text(recipe), packing_of_conversations(recipe)
    return list(_compared(_files(own), tuple(here.items()), plain, chats))


# Asked twice by `validate` and `plan`. The tokenizers themselves, of hundreds of MB, are let go.
@lru_cache(maxsize=8)
def _compared(
    own: _Files,
    teachers: tuple[tuple[str, _Files], ...],
    plain: bool,
    chats: Literal["document", "stream"] | None,
) -> tuple[TeacherTokens, ...]:
    from limbeck.contract.models.alignment import Pieces, Relation

    loaded = dict[_Files, "PreTrainedTokenizerFast"]()
    aligned = set[_Files]()
    found = list[TeacherTokens]()
    for name, files in teachers:
        if files == own:
            found.append(TeacherTokens(name, Relation(True)))
            continue
        # Classes of transformers change what tokenizer.json says, for example the first token.
        from limbeck.contract.sources.tokenizer import load_tokenizer, relation

        for one in (own, files):
            if one not in loaded:
                loaded[one] = load_tokenizer(one.folder)
        relates = relation(loaded[own], loaded[files], plain=plain, chats=chats)
        if not relates.same or relates.renders:
            for one, whose in ((own, "the student"), (files, f"teacher {name}")):
                if one not in aligned:
                    Pieces(loaded[one].backend_tokenizer, name=whose)
                    aligned.add(one)
        found.append(TeacherTokens(name, relates))
    return tuple(found)


def tokenizer_mistakes(recipe: AnyRecipe) -> Iterator[str]:
    """Check that teachers of other tokenizers can be aligned, and that there is text for them.

    Encoders need one tokenizer.
    """
    if not isinstance(recipe, Recipe):
        yield from _mistakes_of_encoders(recipe)
        return
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


def _mistakes_of_encoders(recipe: AnyRecipe) -> Iterator[str]:
    sources = {"the student": recipe.base} if recipe.base is not None else {}
    found = {
        name: _tokenizer_folder(s.like if isinstance(s, OnnxModel) else s, recipe.folder)
        for name, s in (sources | recipe.teacher_models).items()
    }
    here = {name: _files(folder) for name, folder in found.items() if folder is not None}
    if len(set(here.values())) > 1 and (why := _different(tuple(here.items()))):
        yield f"teachers: {why}"


@lru_cache(maxsize=8)  # a search plans many students
def _different(models: tuple[tuple[str, _Files], ...]) -> str | None:
    from limbeck.contract.sources.tokenizer import require_same_tokenizer

    try:
        require_same_tokenizer({name: files.folder for name, files in models})
    except UserError as error:
        return str(error)
    return None


def reads_plain_text(recipe: Recipe) -> bool:
    """Whether any text of a recipe is no conversation, so that tokens before a text matter."""
    return not all(isinstance(text.format, ChatRows) for _, text in recipe.texts())


def packing_of_conversations(recipe: Recipe) -> Literal["document", "stream"] | None:
    """How conversations are packed; None where there are none.

    As documents they are read one by one, so each teacher may read them in its own template.
    """
    chats = any(isinstance(domain.text.format, ChatRows) for domain in recipe.data.domains)
    return recipe.data.packing if chats else None


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


def _tokenizer_folder(source: object, folder: Path, adapter: Path | None = None) -> Path | None:
    """Folder here that holds the tokenizer of a model, or of the ``adapter`` on it.

    None where it is not known yet.
    """
    if adapter is not None:
        own = adapter_tokenizer((folder / adapter.expanduser()).resolve())
        if own is not None:
            return own
    try:
        if isinstance(source, ServerModel):
            path = tokenizer_path(source.tokenizer, folder=folder)
        elif isinstance(source, LocalModel | PackageModel):
            path = model_path(source, folder=folder)
        else:
            return None
        if path is None or not path.is_dir():
            return None
        require_tokenizer(path)
    except UserError:  # preflight has named it
        return None
    return path


@dataclass(frozen=True)
class _Files:
    """What transformers makes a tokenizer of; equal files in two folders are one tokenizer."""

    digests: tuple[tuple[str, str], ...]  # by name
    model_type: str
    folder: Path = field(compare=False)


def _files(folder: Path) -> _Files:
    config = folder / "config.json"
    names = "*token*", "vocab*", "merges.txt", "*.model", "*.jinja", f"{MORE_TEMPLATES}/*"
    found = {path for name in names for path in folder.glob(name) if path.is_file()}
    digests = sorted((str(path.relative_to(folder)), file_digest(path)) for path in found)
    kind = read_object(config).get("model_type") if config.is_file() else None
    return _Files(tuple(digests), str(kind), folder)
