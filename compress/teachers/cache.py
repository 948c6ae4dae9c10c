"""The teacher cache: each teacher runs once over a text, and later runs reuse its outputs.

A run with other weights, another divergence, fewer teachers or another student needs no teacher
body. `hidden` is exact up to bf16: 2 d_k bytes per token and layer, plus the head once per teacher.
`topk` keeps k tokens per position with the exact entropy and label log-likelihood. Keys are token
ids and teacher digest, never position or step, so shuffling and accumulation cannot misalign them.
Shards let an interrupted build continue; their hashes are checked on reading. `store` says where
they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.aligned import ANY_ROWS, AlignedReading, AlignedStates, Spans
from compress.data.training_text import Row
from compress.head import Head, chunks_of_labels
from compress.states import AnyStates, Reading, SparseStates, TeacherStates
from compress.teachers.live import TeacherFolder, Teachers
from compress.teachers.pairs import Pairs
from compress.teachers.store import Entry, Make, open_store
from limbeck.contract.artifact import open_artifact
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import HiddenCache, TopkCache, fingerprint

Shard = Sequence[tuple[bytes, Row]]  # rows with their keys
_Kept = Sequence[tuple[dict[str, Tensor], int]]  # a shard's tensors and a place in them, by row

_VERSION = 2
_SHARD_ROWS = 64
_BATCH_ROWS = 4


class CachedTeachers:
    """`Teachers` that answer from disk. Call `prepare` first, with every row that will be asked."""

    def __init__(
        self,
        folders: Sequence[TeacherFolder],
        *,
        cache: HiddenCache | TopkCache,
        device: torch.device,
        compute_dtype: torch.dtype,
        pairs: Pairs | None = None,
    ) -> None:
        """``pairs`` say which teachers have another tokenizer than the student."""
        self._pairs = pairs or Pairs((None,) * len(folders), ((),) * len(folders))
        self.names = [f.name for f in folders]
        self.temperatures = [1.0] * len(folders)
        self._cache, self._folders, self._device, self._dtype = (
            cache,
            list(folders),
            device,
            compute_dtype,
        )
        self.store = open_store(cache.store)
        self._bodies: Teachers | None = None
        self._rows: list[dict[bytes, tuple[dict[str, Tensor], int]]] = [{} for _ in folders]
        self._layers: list[list[int]] = [[] for _ in folders]
        self.heads, self.widths, self.depths = [], [], []
        for k in range(len(folders)):
            head, depth = self._head(k)
            self.heads.append(head)
            self.widths.append(int(head.weight_Vd.shape[1]))
            self.depths.append(depth)
        self._targets = [
            pair.target(len(head.weight_Vd), device) if pair is not None else None
            for pair, head in zip(self._pairs.pairs, self.heads, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def shards(self, rows: Sequence[Row], layers: Sequence[Sequence[int]] | None) -> list[Shard]:
        """Shards of all ``rows``, each row once, with the ``layers`` of each teacher."""
        for k, depth in enumerate(self.depths):
            # The last state is layer L; it comes first so that `states` finds it without a search.
            self._layers[k] = [depth, *(sorted(set(layers[k]) - {depth}) if layers else [])]
        unique = list({_row_key(ids): (ids, labels) for ids, labels in rows}.items())
        return [unique[i : i + _SHARD_ROWS] for i in range(0, len(unique), _SHARD_ROWS)]

    def prepare(self, rows: Sequence[Row], layers: Sequence[Sequence[int]] | None) -> None:
        """Read or make the outputs of every teacher for all ``rows``; then drop the bodies."""
        shards = self.shards(rows, layers)
        size, tokens = 0, sum(len(ids) for shard in shards for _, (ids, _) in shard)
        for k, name in enumerate(self.names):
            with task(f"teacher cache: {name}", sum(map(len, shards))) as progress:
                for shard in shards:
                    path = self.make(k, shard) / "rows.safetensors"
                    tensors = load_file(path)
                    for place, (key, _) in enumerate(shard):
                        self._rows[k][key] = tensors, place
                    size += path.stat().st_size
                    progress.advance(len(shard))
        self._bodies = None
        if tokens:
            say(
                f"  teacher cache: {size / 1e6:.0f} MB, {size / tokens:.0f} bytes a token for "
                f"{len(self)} teachers"
            )

    def states(
        self,
        input_ids_RL: Tensor,
        layers: Sequence[Sequence[int]] | None = None,
        *,
        only: int | None = None,
        labels_RL: Tensor | None = None,
    ) -> tuple[list[AnyStates], list[list[Tensor]]]:
        """As `Teachers.states`. Asking for a row that was not prepared is a defect (KeyError)."""
        keys = [_row_key(row) for row in input_ids_RL.cpu()]
        last: list[AnyStates] = []
        inner: list[list[Tensor]] = []
        for k in range(len(self)) if only is None else [only]:
            rows = [self._rows[k][key] for key in keys]
            wanted = layers[k] if layers else []
            if isinstance(self._cache, TopkCache):
                last.append(self._few_tokens(k, rows))
                inner.append([])
            elif self._pairs[k] is not None:
                ids_RL = input_ids_RL.to(self._device)
                state, features = self._aligned(k, rows, wanted, ids_RL, labels_RL)
                last.append(state)
                inner.append(features)
            else:
                depth = self.depths[k]
                by_layer = {
                    layer: self._stacked(rows, f"layer{layer}").to(self._dtype)
                    for layer in dict.fromkeys([depth, *wanted])
                }
                last.append(TeacherStates(by_layer[depth], self.heads[k], self.temperatures[k]))
                inner.append([by_layer[layer] for layer in wanted])
        return last, inner

    def _stacked(self, rows: _Kept, name: str) -> Tensor:
        return torch.stack([tensors[name][place] for tensors, place in rows]).to(self._device)

    def _few_tokens(self, k: int, rows: _Kept) -> SparseStates:
        """States of teacher ``k`` from the few tokens that a `topk` cache keeps."""
        ids, share, entropy, logp = (
            self._stacked(rows, name) for name in ("ids", "share", "entropy", "label_logp")
        )
        kept = SparseStates(ids, share, entropy, logp, len(self.heads[k].weight_Vd))
        if (pair := self._pairs[k]) is None:
            return kept
        return replace(
            kept,
            vocabulary=ANY_ROWS,
            spans=Spans(*(self._stacked(rows, name) for name in ("target", "start", "ends"))),
            lost_RL=self._stacked(rows, "lost"),
            renames=pair.renames,
        )

    def _aligned(
        self,
        k: int,
        rows: _Kept,
        layers: Sequence[int],
        input_ids_RL: Tensor,
        labels_RL: Tensor | None,
    ) -> tuple[AlignedStates, list[Tensor]]:
        """States of teacher ``k``, which has another tokenizer, and its ``layers``."""
        pair, target_V, depth = self._pairs[k], self._targets[k], self.depths[k]
        assert pair is not None
        assert target_V is not None
        a = pair.align(input_ids_RL, labels_RL)
        width = a.ids_RM.shape[1]
        by_layer = {
            layer: torch.stack(
                [_cut(tensors[f"layer{layer}"][place], width) for tensors, place in rows]
            ).to(self._device, self._dtype)
            for layer in dict.fromkeys([depth, *layers])
        }
        head, temperature = self.heads[k], self.temperatures[k]
        state = AlignedStates(by_layer[depth], head, a, target_V, temperature, pair.renames)
        return state, [a.gathered(by_layer[layer]) for layer in layers]

    def _head(self, k: int) -> tuple[Head, int]:
        """The head of teacher ``k`` and its number of layers, from the cache."""
        folder = self._folders[k]
        key = fingerprint({"version": _VERSION, "head of": _identity(folder)})

        def make(out: Path) -> dict[str, Any]:
            body = self._load().bodies[k]
            head = body.head
            tensors = {"weight": head.weight_Vd.contiguous()}
            if head.bias_V is not None:
                tensors["bias"] = head.bias_V
            save_file(tensors, out / "head.safetensors")
            return {"scale": head.scale, "softcap": head.softcap, "layers": body.layers}

        entry = Entry("teacher-head", key, folder.digest, "head.safetensors")
        path = self.store.obtain(entry, make)
        tensors = {
            n: t.to(self._device, self._dtype)
            for n, t in load_file(path / "head.safetensors").items()
        }
        result = open_artifact(path, verify=False).result
        return Head(
            tensors["weight"], tensors.get("bias"), result["scale"], result["softcap"]
        ), result["layers"]

    def has(self, k: int, shard: Shard) -> bool:
        """Whether the store holds teacher ``k``'s answers to the shard's rows."""
        return self.store.has(self._entry(k, shard))

    def make(self, k: int, shard: Shard) -> Path:
        """Folder with teacher ``k``'s answers to the shard's rows; made when missing."""
        return self.store.obtain(self._entry(k, shard), self._maker(k, shard))

    def fill(self, k: int, shard: Shard) -> str:
        """Make teacher ``k``'s answers to the shard's rows where they are missing; their digest."""
        return self.store.fill(self._entry(k, shard), self._maker(k, shard))

    def _entry(self, k: int, shard: Shard) -> Entry:
        kept: dict[str, Any] = {
            "cache": self._cache.model_dump(exclude={"store"}),
            "rows": [key.hex() for key, _ in shard],
        }
        if isinstance(self._cache, TopkCache):
            kept |= {"labels": [_row_key(labels).hex() for _, (_, labels) in shard]}
        else:
            kept |= {"layers": self._layers[k]}
        if (pair := self._pairs.digest(k)) is not None:  # text after the last label is left out
            kept |= {"pair": pair, "labels": [_row_key(labels).hex() for _, (_, labels) in shard]}
        key = fingerprint({"version": _VERSION, "teacher": _identity(self._folders[k]), **kept})
        return Entry("teacher-rows", key, self._folders[k].digest, "rows.safetensors")

    def _maker(self, k: int, shard: Shard) -> Make:
        def make(out: Path) -> dict[str, Any]:
            made: list[dict[str, Tensor]] = []
            for first in range(0, len(shard), _BATCH_ROWS):
                ids, labels = (
                    torch.stack(rows)
                    for rows in zip(
                        *(row for _, row in shard[first : first + _BATCH_ROWS]), strict=True
                    )
                )
                made.append(self._run(k, ids.to(self._device), labels.to(self._device)))
            save_file({n: _joined([m[n] for m in made]) for n in made[0]}, out / "rows.safetensors")
            return {name: list(tensor.shape) for name, tensor in made[0].items()}

        return make

    def _run(self, k: int, ids_RL: Tensor, labels_RL: Tensor) -> dict[str, Tensor]:
        layers = [self._layers[k] if j == k else [] for j in range(len(self))]
        pair, target_V = self._pairs[k], self._targets[k]
        a = pair.align(ids_RL, labels_RL) if pair is not None else None
        own_ids = a.ids_RM if a is not None else ids_RL  # the cache's bodies know no other tokens
        states, inner = self._load().states(own_ids, layers, only=k)
        if not isinstance(self._cache, TopkCache):
            return {
                f"layer{layer}": s.to(torch.bfloat16).cpu()
                for layer, s in zip(layers[k], inner[0], strict=True)
            }
        assert isinstance(states[0], TeacherStates)
        hidden, head, spans = states[0].hidden_RLd, self.heads[k], {}
        state: TeacherStates | AlignedStates = TeacherStates(hidden, head)
        vocabulary = state.vocabulary
        if pair is not None and a is not None and target_V is not None:
            state, vocabulary = AlignedStates(hidden, head, a, target_V), len(pair.aligner.own)
            found = a.spans
            spans = {"target": found.target_RL, "start": found.start_RL, "ends": found.ends_RL}
        return self._sparse(state, ids_RL, labels_RL, vocabulary) | {
            name: values.cpu() for name, values in spans.items()
        }

    def _sparse(
        self, state: TeacherStates | AlignedStates, ids_RL: Tensor, labels_RL: Tensor, rows: int
    ) -> dict[str, Tensor]:
        """A few tokens of each distribution over ``rows`` tokens, and its statistics."""
        assert isinstance(self._cache, TopkCache)
        R, L = ids_RL.shape
        k_ = min(self._cache.k, rows)
        kept = {
            "ids": torch.zeros(R, L, k_, dtype=torch.int32),
            "share": torch.zeros(R, L, k_),
            "entropy": torch.zeros(R, L),
            "label_logp": torch.zeros(R, L),
        }
        if isinstance(state, AlignedStates):
            kept["lost"] = torch.zeros(R, L)
        generator = torch.Generator().manual_seed(int(ids_RL.sum()))
        for place in chunks_of_labels(labels_RL, 256, whole_rows=False):
            reading: Reading = state.read(place, rows)
            p_CV, entropy_C, logp_C = reading.distribution(slice(None), labels_RL[place])
            if self._cache.sampling == "top":
                share_Ck, ids_Ck = p_CV.topk(k_, dim=-1)
            else:
                # k draws with replacement, each of weight 1 / k: unbiased (arXiv 2503.16870).
                p_CV, mass_C1 = p_CV.cpu(), None
                if isinstance(state, AlignedStates):
                    mass_C1 = p_CV.sum(-1, keepdim=True)
                    p_CV = torch.where(mass_C1 > 0, p_CV, 1.0)  # multinomial refuses zeros
                ids_Ck = torch.multinomial(p_CV, k_, replacement=True, generator=generator)
                share_Ck = torch.full(ids_Ck.shape, 1 / k_)
                if mass_C1 is not None:
                    share_Ck *= mass_C1
            at = place[0].cpu(), place[1].cpu()
            kept["ids"][at], kept["share"][at] = ids_Ck.int().cpu(), share_Ck.cpu()
            if isinstance(reading, AlignedReading):
                kept["lost"][at] = reading.lost().cpu()
            kept["entropy"][at], kept["label_logp"][at] = entropy_C.cpu(), logp_C.cpu()
        return kept

    def _load(self) -> Teachers:
        if self._bodies is None:
            self._bodies = Teachers(self._folders, device=self._device, compute_dtype=self._dtype)
        return self._bodies


def _cut(states_Md: Tensor, width: int) -> Tensor:
    """The first ``width`` positions; positions that are missing hold 0."""
    short = width - len(states_Md)
    return torch.nn.functional.pad(states_Md[:width], (0, 0, 0, max(0, short)))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches of one shard in one tensor; rows of another tokenizer differ in length."""
    width = max(part.shape[1] for part in parts)
    if any(part.shape[1] != width for part in parts):
        parts = [torch.stack([_cut(row, width) for row in part]) for part in parts]
    return torch.cat(list(parts)).contiguous()


def _identity(folder: TeacherFolder) -> dict[str, str]:
    """Inputs of a teacher's states besides tokens: its content, and its weights' form in memory."""
    return {"digest": folder.digest, "quantize": folder.quantize, "dtype": folder.dtype}


def _row_key(row_L: Tensor) -> bytes:
    return hashlib.sha256(row_L.to(torch.int64).numpy().tobytes()).digest()[:16]
