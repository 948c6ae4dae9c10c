"""Teachers behind a server: each text is asked for once, and the answers stay in the teacher cache.

A server gives the k likeliest tokens of every position and the label's own log-probability, which
is what a `topk` cache keeps. Only the entropy is not exact: it lies between two bounds, and the
middle is used. An answer is written as it comes, so that a build that was stopped asks for nothing
twice; whole shards are artifacts. Texts are found by their token ids, for any recipe.

A teacher with another tokenizer than the student's is asked for the text in its own tokens. What
is kept are its answers; they are projected into the student's vocabulary when they are read.

Shapes: R rows, L positions, M positions of a text in the teacher's tokens, P positions of one
text, k tokens kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from compress.aligned import ANY_ROWS, Alignment, Pair
from compress.data.training_text import Row
from compress.head import IGNORED
from compress.models.gguf import gguf_key, gguf_tokenizer
from compress.models.language import cached
from compress.states import SparseStates
from compress.teachers.prompt_logprobs import Likeliest, Server
from limbeck.contract.artifact import MANIFEST, open_artifact
from limbeck.contract.errors import ArtifactError, ModelError
from limbeck.contract.files import disk_full_is_a_user_error, new_folder, sweep
from limbeck.contract.lock import make_once
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import (
    HubModel,
    Recipe,
    ServerModel,
    Teacher,
    TokenizerSource,
    fingerprint,
)
from limbeck.contract.sources.digests import model_digest
from limbeck.contract.sources.hub import hub_tokenizer
from limbeck.contract.sources.models import tokenizer_path
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.runtime.endpoint import Endpoint, find_endpoint

Text = tuple[bytes, list[int]]  # key and token ids

_VERSION = 1
_SHARD_ROWS = 64
_ANOTHER_MODEL = 0.1  # nats a token; vLLM in bf16 differed by 0.04 from the same model in fp32


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher behind a server, and the folder of its tokenizer on this machine."""

    name: str
    model: ServerModel
    tokenizer: Path
    digest: str

    @property
    def whole(self) -> Path:
        """What is on this machine of it."""
        return self.tokenizer

    def entry(self, temperature: float) -> dict[str, Any]:
        """The teacher's entry in `teachers.json`."""
        return {
            "name": self.name, "server": self.model.endpoint, "model": self.model.model,
            "temperature": temperature, "digest": self.digest,
        }  # fmt: skip


def served_teacher(teacher: Teacher, recipe: Recipe) -> ServedTeacher:
    """Find the tokenizer of a served teacher. Asks the server nothing. Raises `ModelError`."""
    assert isinstance(teacher.model, ServerModel)
    digest = model_digest(teacher.model, folder=recipe.folder, products={})
    folder = _tokenizer_folder(teacher.model.tokenizer, folder=recipe.folder)
    return ServedTeacher(teacher.name, teacher.model, folder, digest)


class ServedTeachers:
    """Teachers behind servers, which answer from the cache. Call `prepare` with rows to come."""

    def __init__(
        self,
        teachers: Sequence[ServedTeacher],
        *,
        device: torch.device,
        pairs: Sequence[Pair | None] | None = None,
    ) -> None:
        """``pairs`` are given for teachers with another tokenizer than the student's."""
        self._device = device
        pairs = pairs or [None] * len(teachers)
        self._teachers = [_Cache(*found) for found in zip(teachers, pairs, strict=True)]

    @property
    def vocabularies(self) -> list[int]:
        """Number of token ids of each teacher that has the student's tokenizer."""
        return [teacher.vocabulary for teacher in self._teachers if teacher.pair is None]

    def prepare(self, rows: Sequence[Row]) -> None:
        """Read the answers for all ``rows``, and ask the servers for those that are missing."""
        for teacher in self._teachers:
            teacher.prepare(rows)

    def states(self, k: int, input_ids_RL: Tensor, labels_RL: Tensor | None = None) -> SparseStates:
        """Answers of teacher ``k`` for rows of token ids. Rows that are unknown are asked for.

        ``labels_RL`` says which tokens are labels; None: all but the first.
        """
        labels = labels_RL.cpu() if labels_RL is not None else None
        return self._teachers[k].states(input_ids_RL.cpu(), labels, self._device)


