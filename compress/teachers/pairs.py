"""Which teachers share the student's tokenizer, and how the others are aligned with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from compress.aligned import Pair
from compress.data.blocks import DomainBlocks, labels_of
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.errors import DataError, ModelError, RecipeError
from limbeck.contract.lock import make_once
from limbeck.contract.models.alignment import Aligner, Pieces, projection
from limbeck.contract.progress import say
from limbeck.contract.recipe import Recipe, fingerprint
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.teacher_tokens import sorted_is_unknown
from limbeck.contract.sources.tokenizer import load_tokenizer, relation

_VERSION = 3  # raise it when two tokenizers would give another alignment or projection
_ROWS = 32  # training blocks of a domain that coverage is measured on


@dataclass(frozen=True)
class Pairs:
    """Every teacher's relation to the student's tokenizer, in their order."""

    pairs: tuple[Pair | None, ...]  # None: the teacher reads the student's tokens
    differ: tuple[tuple[str, ...], ...]  # added tokens that only one of the two has

    def __getitem__(self, k: int) -> Pair | None:
        return self.pairs[k]

    @property
    def same_tokens(self) -> tuple[bool, ...]:
        """Whether each teacher has the student's token map, and so embeddings of the same rows."""
        return tuple(pair is None or pair.aligner.same for pair in self.pairs)

    def only(self, chosen: Sequence[int]) -> Pairs:
        """The pairs of some teachers."""
        return Pairs(tuple(self.pairs[k] for k in chosen), tuple(self.differ[k] for k in chosen))

    def digest(self, k: int) -> str | None:
        """Fingerprint of both tokenizers; None where they are one."""
        pair = self.pairs[k]
        if pair is None:
            return None
        sides = [(side.digest, side.end) for side in (pair.aligner.own, pair.aligner.other)]
        chats = pair.conversations
        same = [True] if pair.aligner.same else []
        return fingerprint([_VERSION, sides, *([chats.digest] if chats else []), *same])


def pair_teachers(
    student: Path,
    teachers: Mapping[str, Path],
    *,
    plain: bool = True,
    chats: Literal["document", "stream"] | None = None,
) -> Pairs:
    """Compare each teacher's tokenizer with the student's, and align those that differ.

    `limbeck.contract.sources.tokenizer.relation` says what ``plain`` and ``chats`` are. Raises
    `ModelError` for a tokenizer that cannot be aligned.
    """
    if not teachers:
        return Pairs((), ())
    mine = load_tokenizer(student)
    own: Pieces | None = None
    pairs: list[Pair | None] = []
    differ: list[tuple[str, ...]] = []
    for name, folder in teachers.items():
        theirs = load_tokenizer(folder)
        found = relation(mine, theirs, plain=plain, chats=chats)
        differ.append(found.differ)
        if not found.equal:
            say(f"  teacher {name}: {found}")
        if found.same and not found.renders:
            pairs.append(None)
            continue
        own = own or pieces_of(mine, "the student")
        other = pieces_of(theirs, f"teacher {name}")
        target = _equal_ids(own, other) if found.same else _projection(own, other)
        pairs.append(Pair(Aligner(own, other, same=found.same), torch.from_numpy(target)))
    return Pairs(tuple(pairs), tuple(differ))


def require_whole_distributions(recipe: Recipe, pairs: Pairs) -> None:
    """Raise `RecipeError` for `across: uld` where only a few tokens of a distribution are known."""
    for teacher, pair in zip(recipe.teachers, pairs.pairs, strict=True):
        if pair is not None and (why := sorted_is_unknown(recipe, teacher)):
            raise RecipeError(why)


def pieces_of(tokenizer: Any, name: str) -> Pieces:
    """The tokens of a tokenizer as bytes. Raises `ModelError` where they are not."""
    return Pieces(tokenizer.backend_tokenizer, name=name, end=tokenizer.eos_token_id)


def _equal_ids(own: Pieces, other: Pieces) -> np.ndarray:
    """The projection of a tokenizer with the same ids; -1 for tokens that only one of them has."""
    mine, theirs = (side.tokenizer.get_vocab(with_added_tokens=True) for side in (own, other))
    target = np.full(len(other), -1, np.int64)
    for token, index in theirs.items():
        if mine.get(token) == index:
            target[index] = index
    return target


def _projection(own: Pieces, other: Pieces) -> np.ndarray:
    """The cached projection of one vocabulary into the other."""
    key = fingerprint({"projection": _VERSION, "sides": [(s.digest, s.end) for s in (own, other)]})
    path = cache_folder() / "projections" / key[:16]

    def make(out: Path) -> dict[str, Any]:
        target = projection(own, other)
        np.save(out / "target.npy", target)
        return {"tokens": len(target), "without_target": int((target < 0).sum())}

    make_once(path, kind="projection", key=key, parents={}, make=make)
    found: np.ndarray = np.load(path / "target.npy")
    return found


