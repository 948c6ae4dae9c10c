"""Decode speed of the demo's student against llama.cpp and OpenVINO GenAI, in one run.

Arms: int8-weight in our loop, the same graph in GenAI's loop, llama.cpp's server with Q8_0 and
flash attention, OpenVINO GenAI with its int8. All start from one student; llama.cpp reads the
`gguf-q8_0` form of the export. Prompts of 128, 512, 1024 and 1500 tokens, 2 threads. Each arm is a
process of its own, timed in mirrored blocks (A B C D D C B A). Ratios are medians over blocks with
the interval of `serve_bench.judge.stats`. llama.cpp's times are those of its own clock, without
HTTP.

Prints one JSON object: `tpot_ratio` and `ttft_ratio` by prompt length are ours over the better
peer's, `against` has both peers, `loop_ratio` is our loop over GenAI's at 128, `nll` is nats per
held-out token. `--profile` adds the share of each operator in a token.

    make bench-decode ARGS="--run runs/smollm2-135m-two-experts-..."

Without a run it exports the untrained SmolLM2-135M.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.data.heldout import HELDOUT, load_heldout
from tests.benchmarks.serving import peers
from tests.benchmarks.serving.peers import FORM, Process, Server

NEW = {128: 64, 512: 2, 1024: 2, 1500: 32}  # new tokens by length of the prompt
DECODED = (128, 1500)  # lengths at which the time per token is compared
_PAUSE, _WARM = 0.02, 2  # seconds before a generation; blocks before any is timed

Times = dict[tuple[str, int, str], list[float]]  # seconds by arm, length and "ttft" or "tpot"


# The arms, each in its process ------------------------------------------------------------------


class Ours:
    """`limbeck.runtime.decoder.Decoder`, as `limbeck generate` uses it."""

    def __init__(self, folder: Path, threads: int) -> None:
        from limbeck.runtime.decoder import Decoder
        from limbeck.runtime.session import import_onnxruntime

        self._decoder = Decoder(folder, form=FORM, threads=threads)
        self.library = f"onnxruntime {import_onnxruntime().__version__}"

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        at, tokens, started = [], [], time.perf_counter()
        for token in self._decoder.generate(prompt, new_tokens):
            at.append(time.perf_counter() - started)
            tokens.append(token)
        return {"at": at, "tokens": tokens}


class Genai:
    """ONNX Runtime GenAI's own loop on the same graph."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        genai.disable_telemetry_events()
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai, self._model = genai, genai.Model(config)
        self.library = f"onnxruntime-genai {genai.__version__}"

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        parameters = self._genai.GeneratorParams(self._model)
        length = len(prompt) + new_tokens
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        at, started = [], time.perf_counter()
        generator.append_tokens(np.asarray(prompt, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            at.append(time.perf_counter() - started)
        return {
            "at": at,
            "tokens": [int(token) for token in generator.get_sequence(0)[len(prompt) :]],
        }


def serve(arm: Ours | Genai) -> None:
    """Answer one JSON job a line until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"library": arm.library}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(getattr(arm, job.pop("do"))(**job)), file=answers, flush=True)


# The comparison ---------------------------------------------------------------------------------

Generate = Callable[[list[int], int], tuple[float, float]]  # seconds to the first token; per token


def of_process(process: Process) -> Generate:
    """Times of an arm that reports the seconds at each token."""

    def generate(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        at = process.ask("generate", prompt=prompt, new_tokens=new_tokens)["at"]
        assert len(at) == new_tokens, f"{process.library}: {len(at)} tokens"
        return at[0], (at[-1] - at[0]) / (new_tokens - 1)

    return generate


def of_llama(server: Server) -> Generate:
    """Times that llama.cpp's server reports of itself."""

    def generate(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        options = {"n_predict": new_tokens, "cache_prompt": False, "ignore_eos": True}
        found = server.post("/completion", {"prompt": prompt, "temperature": 0, **options})
        times = found["timings"]
        assert (times["prompt_n"], times["predicted_n"]) == (len(prompt), new_tokens), times
        # The clock of predicted_ms starts at the first token.
        return times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3 / (new_tokens - 1)

    return generate


def time_blocks(arms: dict[str, Generate], texts: list[np.ndarray], rounds: int) -> Times:
    """Geometric means of the two runs of a block, ``rounds`` of them by arm and length."""
    found: Times = {}
    for block in range(-_WARM, rounds):
        text = texts[block % len(texts)]
        for length, new_tokens in NEW.items():
            prompt = [int(token) for token in np.resize(np.roll(text, -128 * block), length)]
            order = list(np.random.default_rng((length, block + _WARM)).permutation(list(arms)))
            pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
            for name in [*order, *reversed(order)]:
                time.sleep(_PAUSE)
                pairs[name].append(arms[name](prompt, new_tokens))
            if block < 0:
                continue
            for name, values in pairs.items():
                for key, pair in zip(("ttft", "tpot"), zip(*values, strict=True), strict=True):
                    taken = found.setdefault((name, length, key), [])
                    taken.append(math.exp(sum(map(math.log, pair)) / 2))
        print(f"block {block + 1} of {rounds}", file=sys.stderr)
    return found


def ratios(times: Times, present: list[str]) -> dict[str, Any]:
    """Ours over the better peer and over each."""
    named = {"ttft_ratio": ("ttft", tuple(NEW)), "tpot_ratio": ("tpot", DECODED)}
    found: dict[str, Any] = {}
    for name, (key, lengths) in named.items():
        found[name] = {
            str(length): peers.over_better({arm: times[arm, length, key] for arm in present})
            for length in lengths
        }
    found["against"] = {
        peer: {
            name: {
                str(n): peers.over(times["limbeck", n, key], times[peer, n, key]) for n in lengths
            }
            for name, (key, lengths) in named.items()
        }
        for peer in present
        if peer != "limbeck"
    }
    return found


def profile(graph: Path) -> dict[str, float]:
    """Share of the time of decoding by operator, from onnxruntime's profile of ``graph``."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as temporary:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 2, True
        options.profile_file_prefix = f"{temporary}/profile"
        session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        shapes = {
            v.name: v.shape for v in session.get_inputs() if v.name.startswith("past_key_values.")
        }
        cache = {n: np.zeros((1, s[1], 128, s[3]), np.float32) for n, s in shapes.items()}
        mask = np.ones((1, 128 + 1), np.int64)
        for _ in range(NEW[128]):
            session.run(
                None, {"input_ids": np.zeros((1, 1), np.int64), "attention_mask": mask, **cache}
            )
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: round(value / spent.total(), 3) for name, value in spent.most_common(8)}


def main() -> None:
    """Make the models, time them in turn, print."""
    if sys.argv[1:2] == ["serve"]:
        kinds = {"ours": Ours, "genai": Genai}
        serve(kinds[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4])))
        return
    parser = peers.options(__doc__, rounds=8)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    with peers.workplace(asked.models) as work:
        models = peers.make_models(work, asked.run)
        heldout = load_heldout((asked.run or work) / "student" / HELDOUT)
        module = (sys.executable, "-m", "tests.benchmarks.serving.bench_decode", "serve")
        threads = str(asked.threads)
        ours = Process(*module, "ours", models.onnx, threads)
        genai = Process(*module, "genai", models.onnx, threads)
        llama = peers.llama_server(models.gguf, asked.threads, streams=1, context=2048)
        running: list[Process | Server] = [ours, genai, llama]
        arms = {
            "limbeck": of_process(ours),
            "genai": of_process(genai),
            "llama.cpp": of_llama(llama),
        }
        libraries = [ours.library, genai.library, peers.llama_version()]
        if models.openvino:
            openvino = peers.openvino(models.openvino, asked.threads)
            running.append(openvino)
            arms["openvino"] = of_process(openvino)
            libraries.append(openvino.library)
        texts = [
            np.concatenate([b.input_ids[i, : b.lengths[i]] for i in range(len(b))])
            for b in heldout.values()
        ]
        try:
            times = time_blocks(arms, texts, asked.rounds)
            memory = {name: round(arm.rss_mb(), 1) for name, arm in zip(arms, running, strict=True)}
        finally:
            for arm in running:
                arm.stop()
        present = [name for name in arms if name != "genai"]
        print(
            json.dumps(
                ratios(times, present)
                | {
                    "loop_ratio": peers.over(
                        times["limbeck", 128, "tpot"], times["genai", 128, "tpot"]
                    ),
                    "ms": {
                        f"{name} {key} {length}": round(1e3 * float(np.median(values)), 2)
                        for (name, length, key), values in times.items()
                        if key == "ttft" or length in DECODED
                    },
                    "nll": models.losses(heldout),
                    "megabytes": models.megabytes(),
                    "rss_mb": memory,
                    "rounds": asked.rounds,
                    "threads": asked.threads,
                    "libraries": libraries,
                    "processor": peers.processor(),
                    "profile": profile(models.onnx / models.result.forms[FORM].graph)
                    if asked.profile
                    else None,
                }
            )
        )


if __name__ == "__main__":
    main()
