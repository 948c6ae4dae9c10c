"""An encoder graph under onnxruntime: texts or token rows in, classes or sentence vectors out.

Knows numpy and onnxruntime.
Shape letters: B rows, L tokens, C classes, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.arrays import Ids, token_rows
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.machine import available_cores
from limbeck.contract.models.tokens import text_errors
from limbeck.contract.sources.places import read_object
from limbeck.runtime.session import open_session
from limbeck.runtime.text import load_text, well_formed

Answers = npt.NDArray[np.float32]

_ANSWERS = {"classification": "logits", "embedding": "sentence_embedding"}
_CONTEXT = 512  # tokens, where neither the graph nor the caller names a limit


class GraphEncoder:
    """An encoder graph file. A row's answer does not depend on the other rows or on padding."""

    def __init__(self, graph: Path, *, threads: int | None = None) -> None:
        """Open a graph file by itself, as callers do that still make the artifact.

        Raises as `open_session` does.
        """
        self.threads = threads or available_cores()
        self._session = open_session(graph, threads=threads)
        rows, tokens = self._session.get_inputs()[0].shape
        # Rows and tokens of a static graph.
        self.fixed: tuple[int, int] | None = (rows, tokens) if isinstance(rows, int) else None
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.task = str(metadata["limbeck.task"])
        self.context = int(metadata.get("limbeck.context", "0")) or None
        if self.fixed:
            self.context = min(self.fixed[1], self.context or self.fixed[1])

    def run(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Answers:
        """Logits ``[B, C]`` or unit vectors ``[B, d]`` of ``ids[B, L]``.

        ``mask`` is 1 for tokens and 0 for padding on the right. A graph of fixed shape gets the
        rows in batches of its own size, padded to its length, which is then the context.
        Raises `DataError` past the model's context.
        """
        tokens = token_rows(ids)
        if self.context and tokens.shape[1] > self.context:
            raise DataError(
                f"found {tokens.shape[1]} tokens; this model reads {self.context} at most. "
                "Cut the text."
            )
        valid = np.ones_like(tokens) if mask is None else np.ascontiguousarray(mask, np.int64)
        if self.fixed is None:
            return self._answer(tokens, valid)
        rows, width = self.fixed
        count, length = tokens.shape
        missing = -count % rows, width - length
        # Rows are filled up with copies of the last one: a row of padding alone has nothing to
        # attend to.
        tokens, valid = (
            np.pad(np.pad(a, ((0, missing[0]), (0, 0)), "edge"), ((0, 0), (0, missing[1])))
            for a in (tokens, valid)
        )
        parts = [
            self._answer(tokens[at : at + rows], valid[at : at + rows])
            for at in range(0, len(tokens), rows)
        ]
        answers: Answers = np.concatenate(parts)[:count]
        return answers

    def _answer(self, ids: Ids, mask: Ids) -> Answers:
        feed = {"input_ids": ids, "attention_mask": mask}
        found: Answers = self._session.run([_ANSWERS[self.task]], feed)[0]
        return found


class Encoder(GraphEncoder):
    """The encoder of one form of an exported folder, with its tokenizer and classes."""

    def __init__(
        self, folder: Path, *, form: str | None = None, threads: int | None = None
    ) -> None:
        """Open a form of the ``onnx`` artifact at ``folder``; by default the shipped one.

        Raises `ArtifactError` for a folder that is no encoder's artifact or lacks the form,
        `EnvironmentalError` without a runtime.
        """
        folder = Path(folder)
        artifact = open_artifact(folder, kind="onnx", verify=False)
        result = artifact.result
        if result.get("task", "causal-lm") == "causal-lm":
            raise ArtifactError(
                f"{folder}: holds a language model; use limbeck.runtime.decoder.Decoder."
            )
        name = form or result["shipped"]
        if name not in result["forms"]:
            raise ArtifactError(f"{folder}: no form {name!r}; it has {', '.join(result['forms'])}.")
        super().__init__(artifact.file(result["forms"][name]["graph"]), threads=threads)
        self.classes: list[str] = result["classes"] or []
        self._folder = folder
        self._tokenizer: Any = None
        self._cut = "right"

    def encode(self, texts: Sequence[str], *, max_tokens: int | None = None) -> Answers:
        """As `run`, for texts; each is cut to ``max_tokens``, by default the model's context."""
        if not texts:
            raise DataError("found no texts, expected at least one.")
        if self._tokenizer is None:
            self._tokenizer = load_text(self._folder).tokenizer
            config = read_object(self._folder / "tokenizer_config.json")
            self._cut = str(config.get("truncation_side") or "right")  # as in training
        tokenizer = self._tokenizer
        tokenizer.enable_truncation(max_tokens or self.context or _CONTEXT, direction=self._cut)
        with text_errors():
            encodings = tokenizer.encode_batch(list(map(well_formed, texts)))
        rows = [encoding.ids for encoding in encodings]
        width = max(len(row) for row in rows)
        pad = tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0
        ids = np.array([row + [pad] * (width - len(row)) for row in rows])
        mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return self.run(ids, mask)

    def classify(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[str]:
        """The class of each text. Raises `DataError` for a sentence encoder."""
        if not self.classes:
            raise DataError("this is a sentence encoder, which has no classes; use encode.")
        return [self.classes[int(i)] for i in self.encode(texts, max_tokens=max_tokens).argmax(1)]
