"""Measurements, and the gates that must hold before the student ships."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from limbeck.contract.errors import DataError
from limbeck.contract.recipe.base import (
    SHORTHAND,
    Address,
    Count,
    Float,
    Fraction,
    Frozen,
    Int,
    KeyVariable,
    Positive,
    Threads,
)
from limbeck.contract.recipe.export import Provider

Evaluation = Literal["facts", "last_word", "next_line", "next_line_tokens"]


class SingleScenario(Frozen):
    """One stream: a prompt, then decoding; all arms interleaved in mirrored blocks. Timing gates
    are judged on it."""

    kind: Literal["single"]


class OfflineScenario(Frozen):
    """Throughput of batches over a grid of sizes: the shipped form, the fp32 graph and the fastest
    teacher, interleaved."""

    kind: Literal["offline"]
    batches: tuple[Count, ...] = Field((1, 8), min_length=1, description="Rows generated at once.")
    prompts: tuple[Count, ...] = Field(
        (128,), min_length=1, description="Tokens of every row's prompt."
    )
    outputs: tuple[Annotated[Int, Field(ge=2)], ...] = Field(
        (32,), min_length=1, description="Tokens generated after every row's prompt."
    )
    blocks: Count = Field(
        6, description="Most mirrored blocks a cell of the grid; fewer than 6 give no interval."
    )
    minutes: Positive = Field(
        3.0, description="Budget; every cell gets one block, however long it takes."
    )


class ArtifactTarget(Frozen):
    """The exported folder of this run, behind `limbeck serve` in a process of its own."""

    kind: Literal["artifact"]


class UrlTarget(Frozen):
    """Any server with an OpenAI-compatible completions endpoint that streams."""

    kind: Literal["url"]
    url: Address = Field(pattern=r"^https?://", description="Address up to and without /v1.")
    model: str | None = Field(
        None, description="Name of the model there; default: the first that it lists."
    )
    key_variable: KeyVariable = "OPENAI_API_KEY"


ServerTarget = Annotated[
    Annotated[ArtifactTarget | UrlTarget, Field(discriminator="kind")], SHORTHAND
]


class Slo(Frozen):
    """Latency promised to a served request, counted from its scheduled arrival."""

    ttft_ms: Positive = Field(1000.0, description="Longest time to the first token, in ms.")
    tpot_ms: Positive = Field(50.0, description="Longest time per output token after it, in ms.")
    share: Float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of the requests that must meet both for a rate to count.",
    )


class ServerScenario(Frozen):
    """Open loop: requests arrive at random (Poisson), whether or not earlier ones are answered. The
    result is the highest rate that holds."""

    kind: Literal["server"]
    target: ServerTarget = Field(ArtifactTarget(kind="artifact"), description="What is asked.")
    slo: Slo = Field(Slo(), description="What each request is promised.")
    requests: Count = Field(48, description="Arrivals at each rate; p99 needs 473, p95 93, p90 46.")
    first_rate: Positive | None = Field(
        None,
        description="Requests/s tried first; default: half the rate of one request after another.",
    )
    bisections: Int = Field(
        3, ge=0, description="Rates tried between the last that holds and the first that does not."
    )
    minutes: Positive = Field(5.0, description="Budget; a rate that was begun is finished.")


class ColdScenario(Frozen):
    """A fresh process each time: interpreter, imports, loading, first and second token; files in
    the page cache."""

    kind: Literal["cold"]
    repeats: Count = Field(
        6, description="Fresh processes an arm, interleaved; fewer than 6 give no interval."
    )
    minutes: Positive = Field(
        3.0, description="Budget; every arm starts once, however long it takes."
    )


Scenario = Annotated[
    Annotated[
        SingleScenario | OfflineScenario | ServerScenario | ColdScenario,
        Field(discriminator="kind"),
    ],
    SHORTHAND,
]


class GenaiRuntime(Frozen):
    """The shipped form under ONNX Runtime GenAI's own generation loop."""

    kind: Literal["onnxruntime-genai"]


class CompiledRuntime(Frozen):
    """The student under torch.compile with a static cache; needs a C++ compiler on a CPU."""

    kind: Literal["torch-compile"]


class OpenAiRuntime(Frozen):
    """A model behind an OpenAI-compatible URL, one request after another. It has to take token ids
    and `ignore_eos`."""

    kind: Literal["openai"]
    url: Address = Field(pattern=r"^https?://", description="Address up to and without /v1.")
    model: str | None = Field(
        None, description="Name of the model there; default: the first that it lists."
    )
    key_variable: KeyVariable = "OPENAI_API_KEY"


