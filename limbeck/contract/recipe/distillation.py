"""How the student is made: its kind, the fusion of its teachers, the loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from limbeck.contract.recipe.base import Count, Float, Fraction, Frozen, Positive, Threads
from limbeck.contract.recipe.inputs import BaseSource, NoCache, TeacherCache, TextSource

# Students -----------------------------------------------------------------------------------------


Init = Literal["auto", "merge", "base"]
_INIT = (
    "Where the training starts: from the base as it is (`base`), from the teachers merged into it "
    "(`merge`, for teachers of the base's shape), or from whichever of these reads the training "
    "text best (`auto`)."
)


class LoraStudent(Frozen):
    """Low-rank adapters on a base model, merged at the end; the adapter is kept too."""

    kind: Literal["lora"]
    base: BaseSource = Field(description="Model the adapters sit on.")
    rank: Count = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapters' input.")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Module names adapted."
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="bitsandbytes form of the frozen base while training (QLoRA); merged into the "
        "fp32 base.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")
    init: Init = Field("auto", description=_INIT)


class FreshStudent(Frozen):
    """A new model of any configuration, with the tokenizer of the first teacher."""

    kind: Literal["fresh"]
    config: dict[str, Any] = Field(
        description="transformers configuration: model_type and its sizes."
    )


class Sizes(Frozen):
    """Parts of the base that a cut student keeps."""

    layers: Count | None = Field(None, description="Hidden layers kept; default: all.")
    intermediate_size: Count | None = Field(
        None, description="FFN neurons kept in each layer; default: all."
    )
    kv_heads: Count | None = Field(
        None, description="Key/value head groups kept in each layer; default: all."
    )
    hidden_size: Count | None = Field(None, description="Hidden channels kept; default: all.")
    round_to: Count = Field(
        32, description="FFN and hidden sizes are rounded down to a multiple of this."
    )


class ShrinkStudent(Sizes):
    """A smaller model cut out of a base by importance on the training text, then healed by
    distillation."""

    kind: Literal["shrink"]
    base: BaseSource = Field(description="Model it is cut out of.")
    calibration_blocks: Count = Field(
        32, description="Training blocks that importance is measured on."
    )
    init: Init = Field("auto", description=_INIT)


class MergeStudent(Frozen):
    """The teachers merged into their base, and no training: `training` is of no effect.

    Worth trying first where teachers share a base: it costs a minute.
    """

    kind: Literal["merge"]
    base: BaseSource = Field(description="Model that the teachers were made from.")
    method: Literal["auto", "average", "ties", "dare_ties", "svd"] = Field(
        "auto", description="How; auto takes the merge that reads the training text best."
    )
    weights: dict[str, Float] | None = Field(
        None, description="Weight by teacher name; by default equal ones that sum to 1."
    )
    density: Fraction = Field(
        0.5, gt=0, lt=1, description="Share of each difference that ties and dare_ties keep."
    )
    rank: Count = Field(16, description="Singular values that svd keeps of each matrix's change.")


Student = Annotated[
    LoraStudent | ShrinkStudent | FreshStudent | MergeStudent, Field(discriminator="kind")
]


# Fusion -------------------------------------------------------------------------------------------

Granularity = Literal["token", "sequence", "batch"]
EntropySpan = Annotated[Granularity, Field(description="Span over which the entropy is averaged.")]
SurpriseSpan = Annotated[
    Granularity, Field(description="Span over which the label's surprise is averaged.")
]
Sharpness = Annotated[
    Positive, Field(description="Softmax temperature, in nats; smaller is sharper.")
]
Floor = Annotated[Fraction, Field(description="Share spread evenly over all teachers.")]


class UniformWeights(Frozen):
    """Every teacher counts the same."""

    kind: Literal["uniform"]


class StaticWeights(Frozen):
    """Fixed weights by teacher name."""

    kind: Literal["static"]
    values: dict[str, Annotated[Float, Field(ge=0)]] = Field(
        description="Weight by teacher name; scaled to sum to 1."
    )


class EntropyWeights(Frozen):
    """The paper's form: (1 - floor) softmax(-H / sharpness) + floor / K."""

    kind: Literal["entropy"]
    granularity: EntropySpan = "token"
    sharpness: Sharpness = 0.3
    floor: Floor = 0.05
    warmup: Fraction = Field(
        0.0, description="Share of the training over which weights move from uniform."
    )
    control: Literal["none", "inverted", "shuffled"] = Field(
        "none",
        description="Controls of the honesty ablation: the sign flipped, or weights shuffled over "
        "positions.",
    )


