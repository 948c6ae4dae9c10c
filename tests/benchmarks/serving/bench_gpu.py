"""Decode and prefill on an NVIDIA card against torch in bf16, interleaved in one run.

Forms: fp16, and int8-weight and int4-weight with an fp16 body. Arms: torch eager, our loop on ONNX
Runtime with the cache on the card, ONNX Runtime GenAI's loop on the same files. Keys of the JSON
object: `tpot_ratio` and `ttft_ratio`, by arm, over torch's (medians of paired ratios); `ms`,
medians; `card` and versions. Without a card it says so and exits with 2.

With ``--dry`` a tiny random model runs on the CPU instead: that proves the program, and gives the
names of the arms and no times.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import Recipe

PROMPT, NEW, ROUNDS = 128, 64, 8
FORMS, DRY_FORMS = ("fp16", "int8-weight", "int4-weight"), ("int8-weight",)


def main() -> None:
    """Export SmolLM2-135M for CUDA, open the arms, and time them in turn."""
    import torch

    from limbeck.runtime.session import providers

    dry = "--dry" in sys.argv[1:]
    if not dry and not (torch.cuda.is_available() and "cuda" in providers()):
        print(
            f"bench-gpu: no NVIDIA card for torch {torch.__version__} "
            f"(cuda available: {torch.cuda.is_available()}) and onnxruntime "
            f"(providers: {', '.join(providers())}); "
            "run: pip install 'limbeck[gpu]' on a machine with a card.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from export import export_student
    from limbeck.runtime.decoder import Decoder

    forms, rounds = (DRY_FORMS, 1) if dry else (FORMS, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        student, recipe = tiny(root) if dry else smollm2(root)
        exported = export_student(student=student.path, out=root / "onnx", recipe=recipe)
        arms: dict[str, Callable[[list[int]], Iterator[int]]] = {
            "torch": torch_arm(student.path / "model", on_card=not dry)
        }
        vocabulary = 256 if dry else 49_000
        for form in forms:
            decoder = Decoder(exported.path, form=form)
            arms[f"{form} ort"] = lambda ids, decoder=decoder: decoder.generate(ids, NEW)  # type: ignore[misc]
            arms[f"{form} genai"] = genai_arm(
                exported.path, exported.result["forms"][form]["graph"]
            )
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for index in range(rounds + 2):
            ids = [(7919 * (index + 1) * at) % vocabulary for at in range(1, PROMPT + 1)]
            order = list(arms) if index % 2 else list(reversed(arms))
            for name in order:
                measured = timed(arms[name], ids)
                if index >= 2:  # two rounds warm up
                    times[name].append(measured)
        parity = {form: exported.result["forms"][form]["parity"]["kl"] for form in forms}
    found = {"dry": True, "arms": list(times)} if dry else summary(times) | {"kl": parity}
    print(json.dumps(found | machine()))


def smollm2(root: Path) -> tuple[Artifact, Recipe]:
    """The untrained student of the demo, and a recipe that exports it for CUDA."""
    from tests.benchmarks.smollm2 import demo_recipe, untrained_student

    forms = f"export.forms=[fp32, {', '.join(FORMS)}]"
    return untrained_student(root / "student"), demo_recipe("export.provider=cuda", forms)


def tiny(root: Path) -> tuple[Artifact, Recipe]:
    """A tiny random student, and a recipe that exports it for the CPU."""
    from tests.architectures import SIZES
    from tests.pico import make_model, make_student, pico_recipe

    sizes = SIZES["llama"] | {"max_position_embeddings": 256}
    model = make_model(root / "model", model_type="llama", **sizes)
    recipe = pico_recipe(export={"forms": ["fp32", *DRY_FORMS]})
    return make_student(root / "student", model), recipe


def timed(arm: Callable[[list[int]], Iterator[int]], ids: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and a token after it."""
    started = time.perf_counter()
    stamps = [time.perf_counter() for _ in arm(ids)]
    if len(stamps) != NEW:
        raise SystemExit(f"bench-gpu: an arm gave {len(stamps)} tokens instead of {NEW}")
    return stamps[0] - started, (stamps[-1] - stamps[0]) / (NEW - 1)


def torch_arm(model: Path, *, on_card: bool) -> Callable[[list[int]], Iterator[int]]:
    """The transformers model in bf16 on the card, greedy; every token is read back."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if on_card else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()

    def generate(ids: list[int]) -> Iterator[int]:
        with torch.inference_mode():
            out = loaded(torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
            for count in range(NEW):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                yield int(token)
                if count < NEW - 1:
                    out = loaded(
                        token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
                    )

    return generate


def genai_arm(folder: Path, graph: str) -> Callable[[list[int]], Iterator[int]]:
    """GenAI's own loop on ``graph`` of the exported ``folder``."""
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"filename": graph}}}))
    model = genai.Model(config)

    def generate(ids: list[int]) -> Iterator[int]:
        parameters = genai.GeneratorParams(model)
        # A stop token would end the run early; every arm gives the same number of tokens.
        parameters.set_search_options(
            max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False
        )
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(NEW):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return generate


def summary(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians, and medians of the ratios to torch in the same round."""
    result: dict[str, Any] = {"ttft_ratio": {}, "tpot_ratio": {}, "ms": {}}
    for name, pairs in times.items():
        ttft, tpot = (statistics.median(pair[at] for pair in pairs) for at in (0, 1))
        result["ms"][name] = {"ttft": round(1e3 * ttft, 2), "tpot": round(1e3 * tpot, 3)}
        if name != "torch":
            for at, key in enumerate(("ttft_ratio", "tpot_ratio")):
                ratios = [
                    mine[at] / theirs[at]
                    for mine, theirs in zip(pairs, times["torch"], strict=True)
                ]
                result[key][name] = round(statistics.median(ratios), 3)
    return result


def machine() -> dict[str, Any]:
    """The card and what ran on it."""
    import torch

    packages = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime-genai-cuda")
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"card": card, "cuda": torch.version.cuda, "versions": found}


if __name__ == "__main__":
    main()
