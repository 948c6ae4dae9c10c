"""What the harness adds to what it measures: a worker's generation beside a bare loop.

Both run in this process on one `Decoder`, in mirrored pairs (bare, harness, harness, bare), so that
only the harness's own code differs. ``python -m tests.benchmarks.harness_overhead [ONNX_FOLDER]``
prints one JSON object.
"""

from __future__ import annotations

import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.results.bench import Interval
from limbeck.runtime.decoder import Decoder
from serve_bench.judge.stats import CONFIDENCE, median_interval
from serve_bench.worker import language as worker
from serve_bench.worker.runtimes import OnnxRuntime
from tests.pico import make_model, make_student, pico_recipe

PROMPT, NEW = 32, 64  # tokens


def overhead(
    onnx: Path | None = None, *, blocks: int = 60, threads: int = 1, new_tokens: int = NEW
) -> dict[str, Any]:
    """Relative overhead of the harness over a bare loop: reported time, and wall clock.

    ``onnx`` is an exported folder. Without one, a model of a few million weights is made, whose
    tokens take well under a millisecond, where an overhead shows most. Keys: `overhead` (of the
    reported time; 0.01 is 1 %) with `overhead_low` and `overhead_high`, `wall_overhead` (with
    parsing the command and writing the answer), `blocks`, `token_ms`.
    """
    with tempfile.TemporaryDirectory() as folder:
        artifact = onnx or _make(Path(folder))
        shipped = json.loads((artifact / "manifest.json").read_text())["result"]["shipped"]
        session = worker.Session()
        runtime = OnnxRuntime(artifact=str(artifact), form=shipped, threads=threads)
        session.runtime = runtime
        prompt = np.random.default_rng(0).integers(0, 256, PROMPT).tolist()
        decoder: Decoder = runtime._generating()
        for _ in range(5):
            _bare(decoder, prompt, new_tokens)
            _harness(session, prompt, new_tokens)
        pairs = [_block(decoder, session, prompt, new_tokens) for _ in range(blocks)]
    bare, reported, wall = np.log(np.array(pairs)).T
    ratio, whole = _over(reported - bare), _over(wall - bare)
    return {
        "overhead": ratio.value - 1,
        "overhead_low": ratio.low - 1,
        "overhead_high": ratio.high - 1,
        "wall_overhead": whole.value - 1,
        "blocks": blocks,
        "token_ms": 1e3 * float(np.median(np.exp(bare))) / new_tokens,
    }


def _block(
    decoder: Decoder, session: worker.Session, prompt: list[int], new_tokens: int
) -> tuple[float, float, float]:
    """Geometric means of two runs each: bare loop, harness as reported, harness by wall clock."""
    first = _bare(decoder, prompt, new_tokens)
    (one, one_wall), (two, two_wall) = (_harness(session, prompt, new_tokens) for _ in range(2))
    last = _bare(decoder, prompt, new_tokens)
    return math.sqrt(first * last), math.sqrt(one * two), math.sqrt(one_wall * two_wall)


def _bare(decoder: Decoder, prompt: Sequence[int], new_tokens: int) -> float:
    """Seconds of the plainest loop there is."""
    started = time.perf_counter()
    token = decoder.prefill([list(prompt)], room=new_tokens)[0].argmax()
    for _ in range(new_tokens - 1):
        token = decoder.step([token])[0].argmax()
    return time.perf_counter() - started


def _harness(session: worker.Session, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds that a worker reports, and seconds of the whole command with parsing and answer."""
    line = json.dumps({"command": "generate", "prompt": prompt, "new_tokens": new_tokens}) + "\n"
    answers = io.StringIO()
    started = time.perf_counter()
    arguments = json.loads(line)
    answers.write(json.dumps(session.answer(arguments.pop("command"), arguments)))
    wall = time.perf_counter() - started
    answer = json.loads(answers.getvalue())
    return answer["at"][-1] - answer["started"], wall


def _over(logarithms: np.ndarray[Any, np.dtype[np.float64]]) -> Interval:
    return median_interval(logarithms, error=1 - CONFIDENCE).map_exp()


def _make(folder: Path) -> Path:
    from export import export_student

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 64}
    model = make_model(folder / "model", scale=0.02, max_position_embeddings=256, **sizes)
    make_student(folder / "student", model)
    export_student(
        student=folder / "student",
        out=folder / "onnx",
        recipe=pico_recipe(export={"forms": ["fp32"]}),
    )
    return folder / "onnx"


if __name__ == "__main__":
    print(json.dumps(overhead(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
