"""What clients read beside the graphs: tokenizer and configurations, old and new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from export.folder.ends import end_tokens
from export.graphs import Graphs
from limbeck.contract.errors import ModelError
from limbeck.contract.models.tokens import MORE_TEMPLATES
from limbeck.contract.recipe import Provider
from limbeck.contract.sources.models import exported_context
from limbeck.contract.sources.places import read_object
from limbeck.runtime.chat import without_marks

# transformers.js's names of the graphs' number types.
DTYPES = {
    "model": "fp32",
    "model_fp16": "fp16",
    "model_quantized": "q8",
    "model_int8": "int8",
    "model_uint8": "uint8",
    "model_q4": "q4",
}
# optimum-onnx 0.1.0 derives a cache's shape from config.json instead of reading it from the graph.
# It knows `head_dim` of the first list, and takes hidden_size / num_attention_heads elsewhere; it
# knows `num_key_value_heads` of the second.
_OPTIMUM_HEAD_SIZE = ("gemma3_text",)
_OPTIMUM_KEY_HEADS = ("gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")


def write_client_files(
    model: Path,
    folder: Path,
    *,
    graphs: Sequence[Graphs],
    shipped: Graphs,
    genai: Mapping[str, Any] | None,
    provider: Provider = "cpu",
) -> None:
    """Write what transformers.js, optimum, onnxruntime-genai and transformers read beside the
    graphs.

    ``genai`` is the builder's configuration, or None where GenAI cannot run the graph; it is
    pointed at the ``shipped`` graph. Both generation configurations name every end token of the
    model (`end_tokens`).

    Raises `ModelError` without a ``tokenizer.json`` in ``model``.
    """
    if not (model / "tokenizer.json").is_file():
        raise ModelError(
            f"{model}: no tokenizer.json, expected a fast tokenizer; load it with transformers "
            "and `save_pretrained` it again."
        )
    shutil.copy(model / "tokenizer.json", folder)
    ends = end_tokens(model)
    if (model / "generation_config.json").is_file():
        generation = json.loads((model / "generation_config.json").read_text("utf-8"))
        _write(folder / "generation_config.json", generation | {"use_cache": True} | _ends(ends))
    _write(folder / "tokenizer_config.json", tokenizer_config(model))
    if (template := chat_template(model)) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for path in _more_templates(model):
        (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
        text = without_marks(path.read_text("utf-8"))
        (folder / MORE_TEMPLATES / path.name).write_text(text, encoding="utf-8")
    _write(folder / "config.json", _config(model, graphs))
    if genai is not None:
        settings: dict[str, Any] = json.loads(json.dumps(genai))
        if provider == "cuda":
            settings["model"]["decoder"]["session_options"]["provider_options"] = [
                {"cuda": {"enable_cuda_graph": "0"}}
            ]
        settings["model"] |= _ends(ends)
        settings["model"]["decoder"]["filename"] = shipped.last.relative_to(folder).as_posix()
        _write(folder / "genai_config.json", settings)


def _config(model: Path, graphs: Sequence[Graphs]) -> dict[str, Any]:
    """The model's config.json, with what transformers.js needs to know of the graphs."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    # Training with gradient checkpointing leaves False in both files. A client that obeys would
    # read the whole text again for every token.
    if "use_cache" in config:
        config["use_cache"] = True
    # transformers.js looks for a second file, and for a cache in fp16, only where this says so; the
    # latter by dtype.
    config["transformers.js_config"] = {
        "use_external_data_format": {g.last.name: 1 for g in graphs}
    }
    if half := [g for g in graphs if _cache_is_half(g.last)]:
        config["transformers.js_config"]["kv_cache_dtype"] = {
            DTYPES[g.last.stem]: "float16" for g in half
        }
    return config


def _ends(ends: Sequence[int]) -> dict[str, Any]:
    """The field that names the end tokens: a number where there is one, as most readers expect."""
    return {"eos_token_id": ends[0] if len(ends) == 1 else list(ends)} if ends else {}


def optimum_loads(folder: Path, graph: Path) -> bool:
    """Whether optimum-onnx 0.1.0 gives ``graph`` a cache of the right shape."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if config.model_type in _OPTIMUM_HEAD_SIZE:
        size = config.head_dim
    if config.model_type in _OPTIMUM_KEY_HEADS:
        heads = config.num_key_value_heads
    inputs = onnx.load(graph, load_external_data=False).graph.input
    dims = next(
        v.type.tensor_type.shape.dim for v in inputs if v.name.startswith("past_key_values.")
    )
    return (heads, 0, size) == (dims[1].dim_value, dims[2].dim_value, dims[3].dim_value)


def _cache_is_half(graph: Path) -> bool:
    inputs = onnx.load(graph, load_external_data=False).graph.input
    return any(
        v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
        for v in inputs
        if v.name.startswith("past_key_values.")
    )


def tokenizer_config(model: Path) -> dict[str, Any]:
    """The tokenizer's configuration without what only transformers 5 understands."""
    path = model / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name in ("backend", "is_local", "local_files_only", "auto_map"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    # Written as 1e30 when there is no limit, which some readers of JSON cannot hold.
    context = exported_context(read_object(model / "config.json"))
    if context and config.get("model_max_length", 1e30) > context:
        config["model_max_length"] = context
    if (template := chat_template(model)) is not None:
        config["chat_template"] = template
        if more := _more_templates(model):  # as transformers 4 and transformers.js read them
            named = {"default": template} | {
                p.stem: without_marks(p.read_text("utf-8")) for p in more
            }
            config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    return config


def chat_template(model: Path) -> str | None:
    """The chat template as every client can read it."""
    path = model / "chat_template.jinja"
    return without_marks(path.read_text("utf-8")) if path.is_file() else None


def _more_templates(model: Path) -> list[Path]:
    """Files of further chat templates, such as tool_use."""
    return sorted((model / MORE_TEMPLATES).glob("*.jinja"))


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sentence_transformers(folder: Path, *, width: int) -> None:
    """Write what sentence-transformers reads to pool and to normalise as the graph does."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    _write(folder / "1_Pooling" / "config.json", pooling)


def pad_on_the_right(folder: Path) -> None:
    """Let clients pad as an encoder's graph expects: most count positions from the left."""
    path = folder / "tokenizer_config.json"
    _write(path, json.loads(path.read_text("utf-8")) | {"padding_side": "right"})
