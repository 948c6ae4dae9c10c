"""The fused fp32 decoder graph: ONNX Runtime GenAI's model builder, then surgery that makes padding
right and heads cheap.

Knows ONNX protobufs and the builder.

The builder's fused GroupQueryAttention derives each row's length and positions from the *sum* of
the attention mask and so expects every row's tokens at the front. A few integer operators at the
graph's entrance move them there, whatever side the padding is on, and the cache stays compact from
then on; one row gather at the exit moves the answers back. Attention itself pays nothing for it,
and an explicit bias or position input is not needed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import ModelProto

from export.build.choice import KNOWN
from export.build.corrections import correct_configuration, corrected_builder
from export.build.rope import compute_tables, drop_rope
from export.build.surgery import (
    Maker,
    attention_windows,
    choose_columns,
    declare_one_position,
    describe_input,
)
from export.graphs import Graphs, form_files, relocate, stamp
from limbeck.contract.errors import ModelError
from limbeck.contract.models.loading import load_pretrained, stored_names

Logits = Literal["last", "all"]


def build_genai(
    model: Path, folder: Path, metadata: Mapping[str, str]
) -> tuple[Graphs, dict[str, Any]]:
    """Build the fp32 graphs of the transformers folder ``model`` below ``folder``; also returns
    GenAI's own config.

    Raises `ModelError` for an architecture the builder does not know or whose attention it does not
    fuse.
    """
    graphs = form_files(folder, "fp32")
    graphs.data.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        build = Path(temporary)
        _run_builder(model, _as_transformers_reads(model, build / "model"), build)
        genai = json.loads((build / "genai_config.json").read_text("utf-8"))
        head_size = int(genai["model"]["decoder"]["head_size"])
        if head_size % 16:
            raise ModelError(
                f"{model}: heads of {head_size} numbers; onnxruntime's fused attention needs a "
                "multiple of 16. "
                "Change head_dim (or hidden_size / num_attention_heads) of the student."
            )
        windows = attention_windows(model)
        compute_tables(build / "model.onnx", model)
        shutil.move(build / "model.onnx.data", graphs.data)
        for logits, path in (("last", graphs.last), ("all", graphs.all)):
            proto = onnx.load(build / "model.onnx", load_external_data=False)
            # The builder adds the commit of the repository around its package, if there is one.
            proto.producer_version = proto.producer_version.partition("+")[0]
            relocate(proto, graphs.data.name)
            _static_cache(proto, head_size)
            _set_windows(proto, windows)
            drop_rope(proto, model)
            handle_padding(proto, logits="last" if logits == "last" else "all")
            stamp(
                proto,
                {
                    **metadata,
                    "limbeck.logits": logits,
                    "limbeck.context": str(genai["model"]["context_length"]),
                },
            )
            onnx.save(proto, path)
    return graphs, genai


def _as_transformers_reads(model: Path, folder: Path) -> Path:
    """``folder``, filled with links to the files of ``model`` and a cleaned config.json.

    The builder obeys fields of any architecture, such as a soft cap in the file of a llama, which
    conversions leave there. transformers ignores those that the architecture does not have. The
    builder rounds fp32 weights to the number type of the configuration, and drops a stored head
    where the configuration says that it is tied; a graph is fp32, and transformers keeps the head.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    for path in model.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = AutoConfig.from_pretrained(model)
    if config.tie_word_embeddings and _HEAD_WEIGHT in stored_names(model):
        config = load_pretrained(AutoModelForCausalLM, model).config
    config.dtype = "float32"
    for name in [name for name in vars(config) if not name.startswith("_")]:
        if name not in _READ and not hasattr(type(config), name):
            delattr(config, name)
    correct_configuration(config)
    config.save_pretrained(folder)
    return folder


_HEAD_WEIGHT = "lm_head.weight"
# Fields that transformers reads of architectures whose configuration class does not name them.
_READ = {"head_dim", "quantization_config"}


