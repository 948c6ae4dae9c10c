"""`limbeck init`: a recipe of a few lines that works, from teachers, a text and a size.

Knows recipes, and what the plan says of them. Writes one file, with the reasons for its choices in comments.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.artifact import write_atomically
from limbeck.errors import DataError, LimbeckError, ModelError, RecipeError
from limbeck.plan import form_sizes
from limbeck.recipe import Recipe, find_recipe, parse_recipe

_TARGET_SHARE = 0.97  # of the size asked for: the plan is right within 2 %
_DEPTHS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # shares of the layers kept, most first
_WIDTHS = (1.0, 0.75, 0.5)  # shares of the FFN's neurons
_BITS = {"int8-weight": 8, "int4-weight": 4}  # forms that may ship


@dataclass(frozen=True)
class Choice:
    """A student that fits, in YAML's flow style, the form it ships in, and why it was taken."""

    student: dict[str, Any]
    form: str
    megabytes: float
    why: str


def write_recipe(
    *, teachers: Sequence[str], texts: Sequence[str], target_mb: float, student: str | None, out: Path
) -> Choice:
    """Write the recipe to ``out`` and return what was chosen.

    ``teachers`` and ``student`` are model folders, GGUF files, hub ids (owner/name) or recipe files; the student's
    base is the smallest teacher when none is given. Raises `ModelError`, `DataError` or `RecipeError`.
    """
    if out.exists():
        raise RecipeError(f"{out}: is already there; name another file with --out.")
    for text in texts:
        if not Path(text).expanduser().is_file():
            raise DataError(f"--data {text}: no such file; give a text file of yours.")
    sources = [_source(teacher, "--teacher") for teacher in teachers]
    names = _names(teachers)
    tree: dict[str, Any] = {
        "name": re.sub(r"[^a-z0-9._-]+", "-", out.stem.lower()).strip("-.") or "mine",
        "teachers": [{"name": n, "model": s} for n, s in zip(names, sources, strict=True)],
        "data": {
            "domains": [
                {"name": name, "text": {"kind": "files", "paths": [str(Path(text).expanduser().resolve())]}}
                for name, text in zip(_names(texts), texts, strict=True)
            ],
            "block": 128,
            "heldout": {"piece_chars": 1024},
        },
        "training": {"tokens": 204800, "batch_tokens": 1024, "learning_rate": 1e-3, "evaluate_every": 50},
        "gates": {"max_size_mb": target_mb, "max_loss_vs_best_teacher": 0.02},
    }
    bases = [_source(student, "--student")] if student else [s for s in sources if s["kind"] != "recipe"]
    if not bases:
        raise ModelError("--teacher: all teachers are recipes; name the model the student starts from with --student.")
    choice = choose_student(tree, bases, target_mb=target_mb)
    if choice.student["kind"] == "shrink":
        tree["training"]["learning_rate"] = 3e-4
    tree["gates"]["max_quantization_loss"] = 0.01 if choice.form == "int8-weight" else 0.05
    tree |= {"student": choice.student, "export": {"forms": ["fp32", choice.form]}}
    parse_recipe(tree, where=str(out))
    write_atomically(out, _text(tree, choice, target_mb))
    return choice


def choose_student(tree: dict[str, Any], bases: Sequence[dict[str, Any]], *, target_mb: float) -> Choice:
    """The best student of at most ``target_mb``: whole before cut, of cuts the one that keeps most, and of its forms 8 bits before 4.

    4 bits cost a few percent of loss, a cut far more (docs/experiments.md). Raises `ModelError` naming the smallest that was
    found when none fits.
    """
    most = target_mb * _TARGET_SHARE
    base = min(bases, key=lambda base: _sizes(tree, {"kind": "lora", "base": base})["int8-weight"])
    whole = {"kind": "lora", "base": base, "rank": 16}
    tried = []
    for form, megabytes in _sizes(tree, whole).items():
        why = f"the smallest model fits whole in {_BITS[form]} bits"
        why += ", so adapters on it lose nothing" if form == "int8-weight" else " but not in 8"
        if megabytes <= most:
            return Choice(whole, form, megabytes, why)
        tried.append((megabytes, f"whole, {form}"))
    try:
        cuts = [(_sizes(tree, student), student, kept) for student, kept in _cuts(tree, base)]
    except ModelError as error:
        raise ModelError(f"{target_mb:g} MB: the model itself does not fit, and {error}") from error
    for sizes, student, kept in sorted(cuts, key=lambda cut: -cut[0]["int8-weight"]):
        for form, megabytes in sizes.items():
            if megabytes <= most:
                return Choice(student, form, megabytes, f"whole it does not fit, so {kept} are kept")
            tried.append((megabytes, f"{kept} kept, {form}"))
    least, why = min(tried)
    raise ModelError(
        f"--target-mb {target_mb:g}: no student of that size from these models; the smallest is {least:.1f} MB ({why}). "
        "Ask for that, or name a smaller model with --student."
    )


