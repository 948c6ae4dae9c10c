"""`torch.onnx.export` of a transformers model, with its notes silenced and its errors as ours."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from limbeck.contract.errors import ModelError


def save_onnx(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    path: Path,
    *,
    source: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: dict[str, Any] | None,
    opset: int | None,
) -> None:
    """Trace ``module`` and write its graph to ``path``, and its weights to ``path``.data.

    ``module.model`` is the transformers model of the folder ``source``. ``shapes`` names the free
    dimensions of the arguments; None fixes them all. ``opset`` None is the exporter's choice.
    Raises `ModelError` for a model that torch cannot export.
    """
    try:
        with torch.no_grad(), _quiet(), _quick():
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
            )
            assert program is not None
            # Where each node comes from: paths of this machine, which would make the graph
            # another one in another folder.
            ClearMetadataAndDocStringPass()(program.model)
            program.save(str(path), external_data=True)
    except OSError:
        raise  # the disk, not the architecture
    except Exception as error:  # torch.export and the exporter raise errors of many families
        says = " ".join(str(error).partition("\x1b")[0].split())  # then come colours and advice
        raise ModelError(
            f"{source}: torch.onnx.export cannot export {type(module.model).__name__} "
            f"({type(error).__name__}: {says[:300]}). "
            "Use a student of an architecture of docs/architectures.md."
        ) from error


@contextmanager
def _quick() -> Iterator[None]:
    """Take a quarter off the time of a trace, whose graph stays the same.

    On symbolic shapes torch's cache of fake tensors costs more than it saves. Automatic garbage
    collections find little; the exporter's own, one a step, still run.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide notes on missing packages and unused names, about which the user can do nothing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
