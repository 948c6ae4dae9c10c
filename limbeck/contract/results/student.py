"""What a training made: the typed ``result`` of a ``student`` artifact.

Losses are in nats a token (language models) or nats an example (classifiers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError

Made = TypeVar("Made")
TaskName = Literal["causal-lm", "classification", "embedding"]


@dataclass(frozen=True)
class Parameters:
    """Counts of numbers in the student."""

    total: int
    trained: int  # of them, or of the adapters that were merged into it


@dataclass(frozen=True)
class TeacherResult:
    """One teacher, measured on the held-out text."""

    temperature: float  # calibration
    nll: Mapping[str, float] | None = None  # of a language model, by domain
    mean_nll: float | None = None  # of a language model, over domains
    # Nats of each held-out block by domain, of a teacher that the bench does not score: a served
    # one, or one with another tokenizer
    blocks: Mapping[str, list[float]] | None = None
    bits_per_byte: Mapping[str, float] | None = None  # of a language model, by domain
    added_tokens: list[str] | None = None  # that only the teacher or only the student has
    # Of a teacher with another tokenizer, by domain: shares of bytes and labels, rate of tokens.
    coverage: Mapping[str, Mapping[str, float]] | None = None
    metrics: Mapping[str, float] | None = None  # of an encoder, by name


@dataclass(frozen=True)
class LanguageFigures:
    """What only a language model has."""

    nll: Mapping[str, float]  # held-out, by domain, of the student as it is loaded
    mean_nll: float  # over domains
    tokens: int  # label positions trained on
    best_step: int  # whose weights were kept
    base: str | None  # folder that a LoRA student's adapter sits on
    bits_per_byte: Mapping[str, float] | None = None  # held-out, by domain
    start: Mapping[str, Any] | None = None  # merge that the training started from, and scores
    # The base's sums over the rows of evals.safetensors; None for a student without a base.
    base_evals: Mapping[str, Mapping[str, list[float]]] | None = None
    recovery: Mapping[str, Any] | None = None  # of a student distilled again through a rounding


@dataclass(frozen=True)
class EncoderFigures:
    """What only a classifier or a sentence encoder has."""

    metrics: Mapping[str, float]  # held-out, of the student as it is loaded
    classes: tuple[str, ...] | None  # in the order of the outputs; None for a sentence encoder
    examples: Mapping[str, int]  # train, heldout, seen


@dataclass(frozen=True)
class StudentResult:
    """The result of a training. Either ``language`` or ``encoder`` is set."""

    task: TaskName
    teachers: Mapping[str, TeacherResult]  # by name
    steps: int
    seconds: float  # loading and measuring included
    precision: str  # of the forward pass: fp32 or bf16
    device: str
    parameters: Parameters
    shrink: Mapping[str, Any] | None  # sizes that a cut student kept
    sources: Mapping[str, Any]  # licences of base and texts
    language: LanguageFigures | None = None
    encoder: EncoderFigures | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's dictionary: one level, without the fields of other tasks."""
        found = asdict(self)
        found["teachers"] = {
            name: {field: value for field, value in report.items() if value is not None}
            for name, report in found["teachers"].items()
        }
        own = found.pop("language") or {}
        if own.get("recovery", ...) is None:
            del own["recovery"]  # only a recovered student has one
        return found | own | (found.pop("encoder") or {})

    @classmethod
    def of(cls, artifact: Artifact) -> StudentResult:
        """Read the result of a ``student`` artifact. Raises `ArtifactError` for a missing field."""
        found = artifact.result
        try:
            given = {f.name: found[f.name] for f in fields(cls) if f.name in _COMMON}
            given["parameters"] = Parameters(**found["parameters"])
            given["teachers"] = {
                name: _read(TeacherResult, report) for name, report in found["teachers"].items()
            }
            if found["task"] == "causal-lm":
                given["language"] = _read(LanguageFigures, found)
            else:
                encoder = found | {"classes": found["classes"] and tuple(found["classes"])}
                given["encoder"] = _read(EncoderFigures, encoder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{artifact.path}: its manifest is not what this version writes ({error}); delete "
                "the folder and train the student again."
            ) from None
        return cls(**given)

    @property
    def figures_of_language(self) -> LanguageFigures:
        """``language``, where the caller knows that it is set."""
        assert self.language is not None, self.task
        return self.language


_COMMON = {f.name for f in fields(StudentResult)} - {"language", "encoder"}


def _read(made: type[Made], found: Mapping[str, Any]) -> Made:
    """Build a dataclass from the keys that it has. A field without a default must be there."""
    return made(**{f.name: found[f.name] for f in fields(made) if f.name in found})  # type: ignore[arg-type]
