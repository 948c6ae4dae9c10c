"""The errors that a user can meet: found, expected, and what to change.

LimbeckError                exit code
├── UserError               2   a mistake in the input; nothing was written
│   ├── RecipeError         2   one or more mistakes in a recipe file or in --set
│   ├── ModelError          2   a model that cannot be used: no weights, a pickle, another tokenizer
│   ├── DataError           2   text that cannot be used: missing, empty, too short
│   │   └── ContextError    2   prompt and answer are longer than the model's context
│   ├── ArtifactError       2   a folder that is changed, incomplete, or belongs to another recipe
│   └── EnvironmentalError  2   this machine lacks something: a package, a GPU, room on the disk
├── ServiceError            2   an engine that takes no request now; try again later
│   ├── QueueFullError      2   too many requests wait already
│   └── ClosedError         2   it is shutting down
└── QualityError            1   the work was done and its result is not good enough to hand on
    ├── ParityError         1   an exported graph does not compute what the student computes
    └── DivergenceError     1   training produced NaN or ran away

Everything else that is raised is a defect of Limbeck and keeps its traceback.
"""

from __future__ import annotations

from limbeck.contract.printable import printable


class LimbeckError(Exception):
    """Base of every error with a message for the user; the command line returns ``exit_code``."""

    exit_code = 2

    def __str__(self) -> str:
        """The message. Control characters in names from the user's files are written out."""
        return printable(super().__str__())


class UserError(LimbeckError):
    """A mistake in what the user gave."""


class RecipeError(UserError):
    """Mistakes in a recipe; the message lists all of them, each with YAML path and remedy."""


class ModelError(UserError):
    """A model or adapter that cannot be used."""


class DataError(UserError):
    """Text that cannot be used."""


class ContextError(DataError):
    """A prompt and an answer that are together longer than the model's context."""


class ArtifactError(UserError):
    """An artifact folder that cannot be trusted or belongs to something else."""


class EnvironmentalError(UserError):
    """Something this machine lacks: a package, a device, room on the disk."""


class ServiceError(LimbeckError):
    """An engine that takes no request now; the same request may be taken later or elsewhere."""


class QueueFullError(ServiceError):
    """An engine with as many requests waiting as it allows."""


class ClosedError(ServiceError):
    """An engine that is shutting down."""


class QualityError(LimbeckError):
    """A result that is complete but not good enough to hand on."""

    exit_code = 1


class ParityError(QualityError):
    """An exported graph differs from the student it was made from by more than its tolerance."""


class DivergenceError(QualityError):
    """Training produced NaN or a loss that ran away.

    The message names the step, the batch and the last good checkpoint.
    """