class _Cache:
    """What one served teacher has answered."""

    def __init__(self, teacher: ServedTeacher, pair: Pair | None) -> None:
        self.teacher, self.pair = teacher, pair
        self._tokenizer = load_tokenizer(teacher.tokenizer)
        # By ids and not by count: a map may leave out numbers.
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values())
        key = fingerprint({"version": _VERSION, "served": teacher.digest})
        self._folder = cache_folder() / "teachers" / f"served-{key[:16]}"
        self._endpoint: Endpoint | None = None  # once it has been checked
        self._taken: set[Path] = set()  # shards
        self._answered: dict[bytes, Answered] = {}  # by the ids of a text
        self._texts: dict[bytes, bytes] = {}  # ids of a row, padding included -> ids of its text

    def prepare(self, rows: Sequence[Row]) -> None:
        texts: dict[bytes, list[int]] = {}
        for ids, labels in rows:
            if self.pair is not None:
                (text,) = self.pair.align(ids[None], labels[None]).texts
                key = _key(text)
            else:
                text = ids[: _length(labels)].tolist()
                self._texts[_key(ids.tolist())] = key = _key(text)
            if len(text) > 1:
                texts[key] = text
        for path in sorted(self._folder.glob("rows-*")):  # of earlier starts and other recipes
            if (path / MANIFEST).is_file():
                self._take(path, verify=True)
        missing = [(key, text) for key, text in texts.items() if key not in self._answered]
        with task(f"teacher {self.teacher.name}, served", len(texts)) as progress:
            progress.advance(len(texts) - len(missing))
            if missing:
                with self._server(max(len(text) for _, text in missing)) as server:
                    for at in range(0, len(missing), _SHARD_ROWS):
                        shard = missing[at : at + _SHARD_ROWS]
                        self._take(self._shard(shard, server))
                        progress.advance(len(shard))
        found = [self._answered[key] for key in texts]
        if found:
            wide = sum(answered.half_width for answered in found) / len(found)
            say(
                f"  teacher {self.teacher.name}: its entropies are known to {wide:.3f} nats "
                "either way"
            )

    def states(
        self, input_ids_RL: Tensor, labels_RL: Tensor | None, device: torch.device
    ) -> SparseStates:
        if self.pair is None:
            texts = input_ids_RL.tolist()
            if labels_RL is not None:  # padding is no text
                texts = [row[: _length(own)] for row, own in zip(texts, labels_RL, strict=True)]
            keys = [
                self._texts.get(_key(row)) or _key(text)
                for row, text in zip(input_ids_RL.tolist(), texts, strict=True)
            ]
            return self._stacked(keys, texts, input_ids_RL.shape[1], device)
        alignment = self.pair.align(input_ids_RL, labels_RL)
        texts = alignment.texts
        found = self._stacked([_key(t) for t in texts], texts, alignment.ids_RM.shape[1], device)
        target_V = self.pair.target(self.vocabulary, device)
        answered = projected(found, alignment.to(device), target_V)
        return replace(answered, renames=self.pair.renames)

    def _stacked(
        self, keys: Sequence[bytes], texts: Sequence[list[int]], L: int, device: torch.device
    ) -> SparseStates:
        """Answers for texts, whose positions are padded to ``L``."""
        R = len(keys)
        k = min(self.teacher.model.top, self.vocabulary)
        ids_RLk = torch.zeros(R, L, k, dtype=torch.int32)
        share_RLk = torch.zeros(R, L, k)
        entropy_RL, label_logp_RL = torch.zeros(R, L), torch.zeros(R, L)
        for row, answered in enumerate(self._of_texts(keys, texts)):
            if answered is None:
                continue
            here = slice(answered.length)
            ids_RLk[row, here] = answered["ids"]
            share_RLk[row, here] = answered["share"]
            entropy_RL[row, here] = answered["entropy"].mean(-1)
            label_logp_RL[row, here] = answered["label_logp"]
        return SparseStates(
            ids_RLk.to(device),
            share_RLk.to(device),
            entropy_RL.to(device),
            label_logp_RL.to(device),
            self.vocabulary,
        )

    def _of_texts(self, keys: Sequence[bytes], texts: Sequence[list[int]]) -> list[Answered | None]:
        """Answers for texts by their keys; None for one without an answer and of one token."""
        # Unknown texts are made while training, such as the student's own.
        unknown = {
            key: text
            for key, text in zip(keys, texts, strict=True)
            if len(text) > 1 and key not in self._answered
        }
        fresh = dict[bytes, Answered]()
        if unknown:
            with self._server(max(map(len, unknown.values()))) as server:
                answers = self._answers(list(unknown.items()), server)
            fresh = {
                key: Answered(answer, len(answer["label_logp"]))
                for key, answer in zip(unknown, answers, strict=True)
            }
        return [fresh.get(key) or self._answered.get(key) for key in keys]

    @contextmanager
    def _server(self, tokens: int) -> Iterator[Server]:
        """The server, checked, for texts of up to ``tokens`` tokens."""
        model = self.teacher.model
        if self._endpoint is None:
            endpoint = find_endpoint(model.endpoint, model.model, model.key_variable)
        else:
            endpoint = self._endpoint
        with Server(self.teacher.name, model, endpoint, vocabulary=self.vocabulary) as server:
            server.require_room(tokens, aligned=self.pair is not None)
            if self._endpoint is None:
                self._require_known_model(server.probe(self._tokenizer))
                self._endpoint = endpoint
            yield server

    def _require_known_model(self, found: dict[str, list[float]]) -> None:
        """Raise `ModelError` if another model answers than the one that began this cache."""
        path = self._folder / "probe"
        key = fingerprint([self.teacher.digest, found["ids"]])
        parents = {"teacher": self.teacher.digest}
        make_once(path, kind="teacher-probe", key=key, parents=parents, make=lambda _: found)
        before = open_artifact(path, verify=False).result["label_logp"]
        gap = float(np.mean(np.abs(np.subtract(before, found["label_logp"]))))
        if gap > _ANOTHER_MODEL:
            raise ModelError(
                f"teacher {self.teacher.name}: another model answers at {self.teacher.model.url} "
                f"as {self.teacher.model.model!r} than the one that its cache was begun with: the "
                f"log-probabilities of a text differ by {gap:.2f} nats a token. Serve it under "
                f"another name, or delete {self._folder}."
            )

    def _shard(self, shard: Sequence[Text], server: Server) -> Path:
        """Folder with the answers for the texts of one shard; made when missing."""
        texts = [key.hex() for key, _ in shard]
        key = fingerprint({"version": _VERSION, "served": self.teacher.digest, "texts": texts})
        path = self._folder / f"rows-{key[:16]}"

        def make(out: Path) -> dict[str, Any]:
            answers = self._answers(shard, server)
            lengths = [len(answer["label_logp"]) for answer in answers]
            tensors = {
                name: torch.stack([_padded(answer[name], max(lengths)) for answer in answers])
                for name in answers[0]
            }
            save_file(tensors, out / "rows.safetensors")
            return {"texts": texts, "lengths": lengths}

        parents = {"teacher": self.teacher.digest}
        make_once(path, kind="teacher-rows", key=key, parents=parents, make=make)
        for text, _ in shard:
            self._answer_file(text).unlink(missing_ok=True)
        return path

    def _take(self, path: Path, *, verify: bool = False) -> None:
        if path in self._taken:
            return
        self._taken.add(path)
        result = open_artifact(path, kind="teacher-rows", verify=verify).result
        tensors = load_file(path / "rows.safetensors")
        for place, (text, length) in enumerate(
            zip(result["texts"], result["lengths"], strict=True)
        ):
            self._answered[bytes.fromhex(text)] = Answered(tensors, length, place)

    def _answers(self, texts: Sequence[Text], server: Server) -> list[dict[str, Tensor]]:
        """Answers for some texts. Each is written as it comes; those that are there stay."""
        (self._folder / "answers").mkdir(parents=True, exist_ok=True)
        sweep(self._folder / "answers")
        with ThreadPoolExecutor(self.teacher.model.concurrency) as pool:
            asked = [
                pool.submit(self._ask, key, text, server)
                for key, text in texts
                if not self._answer_file(key).is_file()
            ]
            try:
                for one in as_completed(asked):
                    one.result()
            except BaseException:
                server.give_up()
                pool.shutdown(cancel_futures=True)
                raise
        return [_load(self._answer_file(key)) for key, _ in texts]

    def _ask(self, key: bytes, text: list[int], server: Server) -> None:
        tensors = _kept(server.ask(text), self.vocabulary)
        path = self._answer_file(key)
        content = save(tensors)
        with disk_full_is_a_user_error(path), new_folder(path) as folder:
            with (folder / "row").open("wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
                file.flush()
                os.fsync(file.fileno())
            (folder / "row").rename(path)

    def _answer_file(self, text: bytes) -> Path:
        return self._folder / "answers" / text.hex()


def projected(found: SparseStates, alignment: Alignment, target_V: Tensor) -> SparseStates:
    """Answers at the teacher's own positions ``[R, M]``, written for the student's ``[R, L]``.

    ``target_V`` is the student's token that begins each teacher token, or -1. Tokens of one target
    add up. Mass without a target is lost; unknown mass stays in the tail.
    """
    a, spans = alignment, alignment.spans
    at_RL, has_RL = a.at_RL.clamp(min=0), spans.target_RL
    at_RLk = at_RL[..., None].expand(-1, -1, found.ids_RLk.shape[-1])
    share_RLk = found.share_RLk.gather(1, at_RLk) * has_RL[..., None]
    ids_RLk = target_V[found.ids_RLk.long().gather(1, at_RLk)]
    known_RLk = (ids_RLk >= 0) & (share_RLk > 0)
    # Without a share, an id repeats a known one: the tail is not spread over the ids.
    first_RL1 = known_RLk.float().argmax(-1, keepdim=True)
    ids_RLk = torch.where(known_RLk, ids_RLk, ids_RLk.gather(-1, first_RL1).clamp(min=0))
    sums_RM = torch.nn.functional.pad(found.label_logp_RL.double().cumsum(1), (1, 0))
    evidence_RL = sums_RM.gather(1, a.last_RL) - sums_RM.gather(1, a.first_RL)
    return SparseStates(
        ids_RLk.int(),
        share_RLk * known_RLk,
        found.entropy_RL.gather(1, at_RL) * a.rate_R[:, None] * has_RL,
        evidence_RL.float() * spans.ends_RL,
        ANY_ROWS,
        spans=spans,
        lost_RL=(share_RLk * ~known_RLk).sum(-1),
    )


@dataclass(frozen=True)
class Answered:
    """The answer for one text: tensors of its positions, alone or at ``place`` of a shard."""

    tensors: Mapping[str, Tensor]
    length: int
    place: int | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return (tensor if self.place is None else tensor[self.place])[: self.length]

    @property
    def half_width(self) -> float:
        """Mean distance of the entropy's bounds from their middle, in nats."""
        low_P, high_P = self["entropy"].unbind(-1)
        return float((high_P - low_P).mean()) / 2


def entropy_bounds(
    logp_Pk: npt.NDArray[np.floating[Any]], vocabulary: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Least and greatest entropy ``[P]``, in nats, of a distribution over ``vocabulary`` tokens
    whose k likeliest have these log-probabilities.

    The rest of the mass is greatest in entropy when it is spread over all other tokens, and least
    when it is on as few as may be: none of them is likelier than the k-th.
    """
    logp = logp_Pk.astype(np.float64)
    p_Pk = np.exp(logp)
    known_P = -(p_Pk * np.where(p_Pk > 0, logp, 0)).sum(1)
    others = vocabulary - (p_Pk > 0).sum(1)
    tail_P = np.where(others > 0, np.clip(1 - p_Pk.sum(1), 0, None), 0)
    most_P = np.minimum(np.where(p_Pk > 0, p_Pk, np.inf).min(1), 1.0)
    whole_P = np.floor(tail_P / most_P)
    rest_P = np.clip(tail_P - whole_P * most_P, 0, None)
    low_P = known_P - whole_P * most_P * np.log(most_P) - _xlogx(rest_P)
    high_P = known_P - _xlogx(tail_P) + tail_P * np.log(np.maximum(others, 1))
    return low_P, np.maximum(low_P, high_P)


def _xlogx(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x * np.log(np.where(x > 0, x, 1.0))


def _kept(found: Likeliest, vocabulary: int) -> dict[str, Tensor]:
    """The tensors of one text, as the cache has them."""
    bounds_P2 = np.stack(entropy_bounds(found.logp_Pk, vocabulary), axis=1)
    return {
        "ids": torch.from_numpy(found.ids_Pk),
        "share": torch.from_numpy(np.exp(found.logp_Pk)),
        "entropy": torch.from_numpy(bounds_P2.astype(np.float32)),
        "label_logp": torch.from_numpy(found.label_logp_P),
    }


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of an answer, whose file begins with the digest of the rest."""
    try:
        found = path.read_bytes()
        if hashlib.sha256(found[32:]).digest() != found[:32]:
            raise OSError("it has changed since it was written")
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error}); delete it and run the same command again."
        ) from None
    tensors: dict[str, Tensor] = load(found[32:])
    return tensors


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def _length(labels_L: Tensor) -> int:
    """Tokens of a row up to its last label's, which is the token after that label's position."""
    places = (labels_L != IGNORED).nonzero()
    return int(places[-1]) + 2 if len(places) else 0


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()[:16]


def _tokenizer_folder(source: TokenizerSource, *, folder: Path) -> Path:
    """Folder that transformers loads the tokenizer from. Raises `ModelError`."""
    if isinstance(source, HubModel):
        return hub_tokenizer(source.id, source.revision)
    path = tokenizer_path(source, folder=folder)
    assert path is not None
    if path.is_dir():
        return path

    def convert(out: Path) -> dict[str, Any]:
        say(f"  {path.name}: reading its tokenizer, once, into the cache")
        gguf_tokenizer(path).save_pretrained(out)
        return {}

    return cached(fingerprint({"tokenizer of": gguf_key(path)}), convert)
