"""Time to read a prompt: int8-weight by itself, with its graph for prompts, and fp32.

Arms take turns; whole prompts are read in one run. Prints one JSON object: `with_prompt_graph` and
`fp32` are the ratios to int8-weight by itself, medians over rounds, by tokens of the prompt; `ms`;
`mb` is the process's anonymous and file-backed memory after opening each arm and after its longest
prompt.

    make bench-prompt ARGS=runs/smollm2-135m-two-experts-.../onnx
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import psutil

from limbeck.contract.artifact import open_artifact
from limbeck.contract.results.onnx import OnnxResult
from limbeck.runtime.decoder import GraphDecoder
from tests.benchmarks.serving.peers import FORM, processor

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 1500)


def memory() -> dict[str, int]:
    """Memory of this process in MB, anonymous and of files."""
    found = psutil.Process().memory_info()
    return {"anonymous": (found.rss - found.shared) >> 20, "files": found.shared >> 20}


def main() -> None:
    """Open the decoders, time them in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("onnx", type=Path, help="an exported folder with fp32 and int8-weight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    asked = parser.parse_args()
    forms = OnnxResult.of(open_artifact(asked.onnx)).forms
    made = forms[FORM]
    assert made.prompt_graph, "the form has no graph for prompts; export it again"
    graphs = {
        "alone": (made.graph, None),
        "with_prompt_graph": (made.graph, asked.onnx / made.prompt_graph),
        "fp32": (forms["fp32"].graph, None),
    }
    decoders, mb = {}, {"start": memory()}
    for name, (graph, prompts) in graphs.items():
        decoders[name] = decoder = GraphDecoder(
            asked.onnx / graph, threads=asked.threads, prompts=prompts
        )
        mb[f"{name}, opened"] = memory()
        decoder.prefill([[100] * max(asked.lengths)])
        mb[f"{name}, longest prompt"] = memory()
    ms: dict[str, dict[int, float]] = {name: {} for name in decoders}
    for length in asked.lengths:
        taken: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(asked.rounds):
            for name, decoder in decoders.items():
                started = time.perf_counter()
                decoder.prefill([list(range(100, 100 + length))])
                taken[name].append(1e3 * (time.perf_counter() - started))
        for name, times in taken.items():
            ms[name][length] = round(statistics.median(times), 1)
    ratios = {
        name: {length: round(ms[name][length] / ms["alone"][length], 3) for length in ms[name]}
        for name in ("with_prompt_graph", "fp32")
    }
    print(json.dumps(ratios | {"ms": ms, "mb": mb, "processor": processor()}))


if __name__ == "__main__":
    main()
