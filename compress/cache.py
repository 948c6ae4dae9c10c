"""The re-fusable teacher cache: each teacher runs once over a text, and its hidden states serve every later run.

Another weighting, divergence, temperature, subset of teachers or student needs no teacher body. Exact up to the bf16 it
is kept in: 2 d_k bytes a token and layer, plus the head once a teacher. Keyed by token ids and teacher digest, never by
position or step, so shuffling and accumulation cannot misalign it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.fusion import Head, TeacherStates
from compress.teachers import TeacherFolder, Teachers
from limbeck import sources
from limbeck.artifact import find_artifact, open_artifact, write_artifact
from limbeck.progress import say, task
from limbeck.recipe import fingerprint

_VERSION = 1
_SHARD_ROWS = 64
_BATCH_ROWS = 4


class CachedTeachers:
    """Stands where `Teachers` stands, and answers from disk. Call `prepare` with every row that will be asked for."""

    def __init__(self, folders: Sequence[TeacherFolder], *, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.names = [f.name for f in folders]
        self.temperatures = [1.0] * len(folders)
        self._folders, self._device, self._dtype = list(folders), device, compute_dtype
        self._bodies: Teachers | None = None
        self._rows: list[dict[bytes, tuple[Tensor, int]]] = [{} for _ in folders]
        self._layers: list[list[int]] = [[] for _ in folders]
        self.heads, self.widths, self.depths = [], [], []
        for k in range(len(folders)):
            head, depth = self._head(k)
            self.heads.append(head)
            self.widths.append(int(head.weight_Vd.shape[1]))
            self.depths.append(depth)

    def __len__(self) -> int:
        return len(self.names)

    def prepare(self, rows: Sequence[Tensor], layers: Sequence[Sequence[int]] | None) -> None:
        """Read, or make and keep, the states of all ``rows`` ([L] token ids) and ``layers``; then let the bodies go."""
        unique = list({_row_key(row): row for row in rows}.items())
        shards = [unique[i : i + _SHARD_ROWS] for i in range(0, len(unique), _SHARD_ROWS)]
        bytes_, tokens = 0, sum(len(row) for _, row in unique)
        for k, name in enumerate(self.names):
            # The last state is layer L; it comes first so that `states` finds it without a search.
            self._layers[k] = [self.depths[k], *(sorted(set(layers[k]) - {self.depths[k]}) if layers else [])]
            with task(f"teacher states: {name}", len(unique)) as progress:
                for shard in shards:
                    path = self._shard(k, shard)
                    states_NRLd = load_file(path / "states.safetensors")["states"]
                    for place, (key, _) in enumerate(shard):
                        self._rows[k][key] = states_NRLd, place
                    bytes_ += (path / "states.safetensors").stat().st_size
                    progress.advance(len(shard))
        self._bodies = None
        if tokens:
            say(
                f"  teacher states: {bytes_ / 1e6:.0f} MB on disk, {bytes_ / tokens:.0f} bytes a token for {len(self)} teachers"
            )

    def states(
        self, input_ids_RL: Tensor, layers: Sequence[Sequence[int]] | None = None, *, only: int | None = None
    ) -> tuple[list[TeacherStates], list[list[Tensor]]]:
        """As `Teachers.states`. Asking for a row that was not prepared is a defect (KeyError)."""
        keys = [_row_key(row) for row in input_ids_RL.cpu()]
        last, inner = [], []
        for k in range(len(self)) if only is None else [only]:
            found = [self._rows[k][key] for key in keys]
            by_layer = {
                layer: torch.stack([states[n, place] for states, place in found]).to(self._device, self._dtype)
                for n, layer in enumerate(self._layers[k])
                if n == 0 or (layers and layer in layers[k])
            }
            last.append(TeacherStates(by_layer[self.depths[k]], self.heads[k], self.temperatures[k]))
            inner.append([by_layer[layer] for layer in layers[k]] if layers else [])
        return last, inner

    def _head(self, k: int) -> tuple[Head, int]:
        """The head of teacher ``k`` and its number of layers, from the cache."""
        folder = self._folders[k]
        key = fingerprint({"version": _VERSION, "head of": _identity(folder)})
        path = sources.cache_folder() / "teachers" / f"head-{key[:16]}"
        if find_artifact(path, kind="teacher-head", key=key) is None:
            body = self._load().bodies[k]
            head = body.head
            with write_artifact(path, kind="teacher-head", key=key, parents={"teacher": folder.digest}) as draft:
                tensors = {"weight": head.weight_Vd.contiguous()} | (
                    {"bias": head.bias_V} if head.bias_V is not None else {}
                )
                save_file(tensors, draft.folder / "head.safetensors")
                draft.result = {"scale": head.scale, "softcap": head.softcap, "layers": body.layers}
        tensors = load_file(path / "head.safetensors")
        result = open_artifact(path, verify=False).result
        weight, bias = tensors["weight"].to(self._device, self._dtype), tensors.get("bias")
        return Head(
            weight, bias.to(self._device, self._dtype) if bias is not None else None, result["scale"], result["softcap"]
        ), result["layers"]

    def _shard(self, k: int, shard: Sequence[tuple[bytes, Tensor]]) -> Path:
        """Folder with ``states`` [N, R, L, d] bf16 of the shard's rows at the layers of teacher ``k``; made when missing."""
        rows = [key.hex() for key, _ in shard]
        key = fingerprint(
            {"version": _VERSION, "teacher": _identity(self._folders[k]), "layers": self._layers[k], "rows": rows}
        )
        path = sources.cache_folder() / "teachers" / f"states-{key[:16]}"
        if find_artifact(path, kind="teacher-states", key=key) is None:
            ids_RL = torch.stack([row for _, row in shard]).to(self._device)
            parts = []
            for first in range(0, len(ids_RL), _BATCH_ROWS):
                _, inner = self._load().states(
                    ids_RL[first : first + _BATCH_ROWS],
                    [self._layers[j] if j == k else [] for j in range(len(self))],
                    only=k,
                )
                parts.append(torch.stack([state.to(torch.bfloat16).cpu() for state in inner[0]]))
            with write_artifact(
                path, kind="teacher-states", key=key, parents={"teacher": self._folders[k].digest}
            ) as draft:
                save_file({"states": torch.cat(parts, dim=1).contiguous()}, draft.folder / "states.safetensors")
                draft.result = {"rows": len(rows), "layers": self._layers[k]}
        return path

    def _load(self) -> Teachers:
        if self._bodies is None:
            self._bodies = Teachers(self._folders, device=self._device, compute_dtype=self._dtype)
        return self._bodies


def _identity(folder: TeacherFolder) -> dict[str, str]:
    """What decides a teacher's states beside the tokens: its content and the form of its weights in memory."""
    return {"digest": folder.digest, "quantize": folder.quantize, "dtype": folder.dtype}


def _row_key(row_L: Tensor) -> bytes:
    return hashlib.sha256(row_L.to(torch.int64).numpy().tobytes()).digest()[:16]
