"""A decoder graph and its KV cache under onnxruntime; the one loop that generate, parity and bench share.

Knows numpy, onnxruntime and tokenizers, and imports each when it is first needed; knows nothing of torch, transformers or
onnx. Shape letters: B rows, S new tokens, L whole length, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ArtifactError, DataError, EnvironmentalError
from limbeck.contract.machine import available_cores, sums_overflow
from limbeck.contract.progress import say
from limbeck.contract.recipe import NO_KERNEL, Provider
from limbeck.runtime.chat import render

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]
    Logits = npt.NDArray[np.float32]

PROVIDERS: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


# The runtime package ---------------------------------------------------------------------------------------------


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises `EnvironmentalError` when it is missing or when two builds of it share a folder."""
    builds = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(builds) == 2:
        raise EnvironmentalError(
            "onnxruntime and onnxruntime-gpu are both installed; they write into the same folder, so neither can be trusted. Run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'limbeck[cpu]' or pip install 'limbeck[gpu]'."
        )
    try:
        import onnxruntime
    except ImportError as error:
        if builds:
            raise EnvironmentalError(
                f"{builds[0]} is installed but cannot be imported ({error}); install it again."
            ) from error
        raise EnvironmentalError(
            "onnxruntime is not installed, expected one build of it; run: pip install 'limbeck[cpu]' (or 'limbeck[gpu]' for CUDA)."
        ) from None
    return onnxruntime


def providers() -> list[Provider]:
    """The execution providers that the installed onnxruntime can be asked for, by the recipe's names."""
    available = import_onnxruntime().get_available_providers()
    return [name for name, theirs in PROVIDERS.items() if theirs in available]


def asked_for(provider: Provider) -> list[str]:
    """What a session for ``provider`` is opened with: on a card, what TensorRT does not take stays there."""
    return [
        PROVIDERS[name] for name in (provider, "cuda") if name == provider or provider == "tensorrt"
    ]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# The decoder -----------------------------------------------------------------------------------------------------


def warn_of_overflow(metadata: Mapping[str, str]) -> None:
    """Say so where a graph's weights of 8 bits overflow this processor's sums: its answers are wrong then."""
    if metadata.get("limbeck.integer_weights") == "8 bits" and sums_overflow():
        say(
            f"warning: {metadata.get('limbeck.form', 'this form')} has weights of 8 bits, which overflow on this processor (x86 without "
            "VNNI); its answers may be wrong. `limbeck verify` says how far. Export it with reduce_range: true, or ship int8-weight."
        )


