"""Recipes of encoders: classifiers and sentence encoders, several teachers into one small student.

The sibling of `limbeck.contract.recipe.language`. `limbeck.contract.recipe.tasks` chooses between
them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from limbeck.contract.errors import DataError
from limbeck.contract.recipe.base import (
    SHORTHAND,
    Count,
    Float,
    Fraction,
    Frozen,
    Int,
    Name,
    Positive,
    Threads,
)
from limbeck.contract.recipe.budget import ClassificationBudget, EmbeddingBudget, EncoderSpace
from limbeck.contract.recipe.distillation import (
    CaMkdWeights,
    EbkdWeights,
    EntropyWeights,
    FreshStudent,
    Fusion,
    InverseEntropyWeights,
    LabelWeights,
    Sizes,
    StaticWeights,
    Trackers,
    UniformWeights,
)
from limbeck.contract.recipe.export import (
    DynamicShapes,
    Fp32Form,
    Int8DynamicForm,
    Int8StaticForm,
    Int8WeightForm,
    Opset,
    Shapes,
)
from limbeck.contract.recipe.inputs import (
    Domain,
    HubModel,
    LocalModel,
    OnnxModel,
    PackageModel,
    RandomModel,
    RecipeModel,
    TextSource,
)
from limbeck.contract.recipe.root import BaseRecipe

# Where encoders come from -------------------------------------------------------------------------


EncoderSource = Annotated[
    HubModel | LocalModel | PackageModel | OnnxModel | RandomModel, Field(discriminator="kind")
]
AnyEncoderSource = Annotated[
    HubModel | LocalModel | PackageModel | OnnxModel | RandomModel | RecipeModel,
    Field(discriminator="kind"),
]


class EncoderTeacher(Frozen):
    """One teacher: a classifier of the recipe's classes."""

    name: Name = Field(description="Name in reports and in `static` weights.")
    model: AnyEncoderSource = Field(description="Where the weights come from.")


class EmbeddingTeacher(EncoderTeacher):
    """One teacher: a sentence encoder."""

    pooling: Literal["mean", "cls"] = Field(
        "mean", description="How token states become one vector."
    )


# Text ---------------------------------------------------------------------------------------------


class HeldoutExamples(Frozen):
    """Examples kept from training, at even distances through each class or domain."""

    every: Int = Field(5, ge=2, description="Every n-th example is held out.")
    most: Count = Field(
        500, description="Most held-out examples kept of a class or domain, spread evenly."
    )


class Class(Frozen):
    """One class and examples of it."""

    name: Name = Field(description="Name of the class: the label that the student gives.")
    text: TextSource = Field(description="Where its examples come from: each document is one.")
    most: Count | None = Field(
        None, description="Most examples taken, spread evenly; default: all."
    )


class LabelledData(Frozen):
    """Examples by class. Equal texts count once, so no text is both trained on and held out."""

    classes: tuple[Class, ...] = Field(
        min_length=2, description="The classes, in the order of the student's outputs."
    )
    max_tokens: Int = Field(
        128, ge=4, description="Tokens of an example that are read; the rest is cut off."
    )
    heldout: HeldoutExamples = Field(
        HeldoutExamples(), description="How held-out examples are chosen."
    )


class SentenceData(Frozen):
    """Unlabelled texts by domain."""

    domains: tuple[Domain, ...] = Field(min_length=1, description="Named kinds of text.")
    piece_chars: Int = Field(
        400, ge=16, description="Documents are cut into pieces of about this length, in characters."
    )
    most: Count | None = Field(
        None, description="Most pieces taken per domain, spread evenly; default: all."
    )
    max_tokens: Int = Field(
        128, ge=4, description="Tokens of a piece that are read; the rest is cut off."
    )
    heldout: HeldoutExamples = Field(
        HeldoutExamples(), description="How held-out pieces are chosen."
    )


# Students -----------------------------------------------------------------------------------------


class FullStudent(Frozen):
    """A base model, all of it trained."""

    kind: Literal["full"]
    base: EncoderSource = Field(description="Model that is trained.")


class EncoderShrinkStudent(Sizes):
    """A smaller encoder cut out of a base by importance on the training text; `kv_heads` counts
    attention heads."""

    kind: Literal["shrink"]
    base: EncoderSource = Field(description="Model it is cut out of.")
    calibration_examples: Count = Field(
        64, description="Training examples that importance is measured on."
    )


EncoderStudent = Annotated[
    FullStudent | EncoderShrinkStudent | FreshStudent, Field(discriminator="kind")
]


# Fusion -------------------------------------------------------------------------------------------


class ClassFusion(Fusion):
    """As of language models, over classes instead of the vocabulary: an example is one position, so
    `token` means example."""

    weights: Annotated[
        UniformWeights
        | StaticWeights
        | EntropyWeights
        | InverseEntropyWeights
        | EbkdWeights
        | CaMkdWeights
        | LabelWeights,
        Field(discriminator="kind"),
    ] = Field(
        EntropyWeights(kind="entropy"), description="How much each teacher counts, and where."
    )