def _cuts(tree: dict[str, Any], base: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    layers, neurons = _dimensions(tree, base)
    for width, depth in itertools.product(_WIDTHS, _DEPTHS):
        if width == depth == 1:
            continue
        kept = max(1, round(layers * depth))
        student: dict[str, Any] = {"kind": "shrink", "base": base, "layers": kept}
        if width < 1:
            student["intermediate_size"] = int(neurons * width)
        yield student, f"{kept} of {layers} layers and {width:.0%} of the neurons"


def _dimensions(tree: dict[str, Any], base: dict[str, Any]) -> tuple[int, int]:
    from compress.models import model_config
    from compress.shrink import shrunk_sizes

    recipe = _recipe(tree, {"kind": "shrink", "base": base}, "int8-weight")
    assert recipe.student.kind == "shrink"
    sizes = shrunk_sizes(model_config(recipe.student.base, folder=recipe.folder), recipe.student)
    return sizes["layers"], sizes["intermediate_size"]


def _sizes(tree: dict[str, Any], student: dict[str, Any]) -> dict[str, float]:
    """Megabytes of each form that may ship, 8 bits first."""
    sizes = form_sizes(_recipe(tree, student, *_BITS))
    return {form: sizes[form] / 1e6 for form in _BITS}


def _recipe(tree: dict[str, Any], student: dict[str, Any], *forms: str) -> Recipe:
    # Without teachers: the size is the student's alone. Gates are about what is made, not about what is planned.
    return parse_recipe(
        {**tree, "teachers": [], "gates": {}, "student": student, "export": {"forms": ["fp32", *forms]}}
    )


def _source(given: str, option: str) -> dict[str, Any]:
    """A model source from what was typed. Raises `ModelError` when it is nothing that is known."""
    path = Path(given).expanduser()
    if path.is_dir():
        return {"kind": "local", "path": str(path.resolve())}
    if path.suffix == ".gguf" and path.is_file():
        return {"kind": "gguf", "path": str(path.resolve())}
    if path.suffix == ".yaml":
        return {"kind": "recipe", "recipe": str(find_recipe(given))}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", given) and not path.exists():
        try:
            return {"kind": "recipe", "recipe": str(find_recipe(given))}
        except LimbeckError:
            return {"kind": "hub", "id": given}
    raise ModelError(f"{option} {given}: no such folder, .gguf file, recipe, or hub id (owner/name); give one of them.")


def _names(given: Sequence[str]) -> list[str]:
    """A short name for each, all different."""
    names: list[str] = []
    for index, one in enumerate(given):
        stem = re.sub(r"[^a-z0-9._-]+", "-", Path(one).stem.lower()).strip("-._")[:40] or f"n{index + 1}"
        names.append(stem if stem not in names else f"{stem}-{index + 1}")
    return names


def _text(tree: dict[str, Any], choice: Choice, target_mb: float) -> str:
    lines = [
        f"# Written by `limbeck init` for {target_mb:g} MB. Student: {choice.why}.",
        f"# It will take about {choice.megabytes:.1f} MB as {choice.form}; `limbeck plan` says more, `limbeck run` does it.",
        f"name: {tree['name']}",
        "teachers:",
        *(f"  - {_flow(teacher)}" for teacher in tree["teachers"]),
    ]
    lines += [f"{key}: {_flow(tree[key])}" for key in ("data", "student", "training", "export", "gates")]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """YAML on one line."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.strip()
