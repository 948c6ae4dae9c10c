"""The fp32 decoder graph of any causal LM: `torch.onnx.export` of the transformers model with a
flat cache.

Knows torch and transformers. Positions and attention masks are made inside the graph from the
client's mask, so padding on either side, holes and a past are right without a position input;
nothing is fused, so `export.build.genai` is faster where it works.

Shape letters: B rows, S new tokens, P cached tokens, L = P + S.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto, NodeProto, helper

from export.build.exporter import save_onnx
from export.build.surgery import (
    Maker,
    attention_windows,
    choose_columns,
    declare_one_position,
    describe_input,
    layer_kinds,
)
from export.graphs import Graphs, form_files, relocate, stamp
from limbeck.contract.errors import ModelError
from limbeck.contract.models.loading import load_pretrained
from limbeck.contract.recipe import StaticShapes
from limbeck.contract.sources.models import exported_context

_TRACED = {"rows": 2, "new": 3, "past": 5}  # sizes 0 and 1 would be taken for constants


class FlatCache(torch.nn.Module):
    """A causal LM of transformers as a function of ids, mask and one tensor a cache entry."""

    def __init__(
        self, model: Any, windows: Mapping[str, int] | int, *, shifts: bool = False
    ) -> None:
        """``windows`` is the sliding window (-1: none) of all layers, or of each kind of layer that
        the model tells apart.

        A cache that ``shifts`` is given back without its first S columns, so that it keeps its
        length.
        """
        super().__init__()
        self.model = model
        self.shifts = shifts
        self.windows = windows

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Logits ``[B, S, V]`` and the cache after ``input_ids[B, S]``, given ``attention_mask[B,
        L]`` and keys and values by turns."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        # a token's position is the number of tokens before it
        seen_BL = (attention_mask.cumsum(1) - 1).clamp(min=0)
        positions_BS = seen_BL[:, attention_mask.shape[1] - input_ids.shape[1] :]

        def mask(window: int) -> torch.Tensor:
            query, key = positions_BS[:, :, None], seen_BL[:, None, :]
            allowed = (key <= query) & (attention_mask[:, None, :] == 1)
            if window > 0:
                allowed = allowed & (query - key < window)
            return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]

        cache = DynamicCache()
        for key, value in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        windows = self.windows
        out = self.model(
            input_ids=input_ids,
            attention_mask=mask(windows)
            if isinstance(windows, int)
            else {kind: mask(size) for kind, size in windows.items()},
            position_ids=positions_BS,
            past_key_values=cache,
            use_cache=True,
        )
        first = input_ids.shape[1] if self.shifts else 0
        kept = (
            tensor[:, :, first:] for layer in cache.layers for tensor in (layer.keys, layer.values)
        )
        return (out.logits, *kept)


def build_dynamo(
    model: Path,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    opset: int | None = None,
    static: StaticShapes | None = None,
) -> tuple[Graphs, int | None]:
    """Build the fp32 graphs of the transformers folder ``model`` below ``folder``; also returns the
    context, in tokens.

    ``opset`` is the ONNX operator set, None the exporter's choice. ``static`` graphs read one token
    of each row a run, given a mask of their length and a cache of one column less; both keep all
    logits, which are of one token.

    Raises `ModelError` for a model that takes no positions, keeps no keys and values, or that torch
    cannot export.
    """
    graphs = form_files(folder, "fp32")
    graphs.data.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        build = Path(temporary) / "model.onnx"
        context = _export(model, build, opset, static)
        (build.parent / "model.onnx.data").rename(graphs.data)
        for logits, path in (("last", graphs.last), ("all", graphs.all)):
            proto = onnx.load(build, load_external_data=False)
            relocate(proto, graphs.data.name)
            split_gemm(proto)
            if logits == "last" and static is None:
                keep_last(proto)
            stamp(
                proto,
                {
                    **metadata,
                    "limbeck.logits": logits,
                    "limbeck.context": str(context or 0),
                    "limbeck.cache": "shifts" if static else "grows",
                },
            )
            onnx.save(proto, path)
    return graphs, context


def _export(folder: Path, path: Path, opset: int | None, static: StaticShapes | None) -> int | None:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = load_pretrained(AutoModelForCausalLM, folder, **options).eval()
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{folder}: {name} takes no position_ids, so its padded batches cannot be made right. "
            "Use a student of another architecture."
        )
    with torch.inference_mode():
        probe = model(
            input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=True
        ).past_key_values
    shapes = [
        tensor.shape
        for layer in getattr(probe, "layers", [])
        for tensor in (layer.keys, layer.values)
    ]
    if not shapes or any(len(shape) != 4 or shape[2] != 2 for shape in shapes):
        raise ModelError(
            f"{folder}: {name} keeps something else than keys and values a token "
            f"({type(probe).__name__}); only decoders with such a cache can be exported. Use a "
            "student of another architecture."
        )
    rows, new, past = _TRACED["rows"], _TRACED["new"], _TRACED["past"]
    if static:
        rows, new, past = static.batch, 1, static.length - 1
    names = [
        f"past_key_values.{index}.{part}"
        for index in range(len(shapes) // 2)
        for part in ("key", "value")
    ]
    batch = {0: "batch_size"}
    free = {
        "input_ids": batch | {1: "sequence_length"},
        "attention_mask": batch | {1: "total_sequence_length"},
        "past": [batch | {2: "past_sequence_length"}] * len(names),
    }
    kinds, by_layer = layer_kinds(model.config), attention_windows(folder)
    windows = dict(zip(kinds, by_layer, strict=True)) if kinds else by_layer[0]
    save_onnx(
        FlatCache(model, windows, shifts=static is not None),
        (
            torch.zeros((rows, new), dtype=torch.int64),
            torch.ones((rows, past + new), dtype=torch.int64),
            [torch.zeros((rows, shape[1], past, shape[3])) for shape in shapes],
        ),
        path,
        source=folder,
        inputs=["input_ids", "attention_mask", *names],
        outputs=["logits", *(n.replace("past_key_values", "present") for n in names)],
        shapes=None if static else free,
        opset=opset,
    )
    return exported_context(model.config.to_dict())


def split_gemm(proto: ModelProto) -> None:
    """Write every Gemm on a constant matrix as MatMul and Add: quantisation knows no Gemm."""
    matrices = {tensor.name for tensor in proto.graph.initializer}
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = node.op_type == "Gemm" and node.input[1] in matrices
        if (
            not plain
            or attributes.get("transA")
            or any(attributes.get(factor, 1.0) != 1.0 for factor in ("alpha", "beta"))
        ):
            nodes.append(node)
            continue
        matrix = node.input[1]
        if attributes.get("transB"):
            matrix = f"{node.output[0]}/transposed"
            nodes.append(helper.make_node("Transpose", [node.input[1]], [matrix], perm=[1, 0]))
        bias = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}/product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], matrix], [product], name=node.name))
        if bias:
            nodes.append(
                helper.make_node(
                    "Add", [product, bias], list(node.output), name=f"{node.name}/bias"
                )
            )
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def keep_last(proto: ModelProto) -> None:
    """Compute the head for each row's last *token* only, in place: logits become ``[B, 1, V]``."""
    make = Maker(proto)
    entry = [
        *describe_input(make),
        make("Mul", [make.name("mask"), make.name("range")], "token_columns"),
        # [B, 1]
        make(
            "ReduceMax", [make.name("token_columns"), make.constant("one", [1])], "last", keepdims=1
        ),
    ]
    choose_columns(proto, make, entry, "last")
    declare_one_position(proto)
