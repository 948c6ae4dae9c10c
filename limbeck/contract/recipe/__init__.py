"""What a run may ask for: the recipe, a frozen tree of choices, and its reader, which reports every mistake at once.

Knows nothing of torch, onnx, or where files live (see `limbeck.contract.sources`). Encoders have trees of their own in `limbeck.contract.recipe.encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.base import (
    BaseRecipe,
    Count,
    Float,
    Fraction,
    Frozen,
    Int,
    Name,
    Positive,
    fingerprint,
)
from limbeck.contract.recipe.bench import (
    ArtifactTarget,
    Bench,
    ColdScenario,
    CompiledRuntime,
    ExtraRuntime,
    Gates,
    GenaiRuntime,
    OfflineScenario,
    OpenAiRuntime,
    Scenario,
    ServerScenario,
    ServerTarget,
    SingleScenario,
    Slo,
    UrlTarget,
)
from limbeck.contract.recipe.budget import (
    AnyBudget,
    Budget,
    ClassificationBudget,
    EmbeddingBudget,
    EncoderSpace,
    QualityBudget,
    Space,
)
from limbeck.contract.recipe.checks import contradictions
from limbeck.contract.recipe.distillation import (
    Calibration,
    CaMkdWeights,
    CorrectedEntropyWeights,
    Divergence,
    EbkdWeights,
    EntropyWeights,
    Features,
    FittedCalibration,
    FixedCalibration,
    ForwardKl,
    FreshStudent,
    Fusion,
    Granularity,
    HiddenCache,
    InverseEntropyWeights,
    Jsd,
    LabelWeights,
    LoraStudent,
    NoCache,
    NoCalibration,
    PosteriorWeights,
    ReverseKl,
    ShrinkStudent,
    Sizes,
    SkewKl,
    StaticWeights,
    Student,
    TeacherCache,
    TopkCache,
    Training,
    UniformWeights,
    Weights,
)
from limbeck.contract.recipe.export import (
    NO_KERNEL,
    DynamicShapes,
    Export,
    Form,
    Fp16Form,
    Fp32Form,
    Int4WeightForm,
    Int8DynamicForm,
    Int8StaticForm,
    Int8TrtForm,
    Int8WeightForm,
    Mixed,
    MixedByLoss,
    MixedByRule,
    MixedBySize,
    Opset,
    Provider,
    Recover,
    Shapes,
    StaticShapes,
)
from limbeck.contract.recipe.inputs import (
    BaseSource,
    ChatRows,
    Data,
    DatasetText,
    Domain,
    FileText,
    GgufModel,
    Heldout,
    HubModel,
    JsonLines,
    LocalModel,
    MailText,
    ModelSource,
    NpmText,
    PackageModel,
    PackageText,
    ParquetRows,
    PlainText,
    PythonStrings,
    RandomModel,
    RecipeModel,
    RowFormat,
    Rows,
    StdlibText,
    Teacher,
    TextFormat,
    TextSource,
)
from limbeck.contract.recipe.reading import (
    apply_override,
    find_recipe,
    parse_as,
    portable_reference,
    read_tree,
    shipped_recipes,
)

__all__ = [
    "NO_KERNEL",
    "AnyBudget",
    "ArtifactTarget",
    "BaseRecipe",
    "BaseSource",
    "Bench",
    "Budget",
    "CaMkdWeights",
    "Calibration",
    "ChatRows",
    "ClassificationBudget",
    "ColdScenario",
    "CompiledRuntime",
    "CorrectedEntropyWeights",
    "Count",
    "Data",
    "DatasetText",
    "Divergence",
    "Domain",
    "DynamicShapes",
    "EbkdWeights",
    "EmbeddingBudget",
    "EncoderSpace",
    "EntropyWeights",
    "Export",
    "ExtraRuntime",
    "Features",
    "FileText",
    "FittedCalibration",
    "FixedCalibration",
    "Float",
    "Form",
    "ForwardKl",
    "Fp16Form",
    "Fp32Form",
    "Fraction",
    "FreshStudent",
    "Frozen",
    "Fusion",
    "Gates",
    "GenaiRuntime",
    "GgufModel",
    "Granularity",
    "Heldout",
    "HiddenCache",
    "HubModel",
    "Int",
    "Int4WeightForm",
    "Int8DynamicForm",
    "Int8StaticForm",
    "Int8TrtForm",
    "Int8WeightForm",
    "InverseEntropyWeights",
    "Jsd",
    "JsonLines",
    "LabelWeights",
    "LocalModel",
    "LoraStudent",
    "MailText",
    "Mixed",
    "MixedByLoss",
    "MixedByRule",
    "MixedBySize",
    "ModelSource",
    "Name",
    "NoCache",
    "NoCalibration",
    "NpmText",
    "OfflineScenario",
    "OpenAiRuntime",
    "Opset",
    "PackageModel",
    "PackageText",
    "ParquetRows",
    "PlainText",
    "Positive",
    "PosteriorWeights",
    "Provider",
    "PythonStrings",
    "QualityBudget",
    "RandomModel",
    "Recipe",
    "RecipeModel",
    "Recover",
    "ReverseKl",
    "RowFormat",
    "Rows",
    "Scenario",
    "ServerScenario",
    "ServerTarget",
    "Shapes",
    "ShrinkStudent",
    "SingleScenario",
    "Sizes",
    "SkewKl",
    "Slo",
    "Space",
    "StaticShapes",
    "StaticWeights",
    "StdlibText",
    "Student",
    "Teacher",
    "TeacherCache",
    "TextFormat",
    "TextSource",
    "TopkCache",
    "Training",
    "UniformWeights",
    "UrlTarget",
    "Weights",
    "find_recipe",
    "fingerprint",
    "load_bench",
    "load_recipe",
    "parse_as",
    "parse_recipe",
    "portable_reference",
    "read_tree",
    "shipped_recipes",
]


class Recipe(BaseRecipe):
    """Several teachers, one student, and what must hold before it ships. Of a language model; see `limbeck.contract.recipe.encoder`."""

    task: Literal["causal-lm"] = Field("causal-lm", description="What the student does.")
    teachers: tuple[Teacher, ...] = Field((), description="Teachers; none is plain fine-tuning.")
    data: Data = Field(description="Training and held-out text.")
    student: Student = Field(description="What is trained.")
    fusion: Fusion = Field(
        Fusion(), description="How the teachers are mixed; of no effect without teachers."
    )
    features: Features = Field(
        Features(), description="Feature alignment; of no effect without teachers."
    )
    training: Training = Field(description="The loop.")
    export: Export = Field(Export(), description="Graphs made from the student.")
    bench: Bench = Field(Bench(), description="What is measured.")
    gates: Gates = Field(Gates(), description="What the shipped form must meet.")
    budget: Budget | None = Field(
        None, description="What `limbeck search` must keep to; of no effect elsewhere."
    )
    search: Space = Field(
        Space(), description="What `limbeck search` looks among; of no effect elsewhere."
    )

    def distillation(self) -> dict[str, Any]:
        """The part of `resolved` that decides the student's weights."""
        whole = self.resolved()
        return {
            key: whole[key]
            for key in (
                "name",
                "seed",
                "teachers",
                "data",
                "student",
                "fusion",
                "features",
                "training",
            )
        }


def load_recipe(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> Recipe:
    """Read a language model's recipe: a file, or a shipped recipe by name, with ``key=value`` overrides applied last.

    Relative references start from ``folder`` (default: the working directory).
    Raises `RecipeError` listing every mistake with its YAML path and the remedy.
    """
    path, text, tree = read_tree(reference, overrides=overrides, folder=folder)
    recipe = parse_recipe(tree, where=str(path))
    recipe._folder, recipe._text = path.parent, text
    return recipe


def load_bench(overrides: Sequence[str] = ()) -> Bench:
    """The `bench:` part of a recipe by itself: defaults, with ``bench.key=value`` overrides. Raises `RecipeError`."""
    part: dict[str, Any] = {"bench": {"minutes": 1.0}}
    for override in overrides:
        if not override.startswith("bench."):
            raise RecipeError(
                f"--set {override}: without a recipe there is only bench to set, for example bench.minutes=5."
            )
        apply_override(part, override, Path("bench"))
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
            "encoders have plan, run, search, compress, export, bench, report and verify."
        )
    return parse_as(Recipe, tree, where=where, contradictions=contradictions)
