"""An encoder graph under onnxruntime: a batch of texts or token rows in, classes or sentence vectors out.

Knows numpy, onnxruntime and tokenizers, and imports each when it is first needed. Shape letters: B rows, L tokens, C classes,
d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.machine import available_cores
from limbeck.runtime.decoder import import_onnxruntime, warn_of_overflow

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Answers = npt.NDArray[np.float32]

# Architectures whose positions begin behind the id of the padding token, which shortens their context.
COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
_ANSWERS = {"classification": "logits", "embedding": "sentence_embedding"}


class Encoder:
    """One encoder graph. A row's answer does not depend on the rows and the padding that it is run with."""

    def __init__(
        self, folder: Path, *, form: str | None = None, threads: int | None = None
    ) -> None:
        """Open a form of the ``onnx`` artifact at ``folder`` (none: the shipped one).

        Raises `ArtifactError` for a folder that is no encoder's artifact or lacks the form, `EnvironmentalError` without runtime.
        """
        result = open_artifact(Path(folder), kind="onnx", verify=False).result
        if "task" not in result:
            raise ArtifactError(f"{folder}: holds a language model; use limbeck.runtime.Decoder.")
        name = form or result["shipped"]
        if name not in result["forms"]:
            raise ArtifactError(f"{folder}: no form {name!r}; it has {', '.join(result['forms'])}.")
        self.folder: Path | None = Path(folder)
        self.classes: list[str] = result["classes"] or []
        self._open(Path(folder) / result["forms"][name]["graph"], threads)

    @classmethod
    def from_graph(cls, graph: Path, *, threads: int | None = None) -> Encoder:
        """Open a graph file by itself, for callers that are still making the artifact."""
        encoder = cls.__new__(cls)
        encoder.folder, encoder.classes = None, []
        encoder._open(graph, threads)
        return encoder

    def _open(self, graph: Path, threads: int | None) -> None:
        import numpy as np

        ort = import_onnxruntime()
        self.threads = threads or available_cores()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Threads may spin within a run, where the next operator is microseconds away, but never between runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ArtifactError(
                f"{graph}: onnxruntime cannot open it ({error}); export the student again."
            ) from error
        self._np = np
        rows, tokens = self._session.get_inputs()[0].shape
        self.fixed: tuple[int, int] | None = (
            (rows, tokens) if isinstance(rows, int) else None
        )  # of a static graph
        metadata = self._session.get_modelmeta().custom_metadata_map
        warn_of_overflow(metadata)
        self.task = str(metadata["limbeck.task"])
        self.context = int(metadata.get("limbeck.context", "0")) or None
        if self.fixed:
            self.context = min(self.fixed[1], self.context or self.fixed[1])
        self._text: Any = None

    def run(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Logits ``[B, C]`` or unit vectors ``[B, d]`` of ``ids[B, L]``; ``mask`` is 1 for tokens, 0 for padding on the right.

        A graph of fixed shape gets the rows in batches of its own size, padded to its length, which is then the context. Raises
        `DataError` past the model's context.
        """
        np = self._np
        tokens = np.ascontiguousarray(ids, np.int64)
        if tokens.ndim != 2 or not tokens.size:
            raise DataError(
                f"found ids of shape {tokens.shape}; expected [rows, tokens] with at least one token."
            )
        if self.context and tokens.shape[1] > self.context:
            raise DataError(
                f"found {tokens.shape[1]} tokens; this model reads {self.context} at most. Cut the text."
            )
        valid = np.ones_like(tokens) if mask is None else np.ascontiguousarray(mask, np.int64)
        if self.fixed is None:
            return self._answer(tokens, valid)
        rows, width = self.fixed
        count, length = tokens.shape
        missing = -count % rows, width - length
        # Rows are filled up with copies of the last one: a row of padding alone has nothing to attend to.
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

    def _answer(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        found: npt.NDArray[Any] = self._session.run(
            [_ANSWERS[self.task]], {"input_ids": ids, "attention_mask": mask}
        )[0]
        return found

    def encode(
        self, texts: Sequence[str], *, max_tokens: int | None = None
    ) -> npt.NDArray[np.float32]:
        """As `run`, for texts; each is cut to ``max_tokens``, by default the model's context."""
        if self.folder is None or not texts:
            raise DataError(
                "found no texts, or a graph without its folder; open an exported folder and give texts."
            )
        if self._text is None:
            from limbeck.runtime.decoder import load_text

            self._text = load_text(self.folder).tokenizer
        self._text.no_padding()
        self._text.enable_truncation(max_tokens or self.context or 512)
        rows = [encoding.ids for encoding in self._text.encode_batch(list(texts))]
        width = max(len(row) for row in rows)
        pad = self._text.token_to_id("[PAD]") or self._text.token_to_id("<pad>") or 0
        ids = self._np.array([row + [pad] * (width - len(row)) for row in rows])
        mask = self._np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return self.run(ids, mask)

    def classify(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[str]:
        """The class of each text. Raises `DataError` for a sentence encoder."""
        if not self.classes:
            raise DataError("this is a sentence encoder, which has no classes; use encode.")
        return [self.classes[int(i)] for i in self.encode(texts, max_tokens=max_tokens).argmax(1)]