class InverseEntropyWeights(Frozen):
    """Proportional to 1 / (H + 0.01 nats)."""

    kind: Literal["inverse_entropy"]
    granularity: EntropySpan = "token"
    floor: Floor = 0.0


class EbkdWeights(Frozen):
    """(1 - H_k / sum H) / (K - 1), with 0.01 nats added to each H."""

    kind: Literal["ebkd"]
    granularity: EntropySpan = "token"


class CaMkdWeights(Frozen):
    """Confidence by label: (1 - softmax(CE)_k) / (K - 1), after CA-MKD (arXiv 2201.00007)."""

    kind: Literal["ca_mkd"]
    granularity: SurpriseSpan = "token"


class LabelWeights(Frozen):
    """Softmax of the teachers' label log-likelihood. Looks at the label it teaches, so it is not
    causal."""

    kind: Literal["label"]
    granularity: SurpriseSpan = "sequence"
    sharpness: Sharpness = 0.1
    floor: Floor = 0.0


class CorrectedEntropyWeights(Frozen):
    """Entropy plus the teacher's overconfidence on the same text (mean label surprise - mean
    entropy)."""

    kind: Literal["corrected_entropy"]
    sharpness: Sharpness = 0.3
    floor: Floor = 0.05


class PosteriorWeights(Frozen):
    """Causal posterior over teachers: label likelihood of the earlier tokens as evidence; prior
    uniform, by domain, or by this token's entropy."""

    kind: Literal["posterior"]
    evidence: Positive = Field(1.0, description="Power of the likelihood; 1 is Bayes' rule.")
    prior: dict[str, dict[str, Annotated[Float, Field(ge=0)]]] = Field(
        {},
        description="Prior weight by domain and teacher, such as {code: {python: 1}}; a teacher "
        "that its domain does not name has weight 0, and a domain that is not named is uniform.",
    )
    entropy: Annotated[Float, Field(ge=0)] = Field(
        0.0, description="Weight of -H in the log prior, a nat."
    )
    floor: Floor = 0.0


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
    """KL(student || teachers): avoid outputs that the teachers do not give."""

    kind: Literal["reverse_kl"]


