"""The text files of the deployable folder: tokenizer, configurations and model card, as clients old and new expect them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import yaml

from export.build.surgery import Graphs
from limbeck import __version__
from limbeck.contract.errors import ModelError
from limbeck.contract.licences import UNKNOWN, hub_fields, of_student
from limbeck.contract.machine import versions
from limbeck.contract.recipe import AnyRecipe, HubModel, Provider, Recipe, StaticShapes, fingerprint
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
_LICENCES = """Each licence is what it says of itself, `unknown` where it says nothing. The header's is that of base model and teachers: theirs where they agree, `other` where they differ, `unknown` where one is."""
_BEFORE_LICENCES = "The student was distilled by a version that wrote no licences down; those of what went in hold all the same."
_APART = """## The adapter

The graphs hold the base; what the student learnt is in `{file}` ({bytes} bytes), which `limbeck generate` and onnxruntime-genai's `Adapters` load with them. A client that knows no adapters, transformers.js among them, runs the base alone. `limbeck generate . --adapter FILE` takes the adapter of any other student of the same base (number {base})."""
# optimum-onnx 0.1.0 does not read a cache's shape from the graph but derives it from config.json: it knows the size of a head of the
# first, of others it takes hidden_size / num_attention_heads; it knows the number of key heads of the second, of others it takes all.
_OPTIMUM_HEAD_SIZE = ("gemma3_text",)
_OPTIMUM_KEY_HEADS = ("gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")
_COPIED = ("generation_config.json", "tokenizer.json")


def write_client_files(
    model: Path,
    folder: Path,
    *,
    graphs: Sequence[Graphs],
    shipped: Graphs,
    genai: Mapping[str, Any] | None,
    provider: Provider = "cpu",
) -> None:
    """Write what transformers.js, optimum, onnxruntime-genai and transformers read beside the graphs.

    ``genai`` is the builder's configuration, none where GenAI cannot run the graph; it is pointed at the ``shipped`` graph. Raises `ModelError` without a
    ``tokenizer.json`` in ``model``.
    """
    if not (model / "tokenizer.json").is_file():
        raise ModelError(
            f"{model}: no tokenizer.json, expected a fast tokenizer; load it with transformers and `save_pretrained` it again."
        )
    for name in _COPIED:
        if (model / name).is_file():
            shutil.copy(model / name, folder / name)
    _write(folder / "tokenizer_config.json", tokenizer_config(model))
    if (template := _chat_template(model)) is not None:
        (folder / "chat_template.jinja").write_text(template)
    config = json.loads((model / "config.json").read_text())
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    # transformers.js looks for a second file, and for a cache in fp16, only where it is told so; the latter by dtype.
    config["transformers.js_config"] = {
        "use_external_data_format": {g.last.name: 1 for g in graphs}
    }
    if half := [g for g in graphs if _cache_is_half(g.last)]:
        config["transformers.js_config"]["kv_cache_dtype"] = {
            DTYPES[g.last.stem]: "float16" for g in half
        }
    _write(folder / "config.json", config)
    if genai is not None:
        genai = json.loads(json.dumps(genai))
        if provider == "cuda":
            genai["model"]["decoder"]["session_options"]["provider_options"] = [
                {"cuda": {"enable_cuda_graph": "0"}}
            ]
        genai["model"]["decoder"]["filename"] = shipped.last.relative_to(folder).as_posix()
        _write(folder / "genai_config.json", genai)


