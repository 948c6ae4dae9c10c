"""The fused fp32 decoder graph: ONNX Runtime GenAI's model builder, then surgery that makes padding right and heads cheap.

Knows ONNX protobufs and the builder; reads no weights (they stay in one external file that both graphs name).

The builder's fused GroupQueryAttention derives each row's length and positions from the *sum* of the attention mask and so expects
every row's tokens at the front. A few integer operators at the graph's entrance move them there, whatever side the padding is
on, and the cache stays compact from then on; one row gather at the exit moves the answers back. Attention itself pays
nothing for it, and an explicit bias or position input is not needed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from limbeck.errors import ModelError

Logits = Literal["last", "all"]
KNOWN = ("granite", "llama", "mistral", "qwen2", "qwen3")  # model types that the tests export and compare with torch
_STEMS = {
    "fp32": "model",
    "fp16": "model_fp16",
    "int8-weight": "model_quantized",
    "int8-dynamic": "model_int8",
    "int8-static": "model_uint8",
    "int8-trt": "model_int8_trt",
    "int4-weight": "model_q4",
}  # transformers.js's names of dtypes fp32, fp16, q8, int8, uint8 and q4
_OWN = "limbeck/"  # prefix of every name this module adds


@dataclass(frozen=True)
class Graphs:
    """The two graphs of one form and the weights file both refer to; paths below the deployable folder."""

    last: Path
    all: Path
    data: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """What must be shipped for the form to run."""
        return (self.last, self.all, self.data)


def form_files(folder: Path, form: str) -> Graphs:
    """Where the graphs of ``form`` lie in a deployable ``folder``; the names are transformers.js's."""
    stem = _STEMS[form]
    return Graphs(
        folder / f"onnx/{stem}.onnx", folder / f"onnx/{stem}_all_logits.onnx", folder / f"onnx/{stem}.onnx_data"
    )


def build_fp32(model: Path, folder: Path, metadata: Mapping[str, str]) -> tuple[Graphs, dict[str, Any]]:
    """Build the fp32 graphs of the transformers folder ``model`` below ``folder``; also returns GenAI's own config.

    Raises `ModelError` for an architecture the builder does not know or whose attention it does not fuse.
    """
    graphs = form_files(folder, "fp32")
    graphs.data.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        build = Path(temporary)
        _run_builder(model, build)
        genai = json.loads((build / "genai_config.json").read_text())
        head_size = int(genai["model"]["decoder"]["head_size"])
        if head_size % 16:
            raise ModelError(
                f"{model}: heads of {head_size} numbers; onnxruntime's fused attention needs a multiple of 16. "
                "Change head_dim (or hidden_size / num_attention_heads) of the student."
            )
        windows = attention_windows(model)
        shutil.move(build / "model.onnx.data", graphs.data)
        for logits, path in (("last", graphs.last), ("all", graphs.all)):
            proto = onnx.load(build / "model.onnx", load_external_data=False)
            relocate(proto, graphs.data.name)
            _static_cache(proto, head_size)
            _set_windows(proto, windows)
            handle_padding(proto, logits="last" if logits == "last" else "all")
            stamp(
                proto, {**metadata, "limbeck.logits": logits, "limbeck.context": str(genai["model"]["context_length"])}
            )
            onnx.save(proto, path)
    return graphs, genai


