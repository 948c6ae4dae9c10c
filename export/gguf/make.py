"""The GGUF files of one student: written, read back, and held to torch's answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from export.check.parity import Case
from export.folder.card import markdown_table
from export.gguf import architecture as known
from export.gguf.check import gguf_losses, measure, open_reader, require_same_tokens
from export.gguf.tokenizer import require_known
from export.gguf.write import write_gguf
from export.heldout import relative_rise
from limbeck.contract.artifact import Artifact
from limbeck.contract.data.heldout import HELDOUT, load_heldout
from limbeck.contract.errors import ParityError
from limbeck.contract.progress import say
from limbeck.contract.recipe import Recipe
from limbeck.contract.results.onnx import GgufFile


def require_writable(model: Path) -> None:
    """Raise `ModelError` unless llama.cpp knows the transformers folder ``model``."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    known.architecture(known.whole_config(config))
    require_known(json.loads((model / "tokenizer.json").read_text(encoding="utf-8")))


def make_ggufs(
    recipe: Recipe,
    student: Artifact,
    folder: Path,
    cases: Mapping[str, Case],
    metadata: Mapping[str, str],
) -> tuple[dict[str, GgufFile], dict[str, str]]:
    """Write the GGUF forms of ``recipe`` below ``folder``: those that pass, and why others do not.

    ``cases`` hold torch's answers. A form passes if its parity is within the limits of its form,
    as a graph's.
    """
    made: dict[str, GgufFile] = {}
    failed: dict[str, str] = {}
    for form in recipe.export.ggufs:
        say(f"export: writing {form.kind}")
        file = folder / gguf_name(recipe.name, form.kind)
        kind: dict[str, str] = {**metadata, "limbeck.form": form.kind}
        try:
            tensors = write_gguf(
                student.path / "model", file, form.kind, name=recipe.name, metadata=kind
            )
            made[form.kind] = _measured(form.kind, file, folder, student, cases, tensors)
        except ParityError as error:
            failed[form.kind] = str(error)
            say(f"export: {form.kind} is not kept: {error}")
            file.unlink(missing_ok=True)
    return made, failed


def gguf_name(recipe: str, form: str) -> str:
    """File name of a GGUF form, in the hub's way: NAME.Q8_0.gguf."""
    return f"gguf/{recipe}.{form.removeprefix('gguf-').upper()}.gguf"


def _measured(
    form: str,
    file: Path,
    folder: Path,
    student: Artifact,
    cases: Mapping[str, Case],
    tensors: Mapping[str, int],
) -> GgufFile:
    model, heldout = student.path / "model", load_heldout(student.path / HELDOUT)
    reader = open_reader(file, model, tokens=max(case.ids.shape[1] for case in cases.values()))
    with contextlib.closing(reader):
        say(f"export: reading {form} back with {reader.runtime}")
        require_same_tokens(reader, model, heldout)
        parity = measure(form, reader, cases)
        losses = gguf_losses(form, reader, heldout)
    torch: Mapping[str, float] = student.result.get("nll") or {}
    rise = relative_rise(losses, torch) if set(torch) == set(losses) else None
    if rise is not None:
        say(f"export: {form} changes the held-out loss by {rise:+.2%} over the student in torch")
    return GgufFile(
        file=file.relative_to(folder).as_posix(),
        bytes=file.stat().st_size,
        tensors=tensors,
        runtime=reader.runtime,
        parity=parity,
        heldout=losses,
        rise=rise,
    )


def card_section(files: Mapping[str, GgufFile]) -> list[str]:
    """The model card's section on GGUF files."""
    if not files:
        return []
    domains = list(next(iter(files.values())).heldout)
    columns = ["file", "MB", "read back by", "KL, nats", "same first choice", *domains, "change"]
    rows = [
        [
            f"`{made.file}`",
            f"{made.bytes / 1e6:.1f}",
            made.runtime,
            f"{made.parity['kl']:.2g}",
            f"{100 * made.parity['top1']:.1f} %",
            *(f"{made.heldout[name]:.3f}" for name in domains),
            "" if made.rise is None else f"{100 * made.rise:+.2f} %",
        ]
        for made in files.values()
    ]
    return [
        "## GGUF files, for llama.cpp and Ollama",
        markdown_table(columns, rows),
        "Held-out loss is in nats a token; the change is over the student in torch. "
        f"`llama-cli -m {next(iter(files.values())).file}` runs one, and `FROM` in a Modelfile "
        "of Ollama takes it.",
    ]
