"""What an export made: the typed ``result`` of an ``onnx`` artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError

_NEW = "ggufs"  # exports of an older version have none


@dataclass(frozen=True)
class Backend:
    """The graph builder, and why it was chosen."""

    name: str
    why: str


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter that was kept beside its base."""

    file: str
    base: int  # number of the base that it fits
    bytes: int


@dataclass(frozen=True)
class ExportedForm:
    """One form of the student, and how far it is from the student in torch."""

    provider: str  # that it is made for
    graph: str
    all_logits_graph: str  # for scoring; of an encoder the same as `graph`
    files: tuple[str, ...]
    bytes: int  # of what runs: graphs and weights
    rounding: Mapping[str, Any] | None
    smooth: float
    algorithm: str | None
    mixed: Mapping[str, Any] | None
    number_type: str
    parity: Mapping[str, Any]
    parity_base: Mapping[str, Any] | None
    census: Mapping[str, Any]
    greedy: tuple[Mapping[str, Any], ...] = ()
    prompt_graph: str | None = None  # reads long prompts; see `export.round.floats`


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file of the student, as it was read back and scored."""

    file: str
    bytes: int
    tensors: Mapping[str, int]  # number by type
    runtime: str  # that read it back: llama.cpp or transformers
    parity: Mapping[str, Any]
    heldout: Mapping[str, float]  # nats a token by domain
    rise: float | None  # relative, over the student in torch; None where that is not known


@dataclass(frozen=True)
class OnnxResult:
    """The result of an export.

    The fields from ``heldout`` on are set where the recipe asks for `export.recover`; losses are in
    nats a token.
    """

    task: str  # "causal-lm", "classification" or "embedding"
    shipped: str  # a key of `forms`
    backend: Backend
    shapes: Mapping[str, Any]
    forms: Mapping[str, ExportedForm]
    failed: Mapping[str, str]  # forms of the recipe that are not kept, and why
    ggufs: Mapping[str, GgufFile] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    adapter: KeptAdapter | None = None
    heldout: Mapping[str, Mapping[str, float]] | None = None  # by form and domain
    blocks: Mapping[str, Mapping[str, list[float]]] | None = None  # nats a block
    rise: float | None = None
    needs_recovery: bool = False
    parameters: Mapping[str, Any] | None = None  # how each weight is rounded
    recovery: Mapping[str, Any] | None = None  # of a recovered student: what that brought

    def to_json(self) -> dict[str, Any]:
        """The dictionary that a manifest holds."""
        return asdict(self)

    @classmethod
    def of(cls, artifact: Artifact) -> OnnxResult:
        """The result of an ``onnx`` artifact. Raises `ArtifactError` when a field is missing."""
        found = artifact.result
        try:
            given = {field.name: found[field.name] for field in fields(cls) if field.name != _NEW}
            given["backend"] = Backend(**found["backend"])
            given["forms"] = {name: ExportedForm(**form) for name, form in found["forms"].items()}
            given["ggufs"] = {name: GgufFile(**file) for name, file in found.get(_NEW, {}).items()}
            given["adapter"] = KeptAdapter(**found["adapter"]) if found["adapter"] else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{artifact.path}: its manifest is not what this version writes ({error}); "
                "export the student again."
            ) from None
        return cls(**given)