def _run_builder(model: Path, folder: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            import onnxruntime_genai
            from onnxruntime_genai.models.builder import check_extra_options, create_model

            onnxruntime_genai.disable_telemetry_events()
            # The builder reads its options twice: the first call adds what it learnt from the folder to them.
            options: dict[str, Any] = {"hf_token": "false", "windowed_kv_cache": False}
            check_extra_options("", str(model), str(folder), "fp32", "cpu", str(folder / "cache"), options)
            create_model("", str(model), str(folder), "fp32", "cpu", str(folder / "cache"), **options)
    except OSError:
        raise  # the disk, not the architecture
    except Exception as error:
        tail = "".join(f"\n  {line}" for line in log.getvalue().strip().splitlines()[-3:])
        raise ModelError(
            f"{model}: ONNX Runtime GenAI's graph builder cannot build {architecture} "
            f"({type(error).__name__}: {str(error)[:200]}); set export.backend: dynamo, or use a student of "
            f"an architecture that is known to work: {', '.join(KNOWN)}. The builder's last lines:{tail or ' none'}"
        ) from error
    gc.collect()  # the builder's model and graph refer to each other, and the next step loads the weights again
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    fused = any(node.op_type == "GroupQueryAttention" for node in proto.graph.node)
    names = {value.name for value in proto.graph.input}
    if not fused or "position_ids" in names or not {"input_ids", "attention_mask"} <= names:
        raise ModelError(
            f"{model}: the graph builder writes {architecture} with inputs {', '.join(sorted(n for n in names if 'past' not in n))} and "
            f"{'' if fused else 'no '}fused attention; expected input_ids, attention_mask and fused attention. "
            f"Set export.backend: dynamo, or use a student of an architecture that is known to work: {', '.join(KNOWN)}."
        )


def head_of(proto: ModelProto) -> NodeProto:
    """The product that makes the logits, past a scale, a cap or a bias on them."""
    made_by = {name: node for node in proto.graph.node for name in node.output}
    head = made_by["logits"]
    while head.op_type not in ("MatMul", "Gemm"):
        head = made_by[head.input[0]]
    return head


def stamp(proto: ModelProto, metadata: Mapping[str, str]) -> None:
    """Set ``metadata`` in the graph's ``metadata_props``, over what is there."""
    merged = {entry.key: entry.value for entry in proto.metadata_props} | dict(metadata)
    del proto.metadata_props[:]
    helper.set_model_props(proto, merged)


def relocate(proto: ModelProto, location: str) -> None:
    """Name another external file for every initialiser."""
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def _static_cache(proto: ModelProto, head_size: int) -> None:
    """Give the last dimension of the cache as a number: transformers.js reads it from the graph."""
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size


def attention_windows(model: Path) -> list[int]:
    """Tokens each layer of the transformers folder ``model`` may look back, itself included; -1 is all of them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    window = getattr(config, "sliding_window", None) or -1
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else -1 for kind in kinds]


def _set_windows(proto: ModelProto, windows: list[int]) -> None:
    """Give each attention the window of its layer: the builder leaves it out for some architectures, mistral one of them.

    No text of a parity case is as long as a real model's window, so this is set by rule and not left to measurement.
    """
    attentions = [node for node in proto.graph.node if node.op_type == "GroupQueryAttention"]
    for node, window in zip(attentions, windows, strict=True):
        next(a for a in node.attribute if a.name == "local_window_size").i = window


def handle_padding(proto: ModelProto, *, logits: Logits) -> None:
    """Move each row's tokens to the front on entry and its answers back on exit, in place.

    ``last`` keeps the logits of each row's last *token*, ``[B, 1, V]``; ``all`` keeps ``[B, S, V]`` in the client's order.
    """
    graph = proto.graph
    head = head_of(proto)
    hidden = head.input[0]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "input_ids":
                node.input[index] = f"{_OWN}ids"
    head.input[0] = f"{_OWN}hidden"
    make = Maker(proto)
    whole, one, zero = make.constant("end", [2**63 - 1]), make.constant("one", [1]), make.constant("zero", [0])
    zero_scalar, one_scalar = make.constant("zero_scalar", 0), make.constant("one_scalar", 1)
    entry = [
        make("Shape", ["input_ids"], "rows", start=0, end=1),
        make("Shape", ["input_ids"], "steps", start=1, end=2),
        make("Neg", [f"{_OWN}steps"], "start"),
        make("Slice", ["attention_mask", f"{_OWN}start", whole, one], "mask"),  # [B, S]: the mask of the new tokens
        make("CumSum", [f"{_OWN}mask", one_scalar], "seen"),  # tokens up to and including each
        make("ReduceSum", [f"{_OWN}mask", one], "count", keepdims=1),  # [B, 1]
        make("Squeeze", [f"{_OWN}steps", zero], "steps_scalar"),
        make("Range", [zero_scalar, f"{_OWN}steps_scalar", one_scalar], "range"),
        make("Sub", [f"{_OWN}seen", one], "front"),  # a token goes behind the tokens before it,
        make("Add", [f"{_OWN}count", f"{_OWN}range"], "past_count"),
        make(
            "Sub", [f"{_OWN}past_count", f"{_OWN}seen"], "back"
        ),  # padding behind all tokens and the padding before it
        make("Cast", [f"{_OWN}mask"], "is_token", to=onnx.TensorProto.BOOL),
        make("Where", [f"{_OWN}is_token", f"{_OWN}front", f"{_OWN}back"], "place"),
        make("ScatterElements", ["input_ids", f"{_OWN}place", "input_ids"], "ids", axis=1),
    ]
    width = make.constant("flat", [-1, width_of(proto, head)])
    leave = [
        make("Squeeze", [f"{_OWN}rows", zero], "rows_scalar"),
        make("Range", [zero_scalar, f"{_OWN}rows_scalar", one_scalar], "row"),
        make("Mul", [f"{_OWN}row", f"{_OWN}steps"], "row_start"),
        make("Unsqueeze", [f"{_OWN}row_start", one], "row_start_column"),
        make("Sub", [f"{_OWN}count", one], "last"),
        make("Add", [f"{_OWN}row_start_column", f"{_OWN}{'last' if logits == 'last' else 'place'}"], "source"),
        make("Reshape", [hidden, width], "hidden_flat"),
        make("Gather", [f"{_OWN}hidden_flat", f"{_OWN}source"], "hidden", axis=0),
    ]
    if logits == "all":
        leave = [node for node in leave if node.output[0] != f"{_OWN}last"]
    nodes = list(graph.node)
    at = next(index for index, node in enumerate(nodes) if node.output and node.output[0] == head.output[0])
    del graph.node[:]
    graph.node.extend([*entry, *nodes[:at], *leave, *nodes[at:]])
    del graph.value_info[:]  # shapes of the builder's that no longer hold; onnxruntime infers its own
    if logits == "last":
        dims = next(value for value in graph.output if value.name == "logits").type.tensor_type.shape.dim
        dims[1].Clear()
        dims[1].dim_value = 1


def width_of(proto: ModelProto, head: NodeProto) -> int:
    """Columns of the matrix ``[width, V]`` of ``head``, which may be read through a Transpose of the embedding."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    turned = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Transpose"}
    if head.input[1] in tensors:
        return int(tensors[head.input[1]].dims[0])
    return int(tensors[turned[head.input[1]]].dims[1])


class Maker:
    """Makes nodes and small constants under our own prefix."""

    def __init__(self, proto: ModelProto) -> None:
        self._graph = proto.graph

    def name(self, short: str) -> str:
        """The full name of what another call makes as ``short``."""
        return f"{_OWN}{short}"

    def constant(self, name: str, value: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(value, np.int64), f"{_OWN}const/{name}")
        self._graph.initializer.append(tensor)
        return str(tensor.name)

    def __call__(self, op: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(op, inputs, [f"{_OWN}{output}"], name=f"{_OWN}{output}/{op}", **attributes)