class Jsd(Frozen):
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p +
    (1 - beta) q."""

    kind: Literal["jsd"]
    beta: Float = Field(0.5, gt=0, lt=1, description="Share of the teachers in the mixture.")


class SkewKl(Frozen):
    """KL(p || skew p + (1 - skew) q)."""

    kind: Literal["skew_kl"]
    skew: Float = Field(
        0.1, ge=0, lt=1, description="Share of the teachers mixed into the student."
    )


class EntropySwitch(Frozen):
    """Forward KL where the fused target is uncertain, reverse KL elsewhere (arXiv 2603.07079)."""

    kind: Literal["entropy_switch"]
    threshold: Annotated[Float, Field(ge=0)] = Field(
        1.0, description="Entropy of the fused target, in nats, from which forward KL is used."
    )


Divergence = Annotated[
    ForwardKl | ReverseKl | Jsd | SkewKl | EntropySwitch, Field(discriminator="kind")
]


class FittedCalibration(Frozen):
    """One temperature a teacher, by least held-out NLL."""

    kind: Literal["fit"]
    bounds: tuple[Positive, Positive] = Field(
        (0.5, 2.0), description="Least and greatest temperature."
    )


class FixedCalibration(Frozen):
    """Temperatures given by hand."""

    kind: Literal["fixed"]
    values: dict[str, Positive] = Field(description="Temperature by teacher name.")


class NoCalibration(Frozen):
    """Teachers are taken as they are: temperature 1."""

    kind: Literal["none"]


Calibration = Annotated[
    FittedCalibration | FixedCalibration | NoCalibration, Field(discriminator="kind")
]


class Fusion(Frozen):
    """How K teacher distributions become one target: loss = cross_entropy * CE + weight * tau^2 * D
    / N."""

    space: Literal["arithmetic", "geometric"] = Field(
        "arithmetic", description="Mix probabilities, or logarithms of probabilities."
    )
    weights: Weights = Field(
        PosteriorWeights(kind="posterior"), description="How much each teacher counts, and where."
    )
    divergence: Divergence = Field(
        ForwardKl(kind="forward_kl"), description="Distance from target to student."
    )
    temperature: Positive = Field(
        1.0, description="Softening tau of teachers and student; the loss is scaled by its square."
    )
    calibration: Calibration = Field(
        FittedCalibration(kind="fit"), description="Scalar calibration of each teacher."
    )
    weight: Annotated[Float, Field(ge=0)] = Field(0.7, description="Factor of the fusion loss.")
    cross_entropy: Annotated[Float, Field(ge=0)] = Field(
        0.3, description="Factor of the label's cross-entropy."
    )
    across: Literal["auto", "projected", "chunk", "uld"] = Field(
        "auto",
        description="Loss against teachers with another tokenizer than the student's: their "
        "distribution projected into the student's vocabulary, the likelihood of each chunk of "
        "text (ALM), or sorted probabilities (ULD, a baseline). auto is chunk, and projected for "
        "a teacher that has the student's tokens.",
    )
    chunk: Count = Field(
        256, description="Token positions worked on at a time; memory grows with it."
    )


class Features(Frozen):
    """Feature alignment: projected student states against each teacher's, in the fusion's
    weights."""

    weight: Annotated[Float, Field(ge=0)] = Field(
        0.1, description="Factor of the feature loss; 0 turns it off."
    )
    pairs: Count = Field(
        4, description="Layer pairs aligned, spread evenly over depth, the last included."
    )
    layers: tuple[tuple[Count, Count], ...] | None = Field(
        None,
        description="Explicit (student layer, teacher layer) pairs, counted from 1; replaces "
        "`pairs`.",
    )
    distance: Literal["cosine", "mse"] = Field(
        "cosine", description="1 - cosine, or MSE of layer-normed states."
    )
    warmup: Fraction = Field(
        0.0, description="Share of the training over which the weight rises from 0."
    )


# Training -----------------------------------------------------------------------------------------


class OwnPrompts(Frozen):
    """How the rows that the student writes begin."""

    tokens: Count = Field(
        32,
        description="Tokens of a prompt: the first ones of a training block, or of a document of "
        "`text`. In a block of a chat the prompt ends where the first answer begins.",
    )
    text: TextSource | None = Field(
        None,
        description="Text whose documents are the prompts; default: the training blocks that the "
        "rows replace.",
    )


class OnPolicy(Frozen):
    """Rows of a batch that the student writes itself and the teachers read (GKD, arXiv 2306.13649).

    The student learns from the teachers' distributions on them; cross-entropy counts on corpus
    rows only.
    """

    share: Fraction = Field(
        0.5, description="Share of the rows that the student writes; 0 writes none."
    )
    prompts: OwnPrompts = Field(OwnPrompts(), description="How these rows begin.")
    new_tokens: Count = Field(
        128,
        description="Most tokens written after a prompt. A row ends at data.block, or earlier with "
        "the end-of-text token.",
    )
    temperature: Positive = Field(1.0, description="Sampling temperature.")
    top_p: Fraction = Field(
        1.0,
        gt=0,
        description="Sample among the likeliest tokens that hold this share of the probability.",
    )
    every: Count = Field(1, description="Write in every n-th step; the other steps read text only.")
    batch: Count = Field(
        16,
        description="Rows written at a time; changes memory and time, and the result by rounding "
        "alone.",
    )


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
    Field(
        description="Experiment trackers that get the numbers of the log too, beside the student "
        "and offline unless their own environment variables say otherwise; each needs its package."
    ),
]


class Training(Frozen):
    """The one loop."""

    tokens: Count | None = Field(
        None, description="Training budget, in tokens of full blocks; or give `minutes`."
    )
    minutes: Positive | None = Field(
        None,
        description="Training budget, in minutes; such a run is not repeatable to the bit. Or give "
        "`tokens`.",
    )
    batch_tokens: Count = Field(
        1024, description="Tokens in one optimiser step; a multiple of data.block."
    )
    micro_batch: Count = Field(
        4, description="Blocks in one forward pass; changes memory, not the result."
    )
    learning_rate: Positive = Field(1e-3, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay after the warm-up."
    )
    warmup: Fraction = Field(
        0.1, description="Share of the steps over which the learning rate rises from 0."
    )
    weight_decay: Annotated[Float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    clip: Positive = Field(1.0, description="Largest gradient norm.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Number type of the forward pass; auto is bf16 where the processor or GPU "
        "computes it, else fp32; fp16 is too narrow for gradients.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to train; auto takes a GPU if present."
    )
    threads: Threads | None = Field(
        None, description="CPU threads; default: every core this process may use."
    )
    teacher_cache: TeacherCache = Field(
        NoCache(kind="none"),
        description="Run each teacher once over the text and keep its outputs for later runs.",
    )
    on_policy: OnPolicy | None = Field(
        None, description="Let the student write part of each batch; default: it reads text only."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    evaluate_every: Count = Field(20, description="Steps between measurements on held-out text.")
    checkpoint_every: Count = Field(
        20, description="Steps between checkpoints of a run that may be interrupted."
    )
    patience: Count | None = Field(
        None, description="Measurements without a better held-out NLL before stopping."
    )
    trackers: Trackers = ()