class SimilarityFusion(Frozen):
    """How K embeddings become one target: loss = cosine * distance + relational * divergence of
    in-batch similarities."""

    weights: Annotated[
        UniformWeights | StaticWeights | EntropyWeights | InverseEntropyWeights | EbkdWeights,
        Field(discriminator="kind"),
    ] = Field(
        EntropyWeights(kind="entropy"),
        description="How much each teacher counts, and where; the entropy is that of an example's "
        "similarities in its batch.",
    )
    temperature: Positive = Field(
        0.05, description="Softmax temperature that turns cosine similarities into probabilities."
    )
    cosine: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="Factor of the distance to each teacher's embedding."
    )
    relational: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="Factor of the relational loss."
    )
    relation: Literal["kl", "mse"] = Field(
        "kl",
        description="KL between the similarity distributions of an example in its batch, or MSE "
        "between similarities.",
    )


# Training -----------------------------------------------------------------------------------------


class EncoderTraining(Frozen):
    """The loop over examples. Teachers run once, before it."""

    examples: Count = Field(
        description="Training budget, in examples; each pass over the data has an order of its own."
    )
    batch: Count = Field(32, description="Examples in one optimiser step, of any class or domain.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="Decay after the warm-up."
    )
    warmup: Fraction = Field(
        0.1, description="Share of the steps over which the learning rate rises from 0."
    )
    weight_decay: Annotated[Float, Field(ge=0)] = Field(0.01, description="AdamW weight decay.")
    clip: Positive = Field(1.0, description="Largest gradient norm.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; auto takes a GPU if present."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Number type of the forward pass; auto is bf16 where it is computed in "
        "hardware, else fp32.",
    )
    threads: Threads | None = Field(
        None, description="CPU threads; default: every core this process may use."
    )
    evaluate_every: Count = Field(
        50, description="Steps between measurements on held-out examples."
    )
    checkpoint_every: Count = Field(
        50, description="Steps between checkpoints of a run that may be interrupted."
    )
    trackers: Trackers = ()


# Export, measurement ------------------------------------------------------------------------------

EncoderForm = Annotated[
    Annotated[
        Fp32Form | Int8WeightForm | Int8DynamicForm | Int8StaticForm, Field(discriminator="kind")
    ],
    SHORTHAND,
]


class EncoderExport(Frozen):
    """Graphs made from the student. The last form is shipped."""

    forms: tuple[EncoderForm, ...] = Field(
        (Fp32Form(kind="fp32"), Int8DynamicForm(kind="int8-dynamic")),
        min_length=1,
        description="Forms by name, fp32 first; the last one is shipped.",
    )
    opset: Opset | None = Field(
        None, description="ONNX operator set of the graphs; default: the exporter's own choice."
    )
    shapes: Shapes = Field(
        DynamicShapes(kind="dynamic"),
        description="Whether a graph takes any number of rows and tokens, or one of each.",
    )

    @property
    def graphs(self) -> tuple[EncoderForm, ...]:
        """The forms that are ONNX graphs: all of them."""
        return self.forms

    @property
    def ggufs(self) -> tuple[()]:
        """Encoders have no GGUF files."""
        return ()


class EncoderBench(Frozen):
    """Batches through every arm, over a grid of sizes, interleaved; then held-out examples through
    the same processes."""

    batches: tuple[Count, ...] = Field(
        (1, 8, 32), min_length=1, description="Sequences of a batch."
    )
    lengths: tuple[Annotated[Int, Field(ge=4)], ...] = Field(
        (32, 128), min_length=1, description="Tokens of a sequence."
    )
    threads: Threads | None = Field(
        None, description="CPU threads of every arm; default: every core available."
    )
    min_blocks: Int = Field(
        6, ge=3, description="Fewest mirrored blocks (A B C C B A) before a verdict."
    )
    minutes: Positive = Field(
        3.0, description="Budget for timing; blocks go on until gates are decided or it is spent."
    )

    def require_context(self, context: int | None, model: str) -> None:
        """Raise `DataError` if the longest sequence does not fit into ``context`` tokens.

        ``model`` names the model in the error. None: its context is unknown.
        """
        if context is not None and max(self.lengths) > context:
            raise DataError(
                f"bench.lengths: found {max(self.lengths)}; {model} reads {context} tokens at "
                "most. Make it smaller."
            )


class ClassificationBench(EncoderBench):
    """As of every encoder, with the figure that quality is judged by."""

    metric: Literal["accuracy", "macro_f1"] = Field(
        "accuracy", description="Figure that the quality gates compare."
    )