def _run_builder(model: Path, source: Path, folder: Path) -> None:
    """Build the graph of ``model`` below ``folder``, from its files as ``source`` has them."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    architecture = (config.get("architectures") or ["none"])[0]
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            import onnxruntime_genai
            from onnxruntime_genai.models.builder import check_extra_options, create_model

            onnxruntime_genai.disable_telemetry_events()
            # The builder reads its options twice: the first call adds what it learnt from the
            # folder to them.
            options: dict[str, Any] = {"hf_token": "false", "windowed_kv_cache": False}
            check_extra_options(
                "", str(source), str(folder), "fp32", "cpu", str(folder / "cache"), options
            )
            with corrected_builder():
                create_model(
                    "", str(source), str(folder), "fp32", "cpu", str(folder / "cache"), **options
                )
    except OSError:
        raise  # the disk, not the architecture
    except Exception as error:
        tail = "".join(f"\n  {line}" for line in log.getvalue().strip().splitlines()[-3:])
        raise ModelError(
            f"{model}: ONNX Runtime GenAI's graph builder cannot build {architecture} "
            f"({type(error).__name__}: {str(error)[:200]}); set export.backend: dynamo, or use a "
            f"student of an architecture that is known to work: {', '.join(KNOWN)}. The builder's "
            f"last lines:{tail or ' none'}"
        ) from error
    # the builder's model and graph refer to each other, and the next step loads the weights again
    gc.collect()
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    fused = any(node.op_type == "GroupQueryAttention" for node in proto.graph.node)
    names = {value.name for value in proto.graph.input}
    if not fused or "position_ids" in names or not {"input_ids", "attention_mask"} <= names:
        raise ModelError(
            f"{model}: the graph builder writes {architecture} with inputs "
            f"{', '.join(sorted(n for n in names if 'past' not in n))} and "
            f"{'' if fused else 'no '}fused attention; expected input_ids, attention_mask and "
            "fused attention. Set export.backend: dynamo, or use a student of an architecture that "
            f"is known to work: {', '.join(KNOWN)}."
        )


def _static_cache(proto: ModelProto, head_size: int) -> None:
    """Give the last dimension of the cache as a number: transformers.js reads it from the graph."""
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size


def _set_windows(proto: ModelProto, windows: list[int]) -> None:
    """Give each attention the window of its layer: the builder leaves it out for some
    architectures, mistral one of them.

    No text of a parity case is as long as a real model's window, so this is set by rule and not
    left to measurement.
    """
    attentions = [node for node in proto.graph.node if node.op_type == "GroupQueryAttention"]
    for node, window in zip(attentions, windows, strict=True):
        given = next((a for a in node.attribute if a.name == "local_window_size"), None)
        if given is None:
            given = node.attribute.add(
                name="local_window_size", type=onnx.AttributeProto.AttributeType.INT
            )
        given.i = window


def handle_padding(proto: ModelProto, *, logits: Logits) -> None:
    """Move each row's tokens to the front on entry and its answers back on exit, in place.

    ``last`` keeps the logits of each row's last *token*, ``[B, 1, V]``; ``all`` keeps ``[B, S, V]``
    in the client's order.
    """
    make = Maker(proto)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == "input_ids":
                node.input[index] = make.name("ids")
    one, one_scalar = make.constant("one", [1]), make.constant("one_scalar", 1)
    entry = [
        *describe_input(make),
        make("CumSum", [make.name("mask"), one_scalar], "seen"),  # tokens up to and including each
        make("ReduceSum", [make.name("mask"), one], "count", keepdims=1),  # [B, 1]
        make("Sub", [make.name("seen"), one], "front"),  # a token goes behind the tokens before it,
        make("Add", [make.name("count"), make.name("range")], "past_count"),
        # padding behind all tokens and the padding before it
        make("Sub", [make.name("past_count"), make.name("seen")], "back"),
        make("Cast", [make.name("mask")], "is_token", to=onnx.TensorProto.BOOL),
        make("Where", [make.name("is_token"), make.name("front"), make.name("back")], "place"),
        make("ScatterElements", ["input_ids", make.name("place"), "input_ids"], "ids", axis=1),
    ]
    if logits == "all":
        choose_columns(proto, make, entry, "place")
        return
    choose_columns(proto, make, [*entry, make("Sub", [make.name("count"), one], "last")], "last")
    declare_one_position(proto)
