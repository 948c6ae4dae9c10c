"""What rounding costs: held-out loss of every CPU form over fp32, by domain, and its size.

Measures SmolLM2-135M as it is, or a trained student
(`ARGS=runs/smollm2-135m-two-experts-1a2b3c4d`). The domains are the demo's two; Python source, of
which calibration has seen another file; and C++ headers of torch, which nothing has seen. Prints
one JSON object: `int8_rise` and `int4_rise` are the worst rise of loss on a domain, of int8-weight
and int4-weight (0.005 is 0.5 % worse); `int8_size` is the size of int8-weight over that of fp32.

    make bench-forms
    make bench-forms ARGS='RUN --forms int4-weight --set "export.mixed={kind: size, mb: 105}"'
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from limbeck.contract.data.heldout import Blocks

FORMS = ("int8-weight", "int8-dynamic", "int8-static", "int4-weight")


def heldout_text(model: Path, blocks: int) -> dict[str, Blocks]:
    """Held-out blocks of 256 tokens by domain, in the tokens of ``model``."""
    import torch

    from compress.data.blocks import load_blocks
    from limbeck.contract.recipe import Domain, FileText, StdlibText
    from limbeck.contract.sources.tokenizer import load_tokenizer
    from tests.benchmarks.smollm2 import demo_recipe

    recipe = demo_recipe(f"data.heldout.blocks={blocks}")
    python = Domain(name="python", text=StdlibText(kind="stdlib", paths=("*.py",)))
    headers = Path(torch.__file__).parent / "include/torch/csrc/api/include/torch/nn/modules/*.h"
    cpp = Domain(name="cpp", text=FileText(kind="files", paths=(str(headers),)))
    data = recipe.data.model_copy(update={"domains": (*recipe.data.domains, python, cpp)})
    found = load_blocks(recipe.model_copy(update={"data": data}), load_tokenizer(model))
    return {domain.name: domain.heldout for domain in found}


def main() -> None:
    """Export every form, and read the same text with each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="a run folder whose student is exported (default: the base model)",
    )
    parser.add_argument("--blocks", type=int, default=24, help="held-out blocks per domain")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="beside fp32")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="KEY=VALUE")
    asked = parser.parse_args()
    forms = ["fp32", *asked.forms]
    from export import export_student
    from export.graphs import form_files
    from export.heldout import heldout_nll
    from tests.benchmarks.smollm2 import demo_recipe, untrained_student

    with tempfile.TemporaryDirectory() as temporary:
        student = (
            asked.run / "student"
            if asked.run
            else untrained_student(Path(temporary) / "student").path
        )
        exported = export_student(
            student=student,
            out=Path(temporary) / "onnx",
            recipe=demo_recipe(f"export.forms=[{', '.join(forms)}]", *asked.sets),
        )
        text = heldout_text(student / "model", asked.blocks)
        losses = {form: heldout_nll(form_files(exported.path, form).all, text) for form in forms}
    made: dict[str, Any] = exported.result["forms"]
    rise = {
        form: {name: losses[form][name] / losses["fp32"][name] - 1 for name in text}
        for form in asked.forms
    }
    worst = {
        f"{form.partition('-')[0]}_rise": round(max(rise[form].values()), 5)
        for form in ("int8-weight", "int4-weight")
        if form in rise
    }
    if "int8-weight" in made:
        size = made["int8-weight"]["bytes"] / made["fp32"]["bytes"]
        worst |= {"int8_size": round(size, 4)}
    print(
        json.dumps(
            {
                **worst,
                "rise": {
                    form: {name: round(value, 5) for name, value in by_name.items()}
                    for form, by_name in rise.items()
                },
                "fp32_nll": {name: round(value, 4) for name, value in losses["fp32"].items()},
                "megabytes": {form: round(made[form]["bytes"] / 1e6, 1) for form in forms},
                "kl": {form: float(f"{made[form]['parity']['kl']:.2g}") for form in forms},
                "scored_tokens": {name: blocks.labels for name, blocks in text.items()},
                "cores": len(os.sched_getaffinity(0)),
            }
        )
    )


if __name__ == "__main__":
    main()