class EncoderGates(Frozen):
    """Gates of the shipped form. A gate that is not named is not checked."""

    min_throughput_ratio: Positive | None = Field(
        None,
        description="Sequences/s over the better teacher in torch eager, geometric mean of the "
        "grid: least ratio, whole interval.",
    )
    max_metric_loss: Float | None = Field(
        None,
        description="Largest relative loss of the task's metric against the better teacher; 0.02 "
        "is 2 %.",
    )
    max_quantization_loss: Annotated[Float, Field(ge=0)] | None = Field(
        None,
        description="Largest relative loss of the task's metric against the fp32 graph of the same "
        "student.",
    )
    max_latency_ms: Positive | None = Field(
        None,
        description="Median time of one sequence at the largest of bench.lengths, in ms: most, "
        "whole interval.",
    )
    max_size_ratio: Positive | None = Field(
        None, description="Largest size on disk over the fp32 graph's."
    )
    max_size_mb: Positive | None = Field(
        None, description="Largest size on disk of graph and weights, in MB (1e6 bytes)."
    )


# Recipes ------------------------------------------------------------------------------------------


class BaseEncoderRecipe(BaseRecipe):
    """Fields of classifiers and sentence encoders, in the order in which recipes are written.

    Subclasses narrow the types of some; that does not move a field.
    """

    task: str = Field(description="What the student does.")
    teachers: tuple[EncoderTeacher, ...] = Field(description="Teachers.")
    data: LabelledData | SentenceData = Field(description="Training and held-out text.")
    student: EncoderStudent = Field(description="What is trained.")
    fusion: ClassFusion | SimilarityFusion = Field(description="How the teachers are mixed.")
    training: EncoderTraining = Field(description="The loop.")
    export: EncoderExport = Field(EncoderExport(), description="Graphs made from the student.")
    bench: EncoderBench = Field(EncoderBench(), description="What is measured.")
    gates: EncoderGates = Field(EncoderGates(), description="What the shipped form must meet.")
    budget: ClassificationBudget | EmbeddingBudget | None = Field(
        None, description="Bounds for `limbeck search`; no effect elsewhere."
    )
    search: EncoderSpace = Field(
        EncoderSpace(), description="What `limbeck search` looks among; of no effect elsewhere."
    )

    _decides_weights: ClassVar[tuple[str, ...]] = (
        "name",
        "seed",
        "task",
        "teachers",
        "data",
        "student",
        "fusion",
        "training",
    )

    @property
    def base(self) -> EncoderSource | None:
        """The model that the student starts from, or None for a fresh student."""
        return None if isinstance(self.student, FreshStudent) else self.student.base

    def limits(self) -> list[int | None]:
        """Most examples taken of every class or domain; None takes all."""
        raise NotImplementedError

    @property
    def piece_chars(self) -> int | None:
        """About how many characters of a document are one example; None: each document is one."""
        return None


class ClassificationRecipe(BaseEncoderRecipe):
    """Several classifiers into one small one. Without teachers: plain fine-tuning."""

    task: Literal["classification"] = Field(description="What the student does.")
    teachers: tuple[EncoderTeacher, ...] = Field(
        (), description="Teachers; without teachers it is plain fine-tuning."
    )
    data: LabelledData = Field(description="Training and held-out examples.")
    fusion: ClassFusion = Field(
        ClassFusion(), description="How the teachers are mixed; of no effect without teachers."
    )
    bench: ClassificationBench = Field(ClassificationBench(), description="What is measured.")
    budget: ClassificationBudget | None = Field(
        None, description="Bounds for `limbeck search`; no effect elsewhere."
    )

    def groups(self) -> list[tuple[str, str, TextSource]]:
        """Place in the recipe, name and text of every class, in order."""
        return [(f"data.classes.{i}.text", g.name, g.text) for i, g in enumerate(self.data.classes)]

    def limits(self) -> list[int | None]:
        """Most examples taken of every class; None takes all."""
        return [group.most for group in self.data.classes]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the student's outputs."""
        return tuple(group.name for group in self.data.classes)


class EmbeddingRecipe(BaseEncoderRecipe):
    """Several sentence encoders into one small one, whose vectors are mean-pooled and of
    length 1."""

    task: Literal["embedding"] = Field(description="What the student does.")
    teachers: tuple[EmbeddingTeacher, ...] = Field(min_length=1, description="Teachers.")
    data: SentenceData = Field(description="Training and held-out text.")
    fusion: SimilarityFusion = Field(SimilarityFusion(), description="How the teachers are mixed.")
    budget: EmbeddingBudget | None = Field(
        None, description="Bounds for `limbeck search`; no effect elsewhere."
    )

    def groups(self) -> list[tuple[str, str, TextSource]]:
        """Place in the recipe, name and text of every domain, in order."""
        return [(f"data.domains.{i}.text", g.name, g.text) for i, g in enumerate(self.data.domains)]

    def limits(self) -> list[int | None]:
        """Most pieces taken of every domain; None takes all."""
        return [self.data.most] * len(self.data.domains)

    @property
    def piece_chars(self) -> int | None:
        """About how many characters of a document are one example."""
        return self.data.piece_chars


EncoderRecipe = ClassificationRecipe | EmbeddingRecipe