def optimum_loads(folder: Path, graph: Path) -> bool:
    """Whether optimum-onnx 0.1.0 gives ``graph`` a cache of the shape it has; see `_OPTIMUM_HEAD_SIZE`."""
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
    """The tokenizer's configuration without what only transformers 5 understands, chat template included."""
    path = model / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in ("backend", "is_local", "local_files_only", "auto_map"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    # Written as 1e30 when there is no limit, which some readers of JSON cannot hold.
    context = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
    if context and config.get("model_max_length", 1e30) > context:
        config["model_max_length"] = context
    if (template := _chat_template(model)) is not None:
        config["chat_template"] = template
    return config


def _chat_template(model: Path) -> str | None:
    """The chat template as every client can read it."""
    path = model / "chat_template.jinja"
    return without_marks(path.read_text()) if path.is_file() else None


def card_header(recipe: AnyRecipe, *, pipeline: str, shipped: str, student: Mapping[str, Any], student_digest: str,
                teachers: Sequence[Mapping[str, Any]], measured: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> str:  # fmt: skip
    """The hub's YAML header: ``student`` is the artifact's `result`, ``measured`` what was measured by held-out text and metric,
    ``names`` what a metric is in full.

    `base_model` and `datasets` name what lies on the hub and nothing else; `teachers` and `digests` are not the hub's but ours.
    """
    base, texts = recipe.base, student.get("sources", {}).get("texts", {})
    hub = {name: text["dataset"] for name, text in texts.items() if text["dataset"]}
    header: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": pipeline,
        "tags": ["limbeck", "onnx", "distillation", shipped],
        **hub_fields(of_student(student, teachers)),
    }
    if isinstance(base, HubModel):
        header["base_model"] = base.id
    if teachers:
        header["teachers"] = [
            {"name": t["name"], "model": _teacher(recipe, t), "license": t.get("license", UNKNOWN)}
            for t in teachers
        ]
    if hub:
        header["datasets"] = sorted(set(hub.values()))
    if measured:
        results = [
            {
                "task": {"type": pipeline},
                "dataset": {"name": f"{name}, held out", "type": hub.get(name, name)},
                "metrics": [
                    {"type": metric, "name": names.get(metric, metric), "value": round(value, 6)}
                    for metric, value in metrics.items()
                ],
            }
            for name, metrics in measured.items()
        ]
        header["model-index"] = [{"name": recipe.name, "results": results}]
    header["digests"] = {"recipe": recipe.digest, "student": student_digest}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def what_went_in(
    recipe: AnyRecipe, *, student: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The part of a card on base model, teachers and texts, with the licences that were known when the student was distilled."""
    base, known = recipe.base, student.get("sources", {})
    said = _LICENCES if "sources" in student else _BEFORE_LICENCES
    rows = [["base model", _source(base), *_licence(known.get("base"))]] if base else []
    rows += [["teacher " + t["name"], _teacher(recipe, t), *_licence(t)] for t in teachers]
    rows += [
        ["text " + name, _source(text), *_licence(known.get("texts", {}).get(name))]
        for name, text in recipe.texts()
    ]
    return ["## What went in", markdown_table(["what", "from", "licence", "said by"], rows), said]


def graph_metadata(recipe: AnyRecipe, *, student: str) -> dict[str, str]:
    """What every graph says of where it comes from: digests of the distillation, the `export:` part and the student; versions."""
    return {
        "limbeck.version": __version__,
        "limbeck.versions": json.dumps(versions()),
        "limbeck.recipe": recipe.digest,
        "limbeck.export": fingerprint(recipe.export.model_dump(mode="json")),
        "limbeck.student": student,
    }


def digests(recipe: AnyRecipe, *, student: str, parents: Mapping[str, str]) -> list[str]:
    """The part of a card on digests; ``parents`` are those of the student's artifact."""
    rows = [["recipe", f"`{recipe.digest}`"], ["student", f"`{student}`"]]
    rows += [[f"made of {name}", f"`{digest}`"] for name, digest in parents.items()]
    return ["## Digests", markdown_table(["of", "sha256"], rows)]


def write_card(folder: Path, *, recipe: Recipe, student: Mapping[str, Any], student_digest: str, parents: Mapping[str, str],
               teachers: Sequence[Mapping[str, Any]], forms: Mapping[str, Mapping[str, Any]], shipped: str,
               backend: Mapping[str, str], adapter: Mapping[str, Any] | None = None,
               heldout: Mapping[str, float] | None = None) -> None:  # fmt: skip
    """Write the model card: the hub's YAML header, then what it is, what went in, what was measured, and digests.

    ``heldout`` is the loss of the ``shipped`` form in nats a token by domain, where the export measured it.
    """
    nll: Mapping[str, float] = student.get("nll", {})
    card = [
        card_header(
            recipe,
            pipeline="text-generation",
            shipped=shipped,
            student=student,
            student_digest=student_digest,
            teachers=teachers,
            measured={name: {"nll": (heldout or nll)[name]} for name in nll},
            names={
                "nll": f"nats a token, of {shipped}"
                if heldout
                else f"nats a token, of {in_torch(shipped)}"
            },
        ),
        f"# {recipe.name}",
    ]
    if recipe.description:
        card.append(recipe.description)
    card.append(
        f"Made by Limbeck: distilled, exported to ONNX ({backend['name']}) and shipped as `{shipped}`. "
        "Licences of the base model, the teachers and the texts apply; look them up before you pass it on."
    )
    card += what_went_in(recipe, student=student, teachers=teachers)
    rows = [
        [
            f"`{name}`",
            f"{form['bytes'] / 1e6:.1f}",
            f"{p['max_abs']:.2g}",
            f"{p['kl']:.2g}",
            f"{100 * p['top1']:.1f} %",
            _loss(p),
        ]
        for name, form in forms.items()
        for p in [form["parity"]]
    ]
    columns = ["form", "MB", "max logit difference", "KL, nats", "same first choice", "NLL change"]
    card += [
        "## The graphs against the torch student",
        markdown_table(columns, rows),
        f"On {forms[shipped]['parity']['positions']} positions of held-out text, fed as clients feed a graph. The change of NLL is over one "
        "short piece of a domain: enough to see a mistake, too little to say what rounding costs.",
    ]
    greedy = [
        [f"`{n}`", *(_answer(a) for a in form["greedy"])]
        for n, form in forms.items()
        if n != "fp32"
    ]
    if greedy:
        columns = ["form", *(answer["text"] for answer in next(iter(forms.values()))["greedy"])]
        card += [
            "## Greedy answers against fp32",
            "Tokens in common before the first difference, and by how many logits fp32 preferred its own token there.",
            markdown_table(columns, greedy),
        ]
    if nll:
        others: dict[str, Mapping[str, Any]] = student.get("teachers", {})
        arms = {f"`{shipped}`": heldout} if heldout else {}
        arms |= {"student": nll, **{name: found["nll"] for name, found in others.items()}}
        table = [[name, *(f"{losses[name]:.3f}" for losses in arms.values())] for name in nll]
        card += [
            "## Held-out loss, nats a token",
            markdown_table(["text", *arms], table),
            f"`{shipped}` is what ships; student and teachers are in torch."
            if heldout
            else f"Of {in_torch(shipped)}{', and its teachers' if others else ''}. What ships is measured by `limbeck bench`.",
        ]
    dtype = DTYPES.get(Path(forms[shipped]["graph"]).stem)
    clients = [
        *([f"onnxruntime-genai (`{shipped}`)"] if backend["name"] == "genai" else ()),
        f"transformers.js (`dtype: {dtype}`)" if dtype else "transformers.js",
        *(["optimum-onnx"] if optimum_loads(folder, folder / forms[shipped]["graph"]) else ()),
    ]
    where = f"The same folder loads in {', '.join(clients)} and plain onnxruntime. Batches may be padded on either side."
    if isinstance(recipe.export.shapes, StaticShapes):
        where = "Elsewhere it runs in plain onnxruntime, a token a run; clients that read a prompt at once do not fit its one shape."
    card += [
        "## How to run it",
        f'```sh\nlimbeck generate . "Once upon a time"\n```\n\n{where}',
        *([_APART.format(**adapter)] if adapter else ()),
        *digests(recipe, student=student_digest, parents=parents),
    ]
    (folder / "README.md").write_text("\n\n".join(card) + "\n")


def in_torch(shipped: str) -> str:
    """Whose figures those of the student's artifact are, to a reader who holds the ``shipped`` form."""
    return "the student in torch" + (
        "" if shipped == "fp32" else f", before it was rounded to {shipped}"
    )


def _loss(parity: Mapping[str, Any]) -> str:
    return (
        f"{100 * (parity['nll'] / parity['nll_torch'] - 1):+.2f} %"
        if parity.get("nll_torch")
        else ""
    )


def _answer(answer: Mapping[str, Any]) -> str:
    if answer["lead"] is None:
        return f"all {answer['tokens']}"
    return f"{answer['same']} of {answer['tokens']}, then {answer['lead']:.2g}"


def _licence(said: Mapping[str, Any] | None) -> list[str]:
    return [said.get("license", UNKNOWN), said.get("said_by", "")] if said else [UNKNOWN, ""]


def _teacher(recipe: AnyRecipe, teacher: Mapping[str, Any]) -> str:
    """Where a teacher came from: as the recipe says, else the folder that it was loaded from."""
    named = {t.name: _source(t.model) for t in recipe.teachers}
    adapter = f" with adapter {teacher['adapter']}" if teacher.get("adapter") else ""
    return named.get(teacher["name"], str(teacher["model"])) + adapter


def _source(source: Any) -> str:
    fields = source.model_dump(mode="json", exclude_none=True, exclude={"format"})
    return f"{fields.pop('kind')}: " + ", ".join(
        f"{name} {value}" for name, value in fields.items()
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