class Decoder:
    """One decoder graph, its KV cache, and where in the sequence it stands.

    The cache of a fused graph is one buffer a layer that it reads and writes in place; it is kept between prompts and
    grows when a longer one comes. Other graphs (metadata ``limbeck.cache: grows``) return a longer cache at every step, and those
    of fixed shape (``shifts``) read one token a run and forget the cache's oldest column: a prompt then takes a run a token.
    Padding on either side is right, ragged batches included, because the graph itself places each row's tokens
    (see `export.build.genai` and `export.build.dynamo`).
    """

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
        """Open a form of the ``onnx`` artifact at ``folder`` (none: the shipped one).

        ``all_logits`` opens the twin that keeps every position, for `score`; ``threads`` defaults to every core
        this process may use; ``provider`` to the one the form was made for.
        ``adapter`` is for a folder exported with `adapters: separate`: its own, none (the base alone), or the file of
        another student of the same base. ``verify`` checks the hashes of the whole folder first. Raises `ArtifactError` for a folder
        that is no such artifact or lacks the form, `EnvironmentalError` for a missing runtime or provider and for a form
        that the provider has no kernels for.
        """
        result = open_artifact(Path(folder), kind="onnx", verify=verify).result
        if "task" in result:
            raise ArtifactError(
                f"{folder}: holds an encoder, which generates nothing; open it with limbeck.encoder.Encoder."
            )
        name = form or result["shipped"]
        if name not in result["forms"]:
            raise ArtifactError(f"{folder}: no form {name!r}; it has {', '.join(result['forms'])}.")
        form_made = result["forms"][name]
        made_for: Provider = form_made.get("provider", "cpu")
        provider = provider or made_for
        fused = result["backend"]["name"] == "genai"
        if (refused := NO_KERNEL.get((provider, name))) and (name != "fp32" or fused):
            why, instead = refused
            raise EnvironmentalError(
                f"{PROVIDERS[provider]} has no kernel for the products of {name}: {why}. "
                f"Open the form {instead} there (export.forms in the recipe), or keep {name} for another provider."
            )
        self.form: str | None = name
        self.made_for: Provider | None = made_for
        self._open(
            Path(folder) / form_made["all_logits_graph" if all_logits else "graph"],
            threads,
            provider,
        )
        own = result.get("adapter")
        if adapter == "own":
            adapter = Path(folder) / own["file"] if own else "none"
        if adapter != "none":
            self._adapt(Path(adapter))

    @classmethod
    def from_graph(
        cls,
        graph: Path,
        *,
        threads: int | None = None,
        provider: Provider = "cpu",
        adapter: Path | None = None,
    ) -> Decoder:
        """Open a graph file by itself, for callers that are still making the artifact."""
        decoder = cls.__new__(cls)
        decoder.form = decoder.made_for = None
        decoder._open(graph, threads, provider)
        if adapter is not None:
            decoder._adapt(adapter)
        return decoder

    def _open(self, graph: Path, threads: int | None, provider: Provider) -> None:
        import numpy as np

        ort = import_onnxruntime()
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise EnvironmentalError(
                f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]} here, only {', '.join(ort.get_available_providers())}; "
                + (
                    "run: pip install 'limbeck[gpu]' on a machine with an NVIDIA card."
                    if provider != "cpu"
                    else "install it again."
                )
            )
        self.threads = threads or available_cores()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = (
            False  # the mask grows at every step, so no plan would be used twice
        )
        options.log_severity_level = 4
        # Threads may spin within a run, where the next operator is microseconds away, but never between runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = ort.InferenceSession(str(graph), options, providers=asked_for(provider))
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ArtifactError(
                f"{graph}: onnxruntime cannot open it ({error}); export the student again."
            ) from error
        if (
            self.session.get_providers()[0] != PROVIDERS[provider]
        ):  # onnxruntime only logs that it takes the CPU
            raise EnvironmentalError(
                f"onnxruntime {ort.__version__} could not start {PROVIDERS[provider]} and took {self.session.get_providers()[0]} "
                "instead; look at `nvidia-smi` and at the CUDA and cuDNN that pip install 'limbeck[gpu]' brings."
            )
        self._np, self._ort = np, ort
        self.provider = PROVIDERS[provider]
        self.cache_device = "cpu" if provider == "cpu" else "cuda"
        inputs = {value.name: value for value in self.session.get_inputs()}
        # Heads and their size by cache input, and the numbers of the cache.
        self.past: dict[str, tuple[int, int]] = {
            n: (v.shape[1], v.shape[3])
            for n, v in inputs.items()
            if n.startswith("past_key_values.")
        }
        half = any(inputs[name].type == "tensor(float16)" for name in self.past)
        self.cache_type: type[np.floating[Any]] = np.float16 if half else np.float32
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        warn_of_overflow(self.metadata)
        self.all_logits = self.metadata.get("limbeck.logits") == "all"
        self.vocabulary = int(self.session.get_outputs()[0].shape[-1])
        self.context = int(self.metadata.get("limbeck.context", "0")) or None
        self.grows = self.metadata.get("limbeck.cache") in ("grows", "shifts")
        rows, columns = inputs["attention_mask"].shape
        self.fixed: tuple[int, int] | None = (rows, columns) if isinstance(columns, int) else None
        if self.fixed:
            self.context = min(columns, self.context or columns)
        self._cache: list[Any] = []  # of a graph that returns its cache: what the last run returned
        self._binding: Any = None
        self._adapter: dict[
            str, Any
        ] = {}  # graph inputs that are empty unless an adapter fills them
        self._rows = self._capacity = 0
        self._mask: Ids = np.zeros((0, 0), np.int64)
        self._length = 0

    def _adapt(self, path: Path) -> None:
        """Fill the adapter inputs of the graph from the file at ``path``."""
        try:
            adapter = self._ort.AdapterFormat.read_adapter(str(path))
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ArtifactError(
                f"{path}: onnxruntime cannot read it as an adapter ({error}); expected an .onnx_adapter file that "
                "`limbeck export` wrote with export.adapters: separate."
            ) from error
        base = self.metadata.get("limbeck.base")
        if base is None:
            raise ArtifactError(
                f"{path}: this graph takes no adapter; export its student with export.adapters: separate."
            )
        values: dict[str, Any] = adapter.get_parameters()
        takes = {value.name for value in self.session.get_overridable_initializers()}
        if str(adapter.get_model_version()) != base or not set(values) <= takes:
            raise ArtifactError(
                f"{path}: made for base {adapter.get_model_version()}, this graph is of base {base}"
                f"{'' if set(values) <= takes else ' and takes other inputs'}; open it with the base of its own student."
            )
        self._adapter = values

    def prefill(
        self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None, *, room: int = 0
    ) -> Logits:
        """Start anew with ``ids[B, S]`` and leave room for ``room`` more tokens a row.

        ``mask[B, S]`` is 1 for tokens and 0 for padding on either side. Returns the logits ``[B, V]`` that follow each
        row's last token, or ``[B, S, V]`` from an all-logits graph. Raises `DataError` past the model's context.
        """
        np = self._np
        tokens = np.ascontiguousarray(ids, np.int64)
        if tokens.ndim != 2 or not tokens.size:
            raise DataError(
                f"found ids of shape {tokens.shape}; expected [rows, tokens] with at least one token."
            )
        valid = np.ones_like(tokens) if mask is None else np.ascontiguousarray(mask, np.int64)
        if valid.shape != tokens.shape or not valid.any(axis=1).all():
            raise DataError(
                f"found a mask of shape {valid.shape}; expected {tokens.shape} with at least one token in every row."
            )
        self._reserve(tokens.shape[0], tokens.shape[1] + room)
        self._mask[:, : tokens.shape[1]] = valid
        self._length = tokens.shape[1]
        columns = self.fixed[1] - 1 if self.fixed else 0
        self._cache = (
            [self._empty(heads, columns, size) for heads, size in self.past.values()]
            if self.grows
            else []
        )
        return self._run(tokens)

    def extend(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Append ``ids[B, S]`` to what is in the cache; returns as `prefill`. More than one token a row needs one row.

        Raises `DataError` when ``room`` is spent, and of a fused graph when several rows get several tokens, which its kernel refuses,
        or when ``mask`` has padding, which it would take for no new column and write over the row's last token.
        """
        np = self._np
        tokens = np.ascontiguousarray(ids, np.int64)
        valid = np.ones_like(tokens) if mask is None else np.ascontiguousarray(mask, np.int64)
        if not self.grows and not valid.all():
            raise DataError(
                "padding can be appended to no row of this graph; give every row a token, or begin anew with the rows that go on."
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
        return self._run(tokens)

    def step(self, ids: npt.ArrayLike) -> Logits:
        """Append one token a row, ``ids[B]``; returns the logits ``[B, V]`` after it. Raises `DataError` when full."""
        logits = self.extend(self._np.asarray(ids, self._np.int64).reshape(-1, 1))
        return logits[:, 0] if self.all_logits else logits

    def score(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Logits ``[B, L, V]`` after every token of ``ids[B, L]``; rows of padding are unspecified.

        Needs a decoder opened with ``all_logits=True``.
        """
        if not self.all_logits:
            raise DataError(
                "this graph keeps the last logits only; open the decoder with all_logits=True to score."
            )
        np, rows = self._np, self.fixed[0] if self.fixed else None
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
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield up to ``max_new_tokens`` token ids after the prompt ``ids``; a stop id ends it and is not yielded.

        ``temperature`` 0 is greedy; above it, tokens are drawn from the smallest set with probability ``top_p``.
        """
        draw = self._np.random.default_rng(seed)
        logits = self.prefill([list(ids)], room=max_new_tokens)
        row = logits[0, -1] if self.all_logits else logits[0]
        for count in range(1, max_new_tokens + 1):
            token = choose(row, temperature=temperature, top_p=top_p, draw=draw)
            if token in stop_ids:
                return
            yield token
            if count < max_new_tokens:
                row = self.step([token])[0]

    def _reserve(self, rows: int, capacity: int) -> None:
        """Make the cache hold ``capacity`` tokens for ``rows`` rows, or keep one that already does."""
        np = self._np
        if self.context and capacity > self.context:
            raise DataError(
                f"found {capacity} tokens of prompt and answer; this model's context is {self.context}. Shorten either."
            )
        if self.fixed and rows > self.fixed[0]:
            raise DataError(
                f"found {rows} rows; this graph was made for {self.fixed[0]} (export.shapes.batch). Give it fewer at a time."
            )
        if rows == self._rows and capacity <= self._capacity:
            return
        self._rows, self._capacity = rows, capacity
        self._mask = np.ones((rows, capacity), np.int64)
        self._binding = binding = self.new_binding()
        for name, (heads, size) in self.past.items():
            if not self.grows:
                cache = self._empty(heads, capacity, size)
                binding.bind_ortvalue_input(name, cache)
                binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)

    def new_binding(self) -> Any:
        """An IOBinding of the session with the adapter in place, where there is one."""
        binding = self.session.io_binding()
        for name, value in self._adapter.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def share(self, array: npt.NDArray[Any]) -> Any:
        """``array`` as onnxruntime takes it: on the CPU the same memory, which must be kept as long as it is bound."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _empty(self, heads: int, tokens: int, size: int) -> Any:
        cache = self._np.zeros(
            (self.fixed[0] if self.fixed else self._rows, heads, tokens, size), self.cache_type
        )
        return self._ort.OrtValue.ortvalue_from_numpy(cache, self.cache_device, 0)

    def _run(self, tokens: Ids) -> Logits:
        """Feed ``tokens[B, S]``, the last S columns of the mask so far."""
        if self.fixed is None:
            return self._feed(tokens, self._np.ascontiguousarray(self._mask[:, : self._length]))
        np, (rows, columns) = self._np, self.fixed
        out: Logits = np.zeros(
            (len(tokens), tokens.shape[1] if self.all_logits else 1, self.vocabulary), np.float32
        )
        fill = ((0, rows - len(tokens)), (0, 0))  # with copies of the last row
        for at in range(tokens.shape[1]):
            seen = self._mask[:, : self._length - tokens.shape[1] + at + 1]
            mask = np.zeros((rows, columns), np.int64)
            mask[:, columns - seen.shape[1] :] = np.pad(seen, fill, "edge")
            found = self._feed(np.pad(tokens[:, at : at + 1], fill, "edge"), mask)[: len(tokens)]
            told = np.ones(len(tokens), bool) if self.all_logits else seen[:, -1] == 1
            out[told, at if self.all_logits else 0] = found.reshape(len(tokens), -1)[told]
        return out if self.all_logits else out[:, 0]

    def _feed(self, tokens: Ids, mask: Ids) -> Logits:
        np, ort = self._np, self._ort
        shape = (len(tokens), tokens.shape[1] if self.all_logits else 1, self.vocabulary)
        logits: Logits = np.empty(shape, np.float32)
        # On the CPU these share the arrays' memory: nothing is copied. On a device the cache stays there; only ids, mask
        # and logits travel.
        self._binding.bind_ortvalue_input("input_ids", ort.OrtValue.ortvalue_from_numpy(tokens))
        self._binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(mask))
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        for name, cache in zip(self.past, self._cache, strict=False):
            self._binding.bind_ortvalue_input(name, cache)
            self._binding.bind_output(
                name.replace("past_key_values.", "present."), self.cache_device
            )
        self.session.run_with_iobinding(self._binding)
        if self.grows:
            self._cache = self._binding.get_outputs()[-len(self.past) :]
        return logits if self.all_logits else logits[:, 0]


