"""What files beside an encoder say of its answers, which its weights alone do not show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.errors import DataError, ModelError
from limbeck.contract.files import parse_json
from limbeck.contract.recipe import EmbeddingTeacher
from limbeck.contract.sources.places import read_object

# Modules of sentence-transformers that change no direction of a vector.
_PLAIN = ("Transformer", "Pooling", "Normalize", "Dropout")
_OURS = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}


def require_one_label(folder: Path) -> None:
    """Raise `ModelError` for a classifier that gives a text several labels, or a number."""
    kind = read_object(folder / "config.json").get("problem_type")
    if kind not in (None, "single_label_classification"):
        raise ModelError(
            f"{folder}: its problem_type is {kind}; a recipe has one label for each text, and "
            "reads the answers of a classifier as shares of one. Name a classifier of single "
            "labels."
        )


def require_classes(found: Sequence[str], classes: Sequence[str], *, who: str) -> None:
    """Raise `ModelError` unless a classifier's classes ``found`` are the recipe's, in its order."""
    if list(found) != list(classes):
        raise ModelError(
            f"{who} tells apart {', '.join(found) or 'nothing'}; the recipe's classes are "
            f"{', '.join(classes)}, in this order. Name them alike in data.classes, or set "
            "id2label in the teacher's configuration."
        )


def stated_classes(config: Mapping[str, Any], *, head: bool) -> list[str]:
    """Classes that a classifier's configuration names, or as transformers names them.

    None of one without a ``head``, unless they are named.
    """
    named = config.get("id2label")
    if isinstance(named, dict) and all(str(key).isdecimal() for key in named):
        return [str(named[key]) for key in sorted(named, key=int)]
    count = config.get("num_labels", 2 if head else 0)
    return [f"LABEL_{index}" for index in range(count if isinstance(count, int) else 0)]


def require_pooling(folder: Path, teacher: EmbeddingTeacher) -> None:
    """Raise `ModelError` if a sentence encoder makes vectors otherwise than ``teacher`` says.

    Only folders of sentence-transformers (modules.json) say how. A pooling that the recipe names
    is taken at its word.
    """
    for module in _modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _PLAIN:
            raise ModelError(
                f"{folder}: modules.json has a module {kind} behind its token states, which "
                "Limbeck does not compute. Name a sentence encoder of Transformer, Pooling and "
                "Normalize."
            )
        if kind == "Pooling" and "pooling" not in teacher.model_fields_set:
            found = _modes(folder / str(module.get("path")) / "config.json")
            mode = _OURS.get(found[0]) if len(found) == 1 else None
            if mode is None:
                way = " and ".join(found) or "a way that its config.json does not name"
                raise ModelError(
                    f"{folder}: it pools token states by {way}; Limbeck knows mean and cls."
                )
            if mode != teacher.pooling:
                raise ModelError(
                    f"{folder}: it pools token states by {mode} ({module.get('path')}); set "
                    f"pooling: {mode} for this teacher."
                )
    if prompt := _default_prompt(folder):
        raise ModelError(
            f"{folder}: config_sentence_transformers.json puts {prompt!r} before every text "
            "(default_prompt_name). Limbeck gives a teacher the text as it is, and the student "
            "would need the prompt too: write it into your texts, and take default_prompt_name out."
        )
    if _lowers_text(folder):
        raise ModelError(
            f"{folder}: sentence_bert_config.json has do_lower_case, and its tokenizer keeps "
            "capitals. Set lowercase in the normalizer of tokenizer.json, or name another encoder."
        )


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    try:
        found = parse_json(path.read_text("utf-8")) if path.is_file() else []
        return [dict(module) for module in found]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the folder again.") from None


def _modes(path: Path) -> list[str]:
    """Names of the ways of pooling that are switched on."""
    config = read_object(path)
    if isinstance(named := config.get("pooling_mode"), str):  # sentence-transformers 5.4 and later
        return [named]
    prefix = "pooling_mode_"
    return [name.removeprefix(prefix) for name, on in config.items()
            if name.startswith(prefix) and on is True]  # fmt: skip


def _default_prompt(folder: Path) -> str:
    """What sentence-transformers puts before a text that asks for no prompt by name."""
    path = folder / "config_sentence_transformers.json"
    config = read_object(path) if path.is_file() else {}
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    return str(prompts.get(name) or "") if isinstance(prompts, dict) and name else ""


def _lowers_text(folder: Path) -> bool:
    path = folder / "sentence_bert_config.json"
    if not path.is_file() or not read_object(path).get("do_lower_case"):
        return False
    tokenizer, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not tokenizer.is_file():  # transformers makes one of the vocabulary and this setting
        return config.is_file() and read_object(config).get("do_lower_case") is False
    written = json.dumps(read_object(tokenizer).get("normalizer"))
    return '"lowercase": true' not in written and '"Lowercase"' not in written
