"""Which graphs and forms are made of the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from limbeck.contract.recipe.base import SHORTHAND, Count, Fraction, Frozen, Int, Positive

_REDUCE = (
    "Weights of 7 bits instead of 8, which overflow on no processor; default: 7 if this machine "
    "is an x86 without VNNI, else 8."
)
_SMOOTH = (
    "Share of the difficulty of activations' outliers that moves into the weights that read them "
    "(SmoothQuant), on training text; 0 moves nothing. Default: 0.5, and 0 with export.recover or "
    "adapters: separate."
)


class Fp32Form(Frozen):
    """The exact graph."""

    kind: Literal["fp32"]


class Fp16Form(Frozen):
    """Half the bytes, and half-precision arithmetic with fp32 sums, for providers that have it."""

    kind: Literal["fp16"]


class Int8WeightForm(Frozen):
    """Weights in 8-bit blocks, activations quantised on the fly inside MatMulNBits; one 8-bit copy
    of a tied head."""

    kind: Literal["int8-weight"]
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        None, description="Weights that share a scale; default: the largest that divides the width."
    )
    smooth: Fraction | None = Field(None, description=_SMOOTH)


class Int8DynamicForm(Frozen):
    """Integer products: signed 8-bit weights with a scale a channel, activations with one a token;
    8-bit blocks in head and FFN output."""

    kind: Literal["int8-dynamic"]
    reduce_range: bool | None = Field(None, description=_REDUCE)
    smooth: Fraction | None = Field(None, description=_SMOOTH)


RangeChoice = Annotated[
    Literal["min-max", "percentile", "entropy"],
    Field(
        description="How the range of each activation is chosen from training text; held-out text "
        "is for judging the form."
    ),
]


class Int8StaticForm(Frozen):
    """Quantise, dequantise and MatMul (QDQ): as int8-dynamic, but with a scale a tensor measured on
    training text beforehand."""

    kind: Literal["int8-static"]
    calibration: RangeChoice = "min-max"
    reduce_range: bool | None = Field(None, description=_REDUCE)
    smooth: Fraction | None = Field(None, description=_SMOOTH)


class Int8TrtForm(Frozen):
    """QDQ as TensorRT asks for it: signed 8 bits around 0 on both sides, a scale a channel for
    weights, measured on training text."""

    kind: Literal["int8-trt"]
    calibration: RangeChoice = "min-max"
    smooth: Fraction | None = Field(None, description=_SMOOTH)


class Int4WeightForm(Frozen):
    """4-bit blocks with zero points (MatMulNBits); 8 bits in the tied head, attention inputs, FFN
    output."""

    kind: Literal["int4-weight"]
    block_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="Weights that share a scale and a zero point."
    )
    algorithm: Literal["gptq", "rtn"] | None = Field(
        None,
        description="gptq: the inputs of a matrix make up for each other's rounding, judged on "
        "training text. rtn: each is rounded to nearest. None is gptq, but rtn with "
        "export.recover, which trains through that, and with separate adapters.",
    )


class GgufF16Form(Frozen):
    """A GGUF file beside the graphs, for llama.cpp and Ollama, with weights of 16 bits."""

    kind: Literal["gguf-f16"]


class GgufQ8Form(Frozen):
    """A GGUF file beside the graphs, for llama.cpp and Ollama, with weights in 8-bit blocks."""

    kind: Literal["gguf-q8_0"]


class GgufQ4Form(Frozen):
    """A GGUF file beside the graphs, for llama.cpp and Ollama, with weights in 4-bit blocks; 8 bits
    in embedding and head."""

    kind: Literal["gguf-q4_0"]


GgufForm = GgufF16Form | GgufQ8Form | GgufQ4Form  # never ships: onnxruntime does not run it


GraphForm = (
    Fp32Form
    | Fp16Form
    | Int8WeightForm
    | Int8DynamicForm
    | Int8StaticForm
    | Int8TrtForm
    | Int4WeightForm
)
Form = Annotated[Annotated[GraphForm, Field(discriminator="kind")], SHORTHAND]
_AnyForm = Annotated[Annotated[GraphForm | GgufForm, Field(discriminator="kind")], SHORTHAND]
Provider = Literal["cpu", "cuda", "tensorrt"]

# Forms that an execution provider of ONNX Runtime has no kernels for: what would happen, and the
# form to use instead.
NO_KERNEL: Mapping[tuple[str, str], tuple[str, str]] = {
    ("cpu", "fp16"): ("its products would be cast to fp32 when the file is opened", "int8-weight"),
    ("cpu", "int8-trt"): ("its signed products are slower there than fp32", "int8-static"),
    ("cuda", "fp32"): (
        "fused attention in fp32 would run on the CPU, with copies both ways",
        "fp16",
    ),
    ("cuda", "int8-static"): ("its products would run in fp32 between casts", "int8-weight"),
    ("cuda", "int8-trt"): ("its products would run in fp32 between casts", "int8-weight"),
    **{
        ("tensorrt", form): (
            "its operators are ONNX Runtime's own or have no signed codes",
            "int8-trt",
        )
        for form in ("int8-weight", "int8-dynamic", "int8-static", "int4-weight")
    },
    ("cuda", "int8-dynamic"): (
        "its products would run on the CPU, with copies both ways",
        "int8-weight",
    ),
}


class MixedByRule(Frozen):
    """8 bits for attention inputs and FFN outputs."""

    kind: Literal["rule"]


class MixedBySize(Frozen):
    """8 bits for the matrices that lose most a byte in 4 bits, as many as fit."""

    kind: Literal["size"]
    mb: Positive | None = Field(
        None,
        description="Largest size of graph and weights, in MB (1e6 bytes); default: "
        "gates.max_size_mb, else the size by the rule.",
    )
    tokens: Count = Field(
        3072, description="Calibration tokens that each matrix's loss is estimated on."
    )


class MixedByLoss(Frozen):
    """8 bits for the matrices that lose most a byte in 4 bits, as few as keep the form within a
    loss."""

    kind: Literal["loss"]
    rise: Positive | None = Field(
        None,
        description="Largest relative rise of held-out NLL over fp32; default: "
        "gates.max_quantization_loss. It holds on the blocks that the gate is judged "
        "on: leave a margin for other text.",
    )
    tokens: Count = Field(
        3072, description="Calibration tokens that each matrix's loss is estimated on."
    )


Mixed = Annotated[
    Annotated[MixedByRule | MixedBySize | MixedByLoss, Field(discriminator="kind")], SHORTHAND
]


class Recover(Frozen):
    """A short distillation through the shipped form's rounding when that form misses
    gates.max_quantization_loss."""

    tokens: Count = Field(description="Training budget, in tokens of full blocks.")
    learning_rate: Positive = Field(
        1e-4, description="Peak learning rate of AdamW; every rounded weight is trained."
    )


Opset = Annotated[Int, Field(ge=18, le=23)]


class DynamicShapes(Frozen):
    """Any number of rows and tokens."""

    kind: Literal["dynamic"]


class StaticShapes(Frozen):
    """One number of rows and one of tokens, for compilers that plan for one shape (NPUs, TensorRT):
    standard operators alone, each dimension a number. Fewer rows and tokens are padded."""

    kind: Literal["static"]
    batch: Count = Field(1, description="Rows of a batch.")
    length: Annotated[Int, Field(ge=2)] = Field(
        description="Tokens of a row; of a language model, of prompt and answer together."
    )


Shapes = Annotated[Annotated[DynamicShapes | StaticShapes, Field(discriminator="kind")], SHORTHAND]


class Export(Frozen):
    """Graphs made from the student, and GGUF files beside them. The last graph is shipped."""

    backend: Literal["auto", "genai", "dynamo"] = Field(
        "auto",
        description="Graph builder: GenAI's (fused attention, few architectures) or torch's "
        "exporter; auto reports its choice and the reason.",
    )
    opset: Opset | None = Field(
        None,
        description="ONNX operator set of the graphs, backend dynamo only; default: the "
        "exporter's own choice.",
    )
    shapes: Shapes = Field(
        DynamicShapes(kind="dynamic"),
        description="Whether the graphs take any number of rows and tokens, or one of each "
        "(backend dynamo; for other runtimes).",
    )
    adapters: Literal["merged", "separate"] = Field(
        "merged",
        description="What becomes of a LoRA student's adapter: merged into the weights, or a file "
        "beside its base, which then serves others too "
        "(of all forms but int8-static, whose ranges are those of one student).",
    )
    provider: Provider = Field(
        "cpu",
        description="Execution provider the forms are made for; on cuda all but fp32, the "
        "reference on the CPU, compute in fp16.",
    )
    forms: tuple[_AnyForm, ...] = Field(
        (Fp32Form(kind="fp32"), Int8WeightForm(kind="int8-weight")),
        min_length=1,
        description="Forms by name, fp32 first; the last one that is no GGUF is shipped.",
    )
    mixed: Mixed = Field(
        MixedByRule(kind="rule"), description="Which matrices of int4-weight keep 8 bits."
    )
    recover: Recover | None = Field(
        None, description="What to try when rounding costs too much; default: nothing."
    )

    @property
    def graphs(self) -> tuple[Form, ...]:
        """The forms that are ONNX graphs."""
        return tuple(form for form in self.forms if not isinstance(form, GgufForm))

    @property
    def ggufs(self) -> tuple[GgufForm, ...]:
        """The forms that are GGUF files."""
        return tuple(form for form in self.forms if isinstance(form, GgufForm))
