"""Read a GGUF file back, with llama.cpp where its wheel cyllama is installed and else with
transformers, and compare it with the student.

transformers' reader is not ours: it checks names, order and values of the tensors, but runs them in
fp32. llama.cpp checks the metadata, the tokenizer and its own arithmetic too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.check.parity import Case, differences, require_parity
from export.check.verdict import TOLERANCES, judge, summary
from export.gguf.llama_cpp import LlamaCpp
from export.heldout import per_token, row_loss
from limbeck.contract.data.arrays import Floats, Ids
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.errors import ParityError
from limbeck.contract.models.loading import load_pretrained
from limbeck.contract.progress import task

# Rows of these are padded for graphs; without padding they are like the others.
_PADDED = ("left_padded", "right_padded")


@dataclass(frozen=True)
class Reader:
    """A GGUF file that is open: logits ``[L, V]`` of token ids ``[L]``."""

    runtime: str
    logits: Callable[[Ids], Floats]
    # ids of a text, with or without what comes before it; None where the runtime has no tokenizer
    encode: Callable[[str, bool], list[int]] | None
    close: Callable[[], None]


def open_reader(file: Path, model: Path, *, tokens: int) -> Reader:
    """Open ``file``, written from the transformers folder ``model``, for rows of up to ``tokens``.

    Close it in the end.
    """
    if importlib.util.find_spec("cyllama") is None:
        return _with_transformers(file, model)
    opened = LlamaCpp(file, tokens)
    return Reader("llama.cpp", opened.logits, opened.encode, opened.close)


def _with_transformers(file: Path, model: Path) -> Reader:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        loaded = load_pretrained(
            AutoModelForCausalLM,
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            config=AutoConfig.from_pretrained(model, local_files_only=True),
            attn_implementation="eager",
        ).eval()

    def logits(ids: Ids) -> Floats:
        with torch.inference_mode():
            found: Floats = loaded(input_ids=torch.from_numpy(ids[None])).logits[0].numpy()
        return found

    return Reader("transformers", logits, None, lambda: None)


def measure(form: str, reader: Reader, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Differences from torch's answers, as `export.check.parity.measure_parity` gives them.

    Raises `ParityError` past the limits of ``form``.
    """
    lead = TOLERANCES[form].lead
    by_case: dict[str, npt.NDArray[np.float64]] = {}
    with task(f"parity of {form}", len(cases)) as progress:
        for name, case in cases.items():
            if name not in _PADDED:
                by_case[name] = differences(case, np.arange(len(case.rows)), _feed(reader, case))
            progress.advance()
    largest = max(float(np.abs(case.logits).max()) for case in cases.values())
    verdict = judge(form, by_case, largest=largest)
    found = {
        **summary(np.concatenate(list(by_case.values()), axis=1), lead),
        "tolerance": verdict.limits,
        "lead": lead,
        "cases": {name: summary(values, lead) for name, values in by_case.items()},
        "failures": verdict.failures,
    }
    require_parity(form, found)
    return found


def _feed(reader: Reader, case: Case) -> Floats:
    """Logits ``[P, V]`` at the positions of ``case``, each row alone and without padding."""
    found = []
    for row, (ids, mask) in enumerate(zip(case.ids, case.mask, strict=True)):
        columns = np.cumsum(mask)[case.columns[case.rows == row]] - 1
        found.append(reader.logits(ids[mask == 1])[columns])
    return np.concatenate(found)


def gguf_losses(form: str, reader: Reader, heldout: Mapping[str, Blocks]) -> dict[str, float]:
    """Nats a scored token of every domain."""
    found: dict[str, list[float]] = {name: [] for name in heldout}
    with task(f"held-out text: {form}", sum(map(len, heldout.values()))) as progress:
        for name, blocks in heldout.items():
            for row, length in enumerate(blocks.lengths):
                ids = blocks.input_ids[row, :length].astype(np.int64)
                found[name].append(row_loss(reader.logits(ids), ids, blocks.scored[row, :length]))
                progress.advance()
    return per_token(found, heldout)


def require_same_tokens(reader: Reader, model: Path, heldout: Mapping[str, Blocks]) -> None:
    """Raise `ParityError` if the runtime tokenises a held-out text in another way."""
    if reader.encode is None:
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for name, blocks in heldout.items():
        text = tokenizer.decode(blocks.input_ids[0, : blocks.lengths[0]].tolist())
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        theirs = reader.encode(text, False)
        if ours != theirs:
            at = next(
                (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            raise ParityError(
                f"{reader.runtime} cuts held-out text of {name} into other tokens than the "
                f"student's tokenizer, from token {at} on: {theirs[at : at + 3]} instead of "
                f"{ours[at : at + 3]}. Leave the gguf forms out of export.forms, or report the "
                "model."
            )
