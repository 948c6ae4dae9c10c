"""`limbeck init`: a short recipe that works, from teachers, a text and a size.

Knows recipes and their plans. Writes one file, with the reasons for its choices in comments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.app.init.choice import Choice, choose_student, sizes_of
from limbeck.app.init.inputs import (
    BATCH,
    adapter_bases,
    are_short,
    model_source,
    short_names,
    teacher_source,
    text_source,
    training_tokens,
)
from limbeck.contract.errors import ModelError, RecipeError
from limbeck.contract.files import write_atomically
from limbeck.contract.progress import say
from limbeck.contract.recipe import Bench, Data, parse_recipe
from limbeck.contract.sources.models import context_of
from limbeck.contract.sources.teacher_tokens import compare_tokenizers

_BLOCK = 128
_TIMED = Bench().prompt_tokens + Bench().new_tokens


def write_recipe(
    *,
    teachers: Sequence[str],
    texts: Sequence[str],
    target_mb: float,
    student: str | None,
    base_paths: Sequence[str] = (),
    out: Path,
) -> Choice:
    """Write the recipe to ``out`` and return the choices.

    ``teachers`` and ``student`` are model folders, GGUF files, hub ids (owner/name) or recipe
    files; teachers also PEFT adapter folders, and servers as URL[#MODEL]=TOKENIZER. The default
    base of the student is the smallest teacher. Raises `ModelError`, `DataError`, `RecipeError`, or
    `EnvironmentalError` for a server that does not answer.
    """
    if out.exists():
        raise RecipeError(f"{out}: is already there; name another file with --out.")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise RecipeError(
            f"{out}: {out.parent} is no folder that can be written to; name another file with "
            "--out."
        )
    found = _named_teachers(teachers, adapter_bases(base_paths))
    own = [model_source(student, "--student")] if student else []
    tree = _common(out, found, own, texts, target_mb)
    bases = own or [t["model"] for t in found if t["model"]["kind"] not in ("recipe", "server")]
    if not bases:
        raise ModelError(
            "--teacher: no teacher is a model that the student could start from; name one with "
            "--student."
        )
    asked = (
        [(f"--student {student}", bases[0], False)]
        if student
        else [
            (f"--teacher {given}", teacher["model"], "adapter" in teacher)
            for given, teacher in zip(teachers, found, strict=True)
        ]
    )
    for option, source, is_base in asked:
        if source["kind"] == "hub":
            _require_on_hub(tree, source, option, is_base=is_base)
    choice = choose_student(tree, bases, target_mb=target_mb)
    if choice.student["kind"] == "shrink":
        tree["training"]["learning_rate"] = 3e-4
    tree["gates"]["max_quantization_loss"] = 0.01 if choice.form == "int8-weight" else 0.05
    tree |= {"student": choice.student, "export": {"forms": ["fp32", choice.form]}}
    for teacher in compare_tokenizers(parse_recipe(tree, where=str(out))):
        if not teacher.relation.equal:
            say(f"  {teacher}")
    write_atomically(out, _text(tree, choice, target_mb))
    return choice


def _named_teachers(teachers: Sequence[str], local: Mapping[str, Path]) -> list[dict[str, Any]]:
    sources = [teacher_source(given, local) for given in teachers]
    named = [
        source["model"].get("model", given) for source, given in zip(sources, teachers, strict=True)
    ]
    return [
        {"name": name, **source} for name, source in zip(short_names(named), sources, strict=True)
    ]


def _common(
    out: Path,
    found: Sequence[dict[str, Any]],
    own: Sequence[dict[str, Any]],
    texts: Sequence[str],
    target_mb: float,
) -> dict[str, Any]:
    """A recipe without its student; ``own`` are models that were named for it."""
    context = _context([*(t["model"] for t in found), *own])
    tree: dict[str, Any] = {
        "name": re.sub(r"[^a-z0-9._-]+", "-", out.stem.lower()).strip("-.") or "mine",
        "teachers": [*found],
        "data": {
            "domains": [
                {"name": name, "text": text_source(text)}
                for name, text in zip(short_names(texts), texts, strict=True)
            ],
            "block": min(_BLOCK, 1 << (context.bit_length() - 1)),
            "heldout": {"piece_chars": 1024},
        },
        "training": {
            "tokens": training_tokens(texts),
            "batch_tokens": BATCH,
            "learning_rate": 1e-3,
            "evaluate_every": 50,
        },
        "gates": {"max_size_mb": target_mb, "max_loss_vs_best_teacher": 0.02},
    }
    if any(t["model"]["kind"] == "server" for t in found):
        tree["fusion"] = {"calibration": {"kind": "none"}}  # a server answers uncalibrated
    if context < _TIMED:
        tree["bench"] = {"prompt_tokens": context // 2, "new_tokens": max(2, context // 4)}
    if are_short(texts, Data.model_validate(tree["data"])):
        tree["data"]["packing"] = "stream"
    return tree


def _context(models: Sequence[dict[str, Any]]) -> int:
    """Context of each model on this machine, in tokens; at most what a default bench needs."""
    folders = (Path(model["path"]) for model in models if model["kind"] == "local")
    return min([_TIMED, *filter(None, map(context_of, folders))])


def _require_on_hub(
    tree: dict[str, Any], source: dict[str, Any], option: str, *, is_base: bool
) -> None:
    """Raise `ModelError` unless a hub model's configuration can be had."""
    try:
        sizes_of(tree, {"kind": "lora", "base": source})
    except ModelError as error:
        if is_base:
            raise ModelError(
                f"{option}: is an adapter on {source['id']}, of which no folder of that name is "
                f"here; where it is in another folder, add --base {source['id']}=PATH. As a model "
                f"of the hub: {error}"
            ) from error
        raise ModelError(
            f"{option}: no folder of that name here, and as a model of the hub: {error}"
        ) from error


def _text(tree: dict[str, Any], choice: Choice, target_mb: float) -> str:
    lines = [
        f"# Written by `limbeck init` for {target_mb:g} MB. Student: {choice.why}.",
        f"# It will take about {choice.megabytes:.1f} MB as {choice.form}; `limbeck plan` "
        "says more, `limbeck run` does it.",
        *([f"# {choice.caution}"] if choice.caution else []),
        f"name: {tree['name']}",
        "teachers:",
        *(f"  - {_flow(teacher)}" for teacher in tree["teachers"]),
    ]
    lines += [
        f"{key}: {_flow(tree[key])}"
        for key in ("data", "student", "fusion", "training", "export", "bench", "gates")
        if key in tree
    ]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """YAML on one line."""
    import yaml

    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return text.strip()
