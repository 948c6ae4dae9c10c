"""A decoder graph and its key-value cache under onnxruntime; generate, parity and bench share it.

Knows numpy and onnxruntime; knows nothing of torch, transformers, onnx or text.
Shape letters: B rows, S new tokens, L whole length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.data.arrays import Ids, Logits, token_rows
from limbeck.contract.errors import ArtifactError, DataError, EnvironmentalError
from limbeck.contract.machine import available_cores, sums_overflow
from limbeck.contract.recipe import NO_KERNEL, Provider
from limbeck.runtime.sampling import GREEDY, Constraint, Sampler, Sampling
from limbeck.runtime.session import PROVIDERS, import_onnxruntime, open_session, read_adapter

# Tokens of a prompt that are read at least, however much of it a cache holds. A cold run reads
# several at once, and a run of one token adds in another order: docs/experiments/serving.md.
FEWEST_READ = 2
# Tokens of a prompt from which on a graph with fp32 products reads it faster, on an x86 without
# VNNI: docs/experiments/decoder.md.
_LONG_PROMPT = 32


def _identity(path: Path) -> tuple[int, int]:
    """Which file this is; another one may take its name."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


class GraphDecoder:
    """A decoder graph file, its key-value cache, and the tokens that the cache holds.

    The cache of a fused graph is one buffer a layer, read and written in place. It is kept between
    prompts and grows when a longer one comes. Other graphs (metadata ``limbeck.cache: grows``)
    return a longer cache at every step. Those of fixed shape (``shifts``) read one token a run and
    forget the cache's oldest column: a prompt of S tokens takes S runs.
    Padding on either side is right, ragged batches included, because the graph itself places each
    row's tokens (see `export.build.genai` and `export.build.dynamo`).

    A second graph may read long prompts (``prompts``). It has the same weights and other products,
    so that its keys and values differ in their rounding. What one graph has read is never taken
    for what the other one would read: an answer does not depend on what the cache held before.
    """

    def __init__(
        self,
        graph: Path,
        *,
        threads: int | None = None,
        provider: Provider = "cpu",
        adapter: Path | None = None,
        prompts: Path | None = None,
    ) -> None:
        """Open a graph file by itself, as callers do that still make the artifact.

        ``threads`` defaults to every core this process may use; ``adapter`` fills the inputs of a
        graph exported with `adapters: separate`; ``prompts`` is the graph that reads long prompts,
        opened at the first one. Raises as `open_session` and `read_adapter` do.
        """
        # The mask grows at every step, so a memory plan would never be used twice.
        self.session = open_session(graph, threads=threads, provider=provider, memory_pattern=False)
        self._ort = import_onnxruntime()
        self.threads = threads or available_cores()
        self.prompts, self._prompts_are = prompts, prompts and _identity(prompts)
        self.provider = PROVIDERS[provider]
        self.cache_device = "cpu" if provider == "cpu" else "cuda"
        inputs = {value.name: value for value in self.session.get_inputs()}
        # Heads and their size by cache input, and the type of the cache's numbers.
        self.past: dict[str, tuple[int, int]] = {
            n: (v.shape[1], v.shape[3])
            for n, v in inputs.items()
            if n.startswith("past_key_values.")
        }
        half = any(inputs[name].type == "tensor(float16)" for name in self.past)
        self.cache_type: type[np.floating[Any]] = np.float16 if half else np.float32
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.all_logits = self.metadata.get("limbeck.logits") == "all"
        self.vocabulary = int(self.session.get_outputs()[0].shape[-1])
        self.context = int(self.metadata.get("limbeck.context", "0")) or None
        self.grows = self.metadata.get("limbeck.cache") in ("grows", "shifts")
        rows, columns = inputs["attention_mask"].shape
        self.fixed: tuple[int, int] | None = (rows, columns) if isinstance(columns, int) else None
        if self.fixed:
            self.context = min(columns, self.context or columns)
        self._adapter: dict[str, Any] = {}  # graph inputs that are empty unless an adapter is given
        if adapter is not None:
            self._adapter = read_adapter(
                adapter,
                base=self.metadata.get("limbeck.base"),
                inputs=[value.name for value in self.session.get_overridable_initializers()],
            )
        # Key and value buffers; of a graph that returns its cache, what the last run returned.
        self._cache: list[Any] = []
        self._bindings: dict[bool, Any] = {}  # by whether it is the graph for prompts
        self._rows = self._capacity = 0
        self._mask: Ids = np.zeros((0, 0), np.int64)
        self._length = 0
        self._held: list[int] | None = None  # tokens in the cache, of one row without padding
        self._long = 0  # how many of them the graph for prompts has read
        self.reused = 0  # tokens of the last prompt that the cache already held

    def prefill(
        self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None, *, room: int = 0
    ) -> Logits:
        """Start anew with ``ids[B, S]`` and leave room for ``room`` more tokens a row.

        ``mask[B, S]`` is 1 for tokens and 0 for padding on either side. Returns the logits
        ``[B, V]`` that follow each row's last token, or ``[B, S, V]`` from an all-logits graph.
        Raises `DataError` past the model's context.
        """
        tokens = token_rows(ids)
        valid = np.ones_like(tokens) if mask is None else np.ascontiguousarray(mask, np.int64)
        if valid.shape != tokens.shape or not valid.any(axis=1).all():
            raise DataError(
                f"found a mask of shape {valid.shape}; "
                f"expected {tokens.shape} with at least one token in every row."
            )
        self._reserve(tokens.shape[0], tokens.shape[1] + room)
        self._mask[:, : tokens.shape[1]] = valid
        self._length = tokens.shape[1]
        self.reused, self._held = 0, None
        is_long = self.is_long(tokens.shape[1])
        self._long = tokens.shape[1] if is_long else 0
        if self.grows:
            columns = self.fixed[1] - 1 if self.fixed else 0
            self._cache = [
                self._share(self._empty(heads, columns, size)) for heads, size in self.past.values()
            ]
        logits = self._run(tokens, is_long)
        self._held = tokens[0].tolist() if len(tokens) == 1 and valid.all() else None
        return logits

    def resume(self, ids: Sequence[int], *, room: int = 0) -> Logits:
        """As `prefill` for one prompt, without reading again what the cache holds of its beginning.

        A conversation's next turn begins with everything before it, so only the new tokens are
        read; with a graph for prompts, the last answer as well. Afterwards ``reused`` is the number
        of tokens taken over.
        """
        is_long, held = self.is_long(len(ids)), self._held or []
        if is_long != bool(self._long):
            held = []
        elif is_long:
            held = held[: self._long]
        shared = min(common_prefix(held, ids), len(ids) - FEWEST_READ)
        grown = len(ids) + room > self._capacity
        if shared < 1 or self.fixed or (grown and self.cache_device != "cpu"):
            return self.prefill([list(ids)], room=room)
        before = self._cache
        self._reserve(1, len(ids) + room)
        if self.grows:
            kept = (np.ascontiguousarray(cache.numpy()[:, :, :shared]) for cache in before)
            self._cache = [self._share(array) for array in kept]
        elif self._cache is not before:
            for new, old in zip(self._cache, before, strict=True):
                new.numpy()[:, :, :shared] = old.numpy()[:, :, :shared]
        self._mask[:, :shared] = 1
        self._length = self.reused = shared
        self._held = list(ids[:shared])
        self._long = len(ids) if is_long else 0
        return self._extend(np.array([ids[shared:]], np.int64), None, is_long)

    def extend(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Append ``ids[B, S]`` to the cache; returns as `prefill`. S > 1 needs a single row.

        Raises `DataError` when ``room`` is spent. A fused graph also refuses several tokens for
        several rows, which its kernel cannot take, and padding in ``mask``: its kernel would add no
        column for it and write over the row's last token.
        """
        return self._extend(np.ascontiguousarray(ids, np.int64), mask, False)

    def _extend(self, tokens: Ids, mask: npt.ArrayLike | None, is_long: bool) -> Logits:
        valid = np.ones_like(tokens) if mask is None else np.ascontiguousarray(mask, np.int64)
        if not self.grows and not valid.all():
            raise DataError(
                "padding can be appended to no row of this graph; "
                "give every row a token, or begin anew with the rows that go on."
            )
        if not self.grows and tokens.shape[1] > 1 and len(tokens) > 1:
            raise DataError(
                "several tokens can be appended to one row only; append them one at a time."
            )
        if self._length + tokens.shape[1] > self._capacity:
            raise DataError(
                f"the cache holds {self._capacity} tokens and is full; give prefill more room."
            )
        self._mask[:, self._length : self._length + tokens.shape[1]] = valid
        self._length += tokens.shape[1]
        held, self._held = self._held, None
        logits = self._run(tokens, is_long)
        if held is not None and valid.all():
            held.extend(tokens[0].tolist())
            self._held = held
        return logits

    def step(self, ids: npt.ArrayLike) -> Logits:
        """Append one token a row, ``ids[B]``; returns the logits ``[B, V]`` after it.

        Raises `DataError` when the cache is full.
        """
        logits = self.extend(np.asarray(ids, np.int64).reshape(-1, 1))
        return logits[:, 0] if self.all_logits else logits

    def score(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Logits ``[B, L, V]`` after every token of ``ids[B, L]``; rows of padding are unspecified.

        Needs a decoder opened with ``all_logits=True``.
        """
        if not self.all_logits:
            raise DataError(
                "this graph keeps the last logits only; "
                "open the decoder with all_logits=True to score."
            )
        rows = self.fixed[0] if self.fixed else None
        if rows is None or len(tokens := np.asarray(ids)) <= rows:
            return self.prefill(ids, mask)
        valid = np.ones_like(tokens) if mask is None else np.asarray(mask)
        parts = range(0, len(tokens), rows)
        scored: Logits = np.concatenate(
            [self.prefill(tokens[at : at + rows], valid[at : at + rows]) for at in parts]
        )
        return scored

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        seed: int = 0,
        resume: bool = False,
        constraint: Constraint | None = None,
    ) -> Iterator[int]:
        """Yield up to ``max_new_tokens`` token ids after the prompt ``ids``.

        A stop id ends it and is not yielded; so does the end that a ``constraint`` accepts.
        ``resume`` takes over what the cache holds of the prompt's beginning, see `resume`.
        """
        sampler = Sampler(sampling, prompt=ids, stop_ids=stop_ids, seed=seed, constraint=constraint)
        if resume:
            logits = self.resume(ids, room=max_new_tokens)
        else:
            logits = self.prefill([list(ids)], room=max_new_tokens)
        row = logits[0, -1] if self.all_logits else logits[0]
        for count in range(1, max_new_tokens + 1):
            token = sampler.next(row)
            if token in stop_ids or sampler.ended:
                return
            yield token
            if count < max_new_tokens:
                row = self.step([token])[0]

    def _reserve(self, rows: int, capacity: int) -> None:
        """Make the cache hold ``capacity`` tokens for ``rows`` rows, or keep one that does."""
        if self.context and capacity > self.context:
            raise DataError(
                f"found {capacity} tokens of prompt and answer; "
                f"this model's context is {self.context}. Shorten either."
            )
        if self.fixed and rows > self.fixed[0]:
            raise DataError(
                f"found {rows} rows; this graph was made for {self.fixed[0]} "
                "(export.shapes.batch). Give it fewer at a time."
            )
        if rows == self._rows and capacity <= self._capacity:
            return
        self._rows, self._capacity = rows, capacity
        self._mask = np.ones((rows, capacity), np.int64)
        self._bindings = {}
        if not self.grows:
            self._cache = [
                self._share(self._empty(heads, capacity, size))
                for heads, size in self.past.values()
            ]

    def is_long(self, tokens: int) -> bool:
        """Whether the graph for prompts reads a prompt of so many tokens, in parts or whole."""
        return self.prompts is not None and tokens >= _LONG_PROMPT

    @cached_property
    def prompt_session(self) -> Any:
        """The session of the graph for prompts, opened at the first use.

        Raises `ArtifactError` if another export has taken the folder's place meanwhile: its graph
        would fill the cache with the keys of other weights.
        """
        assert self.prompts is not None
        session = open_session(
            self.prompts, threads=self.threads, memory_pattern=False, dequantizes=True
        )
        if _identity(self.prompts) != self._prompts_are:
            raise ArtifactError(
                f"{self.prompts}: was replaced since the graph beside it was opened; start again."
            )
        return session

    def new_binding(self, *, is_long: bool = False) -> Any:
        """An IOBinding of a session with the adapter in place, where there is one."""
        binding = (self.prompt_session if is_long else self.session).io_binding()
        for name, value in self._adapter.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def share(self, array: npt.NDArray[Any]) -> Any:
        """``array`` as an OrtValue on the CPU: the same memory.

        Keep the array as long as the OrtValue is bound.
        """
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _share(self, array: npt.NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.cache_device, 0)

    def _empty(self, heads: int, tokens: int, size: int) -> npt.NDArray[Any]:
        rows = self.fixed[0] if self.fixed else self._rows
        return np.zeros((rows, heads, tokens, size), self.cache_type)

    def _run(self, tokens: Ids, is_long: bool) -> Logits:
        """Feed ``tokens[B, S]``, the last S columns of the mask so far."""
        if self.fixed is None:
            mask = np.ascontiguousarray(self._mask[:, : self._length])
            return self._feed(tokens, mask, is_long)
        rows, columns = self.fixed
        out: Logits = np.zeros(
            (len(tokens), tokens.shape[1] if self.all_logits else 1, self.vocabulary), np.float32
        )
        fill = ((0, rows - len(tokens)), (0, 0))  # with copies of the last row
        for at in range(tokens.shape[1]):
            seen = self._mask[:, : self._length - tokens.shape[1] + at + 1]
            mask = np.zeros((rows, columns), np.int64)
            mask[:, columns - seen.shape[1] :] = np.pad(seen, fill, "edge")
            found = self._feed(np.pad(tokens[:, at : at + 1], fill, "edge"), mask)[: len(tokens)]
            wanted = np.ones(len(tokens), bool) if self.all_logits else seen[:, -1] == 1
            out[wanted, at if self.all_logits else 0] = found.reshape(len(tokens), -1)[wanted]
        return out if self.all_logits else out[:, 0]

    def _feed(self, tokens: Ids, mask: Ids, is_long: bool = False) -> Logits:
        shape = (len(tokens), tokens.shape[1] if self.all_logits else 1, self.vocabulary)
        logits: Logits = np.empty(shape, np.float32)
        # On the CPU these share the arrays' memory: nothing is copied. On a device the cache stays
        # there; only ids, mask and logits travel.
        binding = self._bindings.get(is_long) or self._bind(is_long)
        binding.bind_ortvalue_input("input_ids", self.share(tokens))
        binding.bind_ortvalue_input("attention_mask", self.share(mask))
        binding.bind_ortvalue_output("logits", self.share(logits))
        for name, cache in zip(self.past, self._cache if self.grows else (), strict=False):
            binding.bind_ortvalue_input(name, cache)
            binding.bind_output(name.replace("past_key_values.", "present."), self.cache_device)
        (self.prompt_session if is_long else self.session).run_with_iobinding(binding)
        if self.grows:
            self._cache = binding.get_outputs()[-len(self.past) :]
        return logits if self.all_logits else logits[:, 0]

    def _bind(self, is_long: bool) -> Any:
        """A binding with the buffers of a fused graph, kept until they change."""
        binding = self._bindings[is_long] = self.new_binding(is_long=is_long)
        for name, cache in zip(self.past, () if self.grows else self._cache, strict=False):
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)
        return binding


