"""Encoders: sources to plain folders, folders to torch models, and what a model says of a batch.

Shapes: R rows, L tokens, C classes, d width.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from compress.models.language import (
    byte_tokenizer,
    cached,
    model_config,
    model_folder,
    random_config,
    random_model,
)
from compress.models.shrink import Importance, shrink
from limbeck.contract.errors import ModelError
from limbeck.contract.files import file_digest
from limbeck.contract.models.encoders import load_encoder, read, require_padding_unread
from limbeck.contract.models.loading import require_finite, unused_pooler
from limbeck.contract.progress import say
from limbeck.contract.recipe import (
    AnyEncoderSource,
    EncoderShrinkStudent,
    EncoderSource,
    EncoderStudent,
    FreshStudent,
    FullStudent,
    OnnxModel,
    RandomModel,
    RecipeModel,
    fingerprint,
)
from limbeck.contract.sources.models import context_in, model_path
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.contract.sources.weights import check_weights

_FAITHFUL = (
    1e-4  # largest difference between an ONNX file's output and that of the model read back from it
)


def encoder_folder(source: AnyEncoderSource, *, folder: Path, product: Path | None = None) -> Path:
    """The plain folder of an encoder; random ones and ONNX files are made into the cache, once.

    ``product`` is the student artifact of a source of kind `recipe`. Raises `ModelError`.
    """
    match source:
        case RecipeModel():
            assert product is not None
            return product / "model"
        case RandomModel():
            key = fingerprint(
                {
                    "random encoder": source.model_dump(mode="json"),
                    "head": "id2label" in source.config,
                }
            )
            return cached(key, lambda out: _make_random(source, out))
        case OnnxModel():
            path = model_path(source, folder=folder)
            assert path is not None
            like = model_folder(source.like, folder=folder)
            key = fingerprint(
                {"onnx encoder": file_digest(path), "like": file_digest(like / "config.json")}
            )
            return cached(key, lambda out: _read_onnx(path, like, out))
        case _:
            return model_folder(source, folder=folder)


def encoder_config(source: EncoderSource, *, folder: Path) -> Any:
    """Configuration of an encoder, without its weights; of a hub model only config.json is fetched.

    Raises `ModelError` if it is not available.
    """
    if isinstance(source, RandomModel):
        return random_config(
            _random_fields(source), vocab_size=len(byte_tokenizer()), where="model.config"
        )
    if not isinstance(source, OnnxModel):
        return model_config(source, folder=folder)
    path = model_path(source, folder=folder)
    assert path is not None
    config = model_config(source.like, folder=folder)
    config.num_hidden_layers = _layers_named_in(path)
    return config


def labelled(config: Any, classes: Sequence[str]) -> Any:
    """A copy of a configuration for a classifier of these classes."""
    return type(config).from_dict({**config.to_dict(), **_labels(classes)})


def require_context(name: str, config: Any, tokens: int) -> None:
    """Raise `ModelError` unless an encoder with this configuration reads ``tokens`` tokens."""
    most = context_in(config.to_dict())
    if most and tokens > most:
        raise ModelError(
            f"data.max_tokens: found {tokens}, but {name} reads {most} at most; choose {most} or "
            "less."
        )


def load_body(folder: Path) -> Any:
    """The encoder without a head, in fp32 and eval mode. Raises `ModelError`."""
    check_weights(folder)
    return load_encoder(folder, task="embedding")


def load_classifier(folder: Path, classes: Sequence[str] | None = None) -> Any:
    """The encoder with its classification head, or a fresh head for ``classes``.

    Raises `ModelError`.
    """
    check_weights(folder)
    if classes is None:
        return load_encoder(folder, task="classification")
    what = "an encoder with a classification head"
    return load_encoder(
        folder, task="classification", what=what, fresh=_of_a_head, **_labels(classes)
    )


def class_names(model: Any) -> list[str]:
    """Classes of a classifier, in the order of its outputs."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def build_student(
    student: EncoderStudent,
    *,
    folder: Path,
    classes: Sequence[str] | None,
    calibration: Sequence[Tensor],
    seed: int,
) -> tuple[Any, Importance | None, dict[str, Any]]:
    """The trainable model; for a shrunk one also the importance it was cut by and the sizes kept.

    ``folder`` is the base; a fresh student needs it only for its tokenizer. ``classes`` is None for
    a sentence encoder. ``calibration`` are token ids ``[1, L]`` of training text. Raises
    `ModelError`.
    """
    importance, kept = None, dict[str, Any]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of a fresh head
        match student:
            case FullStudent():
                model = load_body(folder) if classes is None else load_classifier(folder, classes)
            case EncoderShrinkStudent():
                body, importance, kept = shrink(load_body(folder), student, calibration)
                model = body if classes is None else _with_head(body, classes)
            case FreshStudent(config=config):
                tokenizer = load_tokenizer(folder)
                body = random_model(
                    config,
                    vocab_size=len(tokenizer),
                    seed=seed,
                    where="student.config",
                    auto=AutoModel,
                )
                body.config.pad_token_id = tokenizer.pad_token_id
                model = body if classes is None else _with_head(body, classes)
    require_padding_unread(model.eval(), where="the student")
    return model.requires_grad_(True), importance, kept