ExtraRuntime = Annotated[
    Annotated[GenaiRuntime | CompiledRuntime | OpenAiRuntime, Field(discriminator="kind")],
    SHORTHAND,
]


class Bench(Frozen):
    """Measurements before the verdict."""

    scenarios: tuple[Scenario, ...] = Field(
        (SingleScenario(kind="single"),),
        description="`single`, always, and any of `offline`, `server`, `cold`; each by name or "
        "with its own fields.",
    )
    runtimes: tuple[ExtraRuntime, ...] = Field(
        (),
        description="Further runtimes, timed beside the shipped form in `single`; not scored, not "
        "judged.",
    )
    device: Provider | None = Field(
        None,
        description="Where models run in torch; default: where the shipped form runs "
        "(export.provider).",
    )
    torch_dtype: Literal["fp32", "bf16"] | None = Field(
        None,
        description="Number type of student and teachers in torch; default: fp32, and each "
        "teacher's own.",
    )
    prompt_tokens: Count = Field(128, description="Tokens of the prompt.")
    new_tokens: Int = Field(64, ge=2, description="Tokens generated after it.")
    threads: Threads | None = Field(
        None, description="CPU threads of every arm; default: every core available."
    )
    min_blocks: Int = Field(
        6, ge=3, description="Fewest mirrored blocks (A B C C B A) before a verdict."
    )
    minutes: Positive = Field(
        4.0, description="Budget for timing; blocks go on until gates are decided or it is spent."
    )

    def scenario(self, kind: str) -> Any:
        """The scenario of one kind, or None if the recipe does not ask for it."""
        return next((scenario for scenario in self.scenarios if scenario.kind == kind), None)

    def require_context(self, context: int | None, model: str) -> None:
        """Raise `DataError` if a prompt and its answer do not fit into ``context`` tokens.

        ``model`` names the model in the error. None: its context is unknown.
        """
        wanted = [("bench.prompt_tokens", self.prompt_tokens, "bench.new_tokens", self.new_tokens)]
        if (grid := self.scenario("offline")) is not None:
            prompt, output = max(grid.prompts), max(grid.outputs)
            wanted.append(("the longest of offline's prompts", prompt, "of its outputs", output))
        for prompts, asked, outputs, new in wanted:
            if context is not None and asked + new > context:
                raise DataError(
                    f"{prompts} ({asked}) and {outputs} ({new}) come to {asked + new} tokens; "
                    f"the context of {model} is {context}. Make either smaller, with "
                    "--set bench.prompt_tokens=… or bench.new_tokens=…."
                )


class Gates(Frozen):
    """Gates of the shipped form. A gate that is not named is not checked."""

    min_decode_speedup: Positive | None = Field(
        None,
        description="Decode tokens/s over the fastest teacher in torch eager: least ratio, whole "
        "interval.",
    )
    max_quantization_loss: Annotated[Float, Field(ge=0)] | None = Field(
        None,
        description="Largest relative rise of held-out NLL over the fp32 graph of the student as "
        "it was distilled, of the shipped form; and of every GGUF file over the student in torch.",
    )
    max_size_ratio: Positive | None = Field(
        None, description="Largest size on disk over the fp32 graph's."
    )
    max_loss_vs_best_teacher: Float | None = Field(
        None,
        description="Largest relative rise of the domains' mean NLL over the best single "
        "teacher's; 0: none.",
    )
    max_size_mb: Positive | None = Field(
        None, description="Largest size on disk of graph and weights, in MB (1e6 bytes)."
    )
    max_forgetting: Annotated[Float, Field(ge=0)] | None = Field(
        None,
        description="Largest relative rise of loss over the student's base, on prose and Python "
        "code that come with Python.",
    )
    min_task: dict[Evaluation, Fraction] | None = Field(
        None, description="Least share of right answers, by evaluation."
    )
    max_task_loss: Fraction | None = Field(
        None,
        description="Largest fall of any evaluation's share of right answers below the best "
        "teacher's; 0.05 is 5 answers of 100.",
    )
    max_tpot_ms: Positive | None = Field(
        None, description="Largest median time per output token, in ms."
    )
    max_ttft_ms: Positive | None = Field(
        None, description="Largest median time to first token, in ms."
    )
