"""Load an encoder, and ask it about padded batches.

A row's answer must not depend on the rows beside it: teachers answer in batches, the student
trains in them, and clients send texts alone. torch is imported where a model is loaded.
Shapes: R rows, L tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.models.loading import Fresh, load_pretrained, unused_pooler
from limbeck.contract.models.probe import difference, probe_ids

# Share of the largest number of an answer by which padding may change it in fp32. Sums in another
# order change 2e-7 of MiniLM's states, and 3e-6 of the small logits of its fresh head. Models that
# read their padding differ by 0.2 and more.
_TOLERANCE = 1e-3


def load_encoder(
    folder: Path | str,
    *,
    task: str,
    what: str | None = None,
    fresh: Fresh | None = None,
    **options: Any,
) -> Any:
    """The encoder of ``folder`` for a recipe's ``task`` in fp32 and eval mode, frozen.

    ``what``, ``fresh`` and ``options`` are those of `load_pretrained`. Raises `ModelError`, also if
    padding changes its answers.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    classifier = task == "classification"
    model = load_pretrained(
        AutoModelForSequenceClassification if classifier else AutoModel,
        folder,
        what=what or ("a classifier" if classifier else "an encoder"),
        fresh=fresh or (None if classifier else unused_pooler),
        dtype=torch.float32,
        **options,
    )
    model.requires_grad_(False)
    require_padding_unread(model.eval(), where=str(folder))
    return model


def read(model: Any, ids_RL: Any, mask_RL: Any) -> Any:
    """What transformers computes of a batch that is padded on the right; its padding is replaced.

    Some models find the end of a text, or count its positions, by the id of their own padding. A
    tokenizer may have another one, or none.
    """
    pad = _padding(model)
    ids_RL = ids_RL if pad is None else ids_RL.masked_fill(mask_RL == 0, pad)
    return model(input_ids=ids_RL, attention_mask=mask_RL)


def require_padding_unread(model: Any, *, where: str) -> None:
    """Raise `ModelError` unless ``model`` answers a text alone as beside a longer one.

    ``where`` names the model in the error.
    """
    import torch

    config, pad = model.config.get_text_config(), _padding(model)
    rows = torch.tensor(probe_ids(config.vocab_size - 1))
    rows += rows == pad
    length = rows.shape[1] // 2
    if isinstance(end := getattr(config, "eos_token_id", None), int) and end < config.vocab_size:
        rows[0, -1] = rows[1, length - 1] = end  # some classifiers read nothing but this token
    rows, mask = rows.to(model.device), torch.ones_like(rows).to(model.device)
    mask[1, length:] = 0
    try:
        with torch.inference_mode():
            beside, alone = (
                read(model, rows, mask),
                read(model, rows[1:, :length], mask[1:, :length]),
            )
    except Exception as error:  # almost anything; of transformers, not of ours
        says = " ".join(str(error).split())
        raise ModelError(
            f"{where}: {type(model).__name__} cannot answer a test batch of two texts "
            f"({type(error).__name__}: {says[:200]}). {_remedy(model)}"
        ) from error
    name = "logits" if "logits" in beside else "last_hidden_state"
    found = beside[name][1:] if name == "logits" else beside[name][1:, :length]
    gap = difference(found, alone[name])
    if not gap <= _TOLERANCE:
        raise ModelError(
            f"{where}: {type(model).__name__} answers a text otherwise when it is padded beside a "
            f"longer one (largest difference {gap:.2g} of the largest number, allowed "
            f"{_TOLERANCE:g}). {_remedy(model)}"
        )


def _padding(model: Any) -> int | None:
    """The id of a model's own padding, if it has a row of the embedding."""
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else None


def _remedy(model: Any) -> str:
    if _padding(model) is None:
        return "Set pad_token_id in its config.json to the id of its padding token."
    return "Choose another encoder, such as one of docs/architectures.md."
