"""What a training costs a language model elsewhere: facts that it knew, and text of another kind.

Distillation is judged on the recipe's own text. These figures show what it may lose beside that.

Shapes: R rows, L positions.
"""

from __future__ import annotations

import statistics
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compress.data.packing import special_prefix
from compress.head import IGNORED
from compress.models.language import load_tokenizer
from compress.tasks.language_models import LanguageModels
from limbeck.contract.sources.models import context_of

_ELSEWHERE = Path(statistics.__file__)  # Python's own sources are on every machine
_ROWS = 8  # blocks of it


@torch.no_grad()
def forgetting(task: LanguageModels) -> dict[str, float]:
    """Measure the student as it is now.

    Returns `facts`, the share of the prompts in facts.yaml that greedy decoding continues with the
    whole answer, and `python_loss`, nats a token on a source of Python's standard library. Prompts
    that are longer than the model's context are left out.
    """
    tokenizer = load_tokenizer(task.folder)
    task.student.eval()
    ids_RL, labels_RL = _facts(tokenizer, context_of(task.folder) or sys.maxsize)
    right = [
        bool((logits.argmax(-1)[wanted != IGNORED] == wanted[wanted != IGNORED]).all())
        for logits, wanted in zip(_logits(task, ids_RL), labels_RL, strict=True)
    ]
    block = task.recipe.data.block
    text = tokenizer(_ELSEWHERE.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows_RL = torch.tensor(text[: len(text) // block * block]).view(-1, block)[:_ROWS]
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
        for logits, ids in zip(_logits(task, rows_RL), rows_RL, strict=True)
    ]
    task.student.train()
    known = {"facts": sum(right) / len(right)} if right else {}
    return known | {"python_loss": float(torch.stack(losses).mean())}


def _logits(task: LanguageModels, ids_RL: Tensor) -> list[Tensor]:
    """fp32 logits ``[L, V]`` of each row, on the CPU."""
    head, found = task.student_head(), []
    for row in ids_RL:
        with task.accelerator.autocast():
            hidden = task.student(row[None].to(task.device), lambda hidden_RLd, _: hidden_RLd)
        found.append(head.logits(hidden[0].to(head.weight_Vd.dtype)).float().cpu())
    return found


def _facts(tokenizer: PreTrainedTokenizerFast, longest: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels ``[R, L]``, right-padded; the answers' tokens are the labels.

    Leaves out what is longer than ``longest`` tokens.
    """
    rows = []
    prefix = special_prefix(tokenizer)
    for prompt, answer in facts():
        start, end = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)
        )
        start = prefix + start
        rows.append((start + end, [IGNORED] * (len(start) - 1) + end + [IGNORED]))
    rows = [row for row in rows if len(row[0]) <= longest]
    width = max((len(ids) for ids, _ in rows), default=0)
    padded = [
        (ids + [0] * (width - len(ids)), labels + [IGNORED] * (width - len(ids)))
        for ids, labels in rows
    ]
    return torch.tensor([ids for ids, _ in padded]), torch.tensor([labels for _, labels in padded])


@cache
def facts() -> tuple[tuple[str, str], ...]:
    """Prompts and answers of facts.yaml."""
    text = files("compress.tasks").joinpath("facts.yaml").read_text(encoding="utf-8")
    return tuple((fact["prompt"], fact["answer"]) for fact in yaml.safe_load(text))