# Coverage ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """How much of a domain a teacher of another tokenizer reads as the student does."""

    bytes: float  # share of the label bytes in chunks whose likelihood it gives
    positions: float  # share of the labels that it has a distribution for
    tokens: float  # its tokens for each of the student's


def measure_coverage(pair: Pair, rows: Sequence[tuple[Any, Any]]) -> Coverage:
    """Coverage over rows of token ids and labels ``[N, L]``."""
    sizes = np.array([len(piece) for piece in pair.aligner.own.of] + [0])
    labels = given = size = given_size = 0
    rates = []
    for ids, wanted in rows:
        a = pair.align(torch.as_tensor(ids).long(), torch.as_tensor(wanted))
        valid = np.asarray(wanted) >= 0
        bytes_RL = sizes[np.where(valid, np.minimum(wanted, len(sizes) - 1), -1)] * valid
        spans = a.spans
        labels += int(valid.sum())
        given += int((spans.target_RL.numpy() & valid).sum())
        size += int(bytes_RL.sum())
        given_size += int(bytes_RL[spans.start_RL.numpy() >= 0].sum())
        rates += a.rate_R.tolist()
    return Coverage(
        given_size / max(size, 1), given / max(labels, 1), math.fsum(rates) / max(len(rates), 1)
    )


def coverage_by_domain(pair: Pair, blocks: Sequence[DomainBlocks]) -> dict[str, Coverage]:
    """Coverage of training text by domain, on blocks at even distances."""
    found = {}
    for domain in blocks:
        count = len(domain.train_ids)
        chosen = np.unique(np.linspace(0, count - 1, min(count, _ROWS)).round().astype(int))
        ids, scored = domain.train_ids[chosen], domain.train_scored[chosen]
        found[domain.name] = measure_coverage(pair, [(ids, labels_of(ids, scored))])
    return found


def require_coverage(
    recipe: Recipe, pairs: Pairs, blocks: Sequence[DomainBlocks]
) -> dict[str, dict[str, Coverage]]:
    """Show the coverage of each teacher of another tokenizer, by domain, and return it.

    Raises `DataError` where it is below `teachers.N.min_coverage`.
    """
    found: dict[str, dict[str, Coverage]] = {}
    for k, teacher in enumerate(recipe.teachers):
        pair = pairs[k]
        if pair is None:
            continue
        by_domain = found[teacher.name] = coverage_by_domain(pair, blocks)
        shown = "  ".join(
            f"{name} {c.bytes:.1%} of the bytes, {c.positions:.1%} of the labels"
            for name, c in by_domain.items()
        )
        say(f"    covers {shown}")
        floor = teacher.min_coverage
        low = {n: c.positions for n, c in by_domain.items() if floor and c.positions < floor}
        if low:
            numbers = ", ".join(f"{share:.1%} of {name}" for name, share in low.items())
            raise DataError(
                f"teachers.{k}.min_coverage: {teacher.name} has a distribution for {numbers}, and "
                f"the floor is {floor:.1%}; lower it, or take a teacher whose tokenizer is nearer "
                "to the student's."
            )
    return found


def require_known_tokens(
    recipe: Recipe, pairs: Pairs, student: Path, blocks: Sequence[DomainBlocks]
) -> None:
    """Raise `ModelError` where the text holds an added token that a teacher does not have."""
    if not any(pairs.differ):
        return
    vocabulary = load_tokenizer(student).get_vocab()
    names = {index: token for token, index in vocabulary.items()}
    for teacher, differ in zip(recipe.teachers, pairs.differ, strict=True):
        foreign = np.array([vocabulary[token] for token in differ if token in vocabulary])
        for domain in blocks if len(foreign) else ():
            for ids, scored in _texts(domain):
                used = np.intersect1d(np.where(scored, ids, -1), foreign)
                if len(used):
                    raise ModelError(
                        f"teacher {teacher.name}: its tokenizer does not have the added token "
                        f"{names[int(used[0])]!r} of the student's, which the text of "
                        f"{domain.name} holds; use a teacher with that token, or other text."
                    )


def _texts(domain: DomainBlocks) -> list[tuple[Any, Any]]:
    heldout: Blocks = domain.heldout
    within = np.arange(heldout.input_ids.shape[1]) < heldout.lengths[:, None]
    lengths = np.asarray(domain.train_lengths)[:, None]
    inside = np.arange(domain.train_ids.shape[1]) < lengths
    return [(domain.train_ids, inside), (heldout.input_ids, within)]
