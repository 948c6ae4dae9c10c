"""Can the graph of an encoder be written? A small random model of its architecture is tried.

The answer is wanted before the training, which would be in vain.
Shape letters: N examples, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.files import temporary_folder
from limbeck.contract.recipe import DynamicShapes, StaticShapes

# Architectures whose graphs the tests compare with torch; no trial, which takes seconds.
PROVEN = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "llama",
    "modernbert", "mpnet", "nomic_bert", "qwen3", "rembert", "roberta", "xlm-roberta",
)  # fmt: skip
_TOKENS = 24  # of the longest example
_ROWS = 1000  # of the embedding: a large one only takes memory


def require_encoder_graph(
    config: Mapping[str, Any], *, task: str, opset: int | None, shapes: DynamicShapes | StaticShapes
) -> None:
    """Raise `ModelError` if the student of a transformers configuration could not be exported.

    ``opset`` and ``shapes`` are those of the recipe's `export`.
    """
    model_type = config.get("model_type")
    if model_type in PROVEN:
        return
    with temporary_folder() as folder:
        if not _make_small(config, folder / "model", task=task):
            return  # the run tells why transformers cannot build it
        try:
            failures = try_graph(folder / "model", folder, task=task, opset=opset, shapes=shapes)
        except ModelError as error:
            why = str(error).replace(f"{folder}/model: ", "")
            raise ModelError(f"{model_type} cannot be exported: {why}") from error
        except Exception as error:  # onnxruntime's own families of errors
            failures = [" ".join(str(error).split())[:200]]
    if failures:
        raise ModelError(
            f"{model_type} cannot be exported: its graph does not compute what torch computes "
            f"({failures[0]}). Use a student of an architecture of docs/architectures.md."
        )


def try_graph(
    model: Path, out: Path, *, task: str, opset: int | None, shapes: DynamicShapes | StaticShapes
) -> list[str]:
    """Where the fp32 graph of the transformers folder ``model`` answers otherwise than torch.

    It is written below ``out``. Raises `ModelError` if it cannot be.
    """
    import numpy as np  # `validate` must start fast

    from export.build.encoder import build_fp32
    from export.check.encoder import make_cases, measure_encoder_parity
    from export.graphs import form_files
    from limbeck.contract.data.examples import Examples

    static = shapes if isinstance(shapes, StaticShapes) else None
    graphs, draw = form_files(out, "fp32"), np.random.default_rng(0)
    build_fp32(model, graphs, {"limbeck.task": task}, task=task, opset=opset, static=static)
    longest = min(_TOKENS, static.length) if static else _TOKENS
    lengths = np.array([2, longest // 2 + 1, longest], np.int32)
    ids = draw.integers(5, 200, (3, longest)).astype(np.int32)
    examples = Examples(ids, lengths, np.zeros(3, np.int32))
    cases = make_cases(examples, model, task=task)
    if static:  # there is no room for more padding
        del cases["padded"]
    return list(measure_encoder_parity("fp32", graphs.last, cases)["failures"])


def _make_small(config: Mapping[str, Any], folder: Path, *, task: str) -> bool:
    """Whether transformers makes a random model of ``config`` with fewer layers and tokens."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if task == "classification" else AutoModel
    folder.mkdir()
    small = {"vocab_size": _ROWS, "initializer_range": 0.2}  # answers must differ
    ids = {name: value for name, value in config.items() if name.endswith("token_id")}
    small |= {name: 1 for name, value in ids.items() if isinstance(value, int) and value >= _ROWS}
    file = folder / "config.json"
    try:
        file.write_text(json.dumps({**config, **small}), encoding="utf-8")
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(read, "num_hidden_layers", 0) > 2 and "layer_types" not in config:
            read.num_hidden_layers = 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            auto.from_config(read, dtype=torch.float32).save_pretrained(folder)
    except Exception:  # almost anything
        return False
    return True