def choose(
    row: Logits,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    draw: np.random.Generator | None = None,
) -> int:
    """The next token from logits ``row[V]``: the greatest at temperature 0, else drawn from the top-p set."""
    import numpy as np

    if temperature <= 0:
        return int(row.argmax())
    with np.errstate(
        over="ignore"
    ):  # a temperature next to 0 sends all but the greatest to minus infinity
        probabilities = np.exp((row.astype(np.float64) - row.max()) / temperature)
    probabilities /= probabilities.sum()
    draw = draw or np.random.default_rng()
    if top_p >= 1:
        return _pick(probabilities, draw)
    # Tokens below this share of an even split hold less than 1 - top_p together, so none of them is in the set: a sort of
    # the rest will do.
    likely = np.flatnonzero(
        probabilities >= min((1 - top_p) / len(probabilities), probabilities.max())
    )
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    below = np.cumsum(probabilities[order]) - probabilities[order] < top_p
    below[0] = True  # the likeliest token stays, however small top_p is
    kept = order[below]
    return int(kept[_pick(probabilities[kept], draw)])


def _pick(weights: npt.NDArray[np.float64], draw: np.random.Generator) -> int:
    """A place in ``weights``, each with the probability of its share of their sum."""
    cumulative = weights.cumsum()
    return min(
        int(cumulative.searchsorted(draw.random() * cumulative[-1], side="right")), len(weights) - 1
    )


