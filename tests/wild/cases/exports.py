"""The models of random cases through the export, where parity holds every form to torch."""

from __future__ import annotations

import warnings
from pathlib import Path

from export import export_student
from limbeck.contract.errors import LimbeckError, ParityError
from tests.pico import make_student, pico_recipe
from tests.wild.cases.configurations import describe, draw_case, make_case_model

_FORMS = ("fp32", "int8-weight")


def exported(number: int, folder: Path) -> tuple[str, str, str]:
    """Verdict, model and parity of the case ``number``, made in ``folder``.

    A verdict in upper case is a find; other errors of ours refuse the model by name.
    """
    case = draw_case(number)
    recipe = pico_recipe(export={"forms": [{"kind": form} for form in _FORMS]})
    verdict = "exported"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make_case_model(case, folder / "model")
            student = make_student(folder / "student", folder / "model")
            made = export_student(student=student.path, out=folder / "onnx", recipe=recipe)
            limits = {form: made.result["forms"][form]["parity"]["kl"] for form in _FORMS}
            found = ", ".join(f"{form} KL {kl:.1e} nats" for form, kl in limits.items())
        except ParityError as error:
            verdict, found = "PARITY", str(error)
        except LimbeckError as error:
            verdict, found = "refused", str(error)
        except Exception as error:  # what is not ours is a crash
            verdict, found = "CRASH", f"{type(error).__name__}: {error}"
    return verdict, describe(case.config), found