def pooled(model: Any, ids_RL: Tensor, mask_RL: Tensor, *, pooling: str = "mean") -> Tensor:
    """Unit vectors ``[R, d]`` in fp32: masked mean of token states, or the first one (`cls`)."""
    states_RLd = read(model, ids_RL, mask_RL).last_hidden_state.float()
    if pooling == "cls":
        vectors_Rd = states_RLd[:, 0]
    else:
        weight_RL1 = mask_RL[..., None].float()
        vectors_Rd = (states_RLd * weight_RL1).sum(1) / weight_RL1.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(vectors_Rd, dim=-1)


def _of_a_head(model: Any, name: str) -> bool:
    """Whether a classifier's weight is part of its head, which may include the body's pooler."""
    body = f"{model.base_model_prefix}."
    return not name.startswith(body) or unused_pooler(model, name.removeprefix(body))


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "problem_type": None,  # a base may have been of several labels, or of a number
    }


def _with_head(body: Any, classes: Sequence[str]) -> Any:
    """A classifier around ``body``, its head fresh."""
    config = labelled(body.config, classes)
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(
            f"student: transformers has no classifier of {config.model_type}: {error}"
        ) from error
    inner = getattr(model, model.base_model_prefix)
    missing, _ = inner.load_state_dict(
        body.state_dict(), strict=False
    )  # a pooler that the classifier has no use for
    assert not [name for name in missing if not name.startswith("pooler.")], missing
    return model


def _make_random(source: RandomModel, out: Path) -> dict[str, Any]:
    tokenizer, options = byte_tokenizer(), _random_fields(source)
    auto = AutoModelForSequenceClassification if "id2label" in source.config else AutoModel
    model = random_model(
        options, vocab_size=len(tokenizer), seed=source.seed, where="model.config", auto=auto
    )
    _save(model, tokenizer, out)
    return {"parameters": model.num_parameters()}


def _random_fields(source: RandomModel) -> dict[str, Any]:
    return {"pad_token_id": byte_tokenizer().pad_token_id, **source.config}


# An ONNX file read back --------------------------------------------------------------------------


def _read_onnx(file: Path, like: Path, out: Path) -> dict[str, Any]:
    """Write a transformers folder with the weights of ``file`` and the configuration of ``like``.

    Exporters keep the parameters' names, but replace the weight of each Linear by its transpose
    under a new name. Those are named after the MatMul that reads them. Raises `ModelError`.
    """
    import onnx
    from onnx import numpy_helper

    say(f"  {file.name}: reading the weights back from ONNX, once, into the cache")
    graph = onnx.load(file).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = {
        _local(name): numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if _local(name)
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = _local(f"{node.name.removesuffix('/MatMul').replace('/', '.')}.weight")
            if name:
                found[name] = numpy_helper.to_array(tensors[node.input[1]]).T
    layers = {int(match[1]) for name in found if (match := re.search(r"\.layer\.(\d+)\.", name))}
    config = AutoConfig.from_pretrained(like)
    config.num_hidden_layers = max(layers, default=-1) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of a pooler that the file does not have
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(np.array(values)) for name, values in found.items()}
    require_finite(file, state.items())
    try:
        missing, _ = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{file}: its weights do not fit the configuration of {like}: {str(error)[:300]}"
        ) from error
    missing = [name for name in missing if not name.startswith("pooler.")]
    if missing or not layers:
        raise ModelError(
            f"{file}: {len(missing)} weights of a {config.model_type} are not found in it (for "
            f"example {', '.join(missing[:3])}); "
            "only encoders whose exporter kept the parameters' names can be read back."
        )
    gap = _difference(model, file)
    if not gap <= _FAITHFUL:
        raise ModelError(
            f"{file}: the model read back from it computes something else (difference {gap:.2g}, "
            f"tolerance {_FAITHFUL}); "
            f"is {like} of the same configuration?"
        )
    _save(model, load_tokenizer(like), out)
    return {"parameters": model.num_parameters(), "difference": gap}


def _layers_named_in(file: Path) -> int:
    """Count an ONNX file's layers by the names in it, as text: protobuf would read the weights."""
    found = set[int]()
    if file.stat().st_size:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            found = {int(match[1]) for match in re.finditer(rb"encoder\.layer\.(\d+)\.", data)}
    if not found:
        raise ModelError(
            f"{file}: no layers of an encoder are named in it; only encoders whose exporter kept "
            "the parameters' names can be read back."
        )
    return max(found) + 1


def _local(name: str) -> str:
    """A parameter's name inside the encoder, from `embeddings.` or `encoder.` on; else empty."""
    match = re.search(r"(?:^|\.)((?:embeddings|encoder)\..*)$", name)
    return match[1] if match else ""


@torch.no_grad()
def _difference(model: Any, file: Path) -> float:
    """Largest difference between an output of ``file`` and the model's states or their mean."""
    from limbeck.runtime.session import import_onnxruntime

    session = import_onnxruntime().InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 7))
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    outputs = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    states = model(
        input_ids=torch.from_numpy(ids), attention_mask=torch.ones(2, 7, dtype=torch.long)
    ).last_hidden_state
    mine = [
        states.numpy(),
        states.mean(1).numpy(),
        torch.nn.functional.normalize(states.mean(1), dim=-1).numpy(),
    ]
    gaps = [float(np.abs(a - b).max()) for a in outputs for b in mine if a.shape == b.shape]
    return min(gaps, default=float("inf"))


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def base_folder(student: EncoderStudent, *, folder: Path, teachers: Sequence[Path]) -> Path:
    """Folder of the student's base, or for a fresh one of the first teacher's tokenizer."""
    if isinstance(student, FreshStudent):
        return teachers[0]
    base: EncoderSource = student.base
    return encoder_folder(base, folder=folder)