# Text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """The tokenizer, chat template and stop tokens of a deployable folder."""

    tokenizer: Any
    template: str | None
    special: dict[str, str]  # bos_token and its like, as the chat template names them
    stop_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens added as the tokenizer's own post-processor adds them."""
        return list(self.tokenizer.encode(text).ids)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (``role`` and ``content`` each) up to where the model answers.

        Raises `DataError` when the folder has no chat template or the template refuses the messages.
        """
        if self.template is None:
            raise DataError(
                "this model has no chat template; leave --chat out and give it plain text."
            )
        text = render(self.template, messages, self.special)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of ``ids`` as it becomes certain: never half a character, and joined the same as decoding them at once."""
        decoding = Decoding(self.tokenizer)
        for token in ids:
            if piece := decoding.add(token):
                yield piece
        if rest := decoding.rest():
            yield rest


class Decoding:
    """Text of tokens that come one at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._pending: list[int] = []
        self._context: list[
            int
        ] = []  # the last tokens told: a decoder may treat the first token of a text differently

    def add(self, token: int) -> str:
        """The text that ``token`` makes certain; empty while it ends within a character."""
        self._pending.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        told = self._pending if self._decode(self._pending) else self._context + self._pending
        self._context, self._pending = told, []
        return text

    def rest(self) -> str:
        """What was held back, now that no token follows."""
        return self._new() if self._pending else ""

    def _new(self) -> str:
        return str(self._decode(self._context + self._pending)[len(self._decode(self._context)) :])


_AGAIN = "copy the folder again, or export the student again."


def load_text(folder: Path) -> Text:
    """Open the text side of a deployable folder. Raises `ArtifactError` for a file that is missing or cannot be read."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: tokenizer.json is missing; expected the folder that `limbeck export` wrote."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no class of its own
        raise ArtifactError(f"{path}: no tokenizer ({error}); {_AGAIN}") from error
    config = _read(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    stop = _read(folder / "generation_config.json").get(
        "eos_token_id", _read(folder / "config.json").get("eos_token_id")
    )
    return Text(
        tokenizer=tokenizer,
        template=template.read_text() if template.is_file() else config.get("chat_template"),
        special={name: value for name, value in special.items() if isinstance(value, str)},
        stop_ids=frozenset([stop] if isinstance(stop, int) else stop or ()),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