def common_prefix(one: Sequence[int] | Ids, other: Sequence[int] | Ids) -> int:
    """Number of tokens that both sequences begin with."""
    length = min(len(one), len(other))
    differs = np.asarray(one[:length]) != np.asarray(other[:length])
    return int(differs.argmax()) if differs.any() else length


class Decoder(GraphDecoder):
    """The decoder of one form of an exported folder."""

    def __init__(
        self,
        folder: Path,
        *,
        form: str | None = None,
        all_logits: bool = False,
        threads: int | None = None,
        provider: Provider | None = None,
        adapter: Path | Literal["own", "none"] = "own",
        verify: bool = False,
    ) -> None:
        """Open a form of the ``onnx`` artifact at ``folder``; by default the shipped one.

        ``all_logits`` opens the twin that keeps every position, for `score`. ``provider`` defaults
        to the one the form was made for. ``adapter`` is for a folder exported with `adapters:
        separate`: its own, "none" for the base alone, or the file of another student of the same
        base. ``verify`` checks the hashes of the whole folder first.
        Raises `ArtifactError` for a folder that is no such artifact or lacks the form,
        `EnvironmentalError` for a missing runtime or provider and for a form that the provider has
        no kernels for.
        """
        artifact = open_artifact(Path(folder), kind="onnx", verify=verify)
        result, name = artifact.result, _graph_form(artifact, form)
        made = result["forms"][name]
        self.form: str = name
        self.made_for: Provider = made.get("provider", "cpu")
        provider = provider or self.made_for
        fused = result["backend"]["name"] == "genai"
        if (refused := NO_KERNEL.get((provider, name))) and (name != "fp32" or fused):
            why, instead = refused
            raise EnvironmentalError(
                f"{PROVIDERS[provider]} has no kernel for the products of {name}: {why}. "
                f"Open the form {instead} there (export.forms in the recipe), "
                f"or keep {name} for another provider."
            )
        prompts = None
        if (
            (file := made.get("prompt_graph"))  # exports of an older version have none
            and not all_logits
            and provider == "cpu"
            and sums_overflow()
        ):
            prompts = artifact.file(file)
        if adapter == "own":
            own = result.get("adapter")
            adapter = artifact.file(own["file"]) if own else "none"
        super().__init__(
            artifact.file(made["all_logits_graph" if all_logits else "graph"]),
            threads=threads,
            provider=provider,
            adapter=None if adapter == "none" else Path(adapter),
            prompts=prompts,
        )


def _graph_form(artifact: Artifact, form: str | None) -> str:
    """``form`` or the shipped one. Raises `ArtifactError` unless it is a graph that generates."""
    result, folder = artifact.result, artifact.path
    if result.get("task", "causal-lm") != "causal-lm":
        raise ArtifactError(
            f"{folder}: holds an encoder, which generates nothing; "
            "open it with limbeck.runtime.encoder.Encoder."
        )
    name = form or result["shipped"]
    if name in result.get("ggufs", {}):
        raise ArtifactError(
            f"{folder}: {name} is a GGUF file, {result['ggufs'][name]['file']}; "
            "run it with llama.cpp or Ollama, or name one of the graphs."
        )
    if name not in result["forms"]:
        raise ArtifactError(f"{folder}: no form {name!r}; it has {', '.join(result['forms'])}.")
    return name
