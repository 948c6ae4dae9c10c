"""Decode speed of SmolLM2-135M against llama.cpp, in one run.

Arms: int8-weight in our loop, the same graph in GenAI's loop, and llama.cpp's Q8_0. Prompt of 128
tokens, 64 new tokens, 2 threads. Both sides start from the weights of one GGUF file. Each arm is a
process of its own, timed in mirrored blocks (A B C C B A). Ratios are medians over blocks with the
interval of `serve_bench.judge.stats`.

Prints one JSON object: `tpot_ratio`, `ttft_ratio` and `size_ratio` are ours over llama.cpp's,
`loop_ratio` is our loop over GenAI's, `nll_ours` and `nll_peer` are nats per token on the same
held-out text. `--onnx FOLDER` takes an exported folder instead of exporting. `--profile` adds the
share of each operator in a token.

    make bench-decode           builds .venvs/llama-cpp from source first
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.data.heldout import HELDOUT, load_heldout
from limbeck.contract.results.bench import Interval
from serve_bench.judge.stats import first_look, paired_ratio

PROMPT, NEW, FORM, ROOT = 128, 64, "int8-weight", Path(__file__).resolve().parents[3]
PEER = ROOT / ".venvs/llama-cpp/bin/python"
_PAUSE, _WARM = 0.02, 4  # seconds before a generation; generations before any is timed


# The arms, each in its process ------------------------------------------------------------------


class Ours:
    """`limbeck.runtime.decoder.Decoder`, as `limbeck generate` uses it."""

    def __init__(self, folder: Path, threads: int) -> None:
        from limbeck.runtime.decoder import Decoder
        from limbeck.runtime.session import import_onnxruntime

        self._open = {"form": FORM, "threads": threads}
        self._folder, self._decoder = folder, Decoder(folder, form=FORM, threads=threads)
        self.library = f"onnxruntime {import_onnxruntime().__version__}"

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        at, tokens, started = [], [], time.perf_counter()
        for token in self._decoder.generate(prompt, new_tokens):
            at.append(time.perf_counter() - started)
            tokens.append(token)
        return {"at": at, "tokens": tokens}

    def score(self, ids: list[int]) -> dict[str, Any]:
        """Nats of every token of ``ids`` but the first, summed."""
        from limbeck.runtime.decoder import Decoder

        if not self._decoder.all_logits:
            self._decoder = Decoder(self._folder, form=FORM, all_logits=True)
        logits = self._decoder.score([ids])[0, :-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(logits).sum(axis=1))
        return {"nll": float((normaliser - logits[np.arange(len(logits)), ids[1:]]).sum())}


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


class Process:
    """An arm in a process of its own, seen from here."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.library = self._answer()["library"]

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended with exit code {self._process.wait()}")
        return dict(json.loads(line))


# The comparison ---------------------------------------------------------------------------------


def time_blocks(
    arms: dict[str, Process], texts: list[np.ndarray], rounds: int
) -> dict[str, dict[str, np.ndarray]]:
    """TTFT and TPOT in seconds, ``[rounds]`` by arm: geometric means of the two runs of a block."""
    found: dict[str, dict[str, list[float]]] = {name: {"ttft": [], "tpot": []} for name in arms}
    for block in range(-_WARM, rounds):
        prompt = [
            int(token)
            for token in np.resize(np.roll(texts[block % len(texts)], -PROMPT * block), PROMPT)
        ]
        order = list(np.random.default_rng((0, block + _WARM)).permutation(list(arms)))
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for name in [*order, *reversed(order)]:
            time.sleep(_PAUSE)
            answer = arms[name].ask("generate", prompt=prompt, new_tokens=NEW)
            at = answer["at"]
            assert len(at) == len(answer["tokens"]) == NEW, f"{name}: {len(at)} tokens"
            pairs[name].append((at[0], (at[-1] - at[0]) / (NEW - 1)))
        if block >= 0:
            for name, values in pairs.items():
                for key, pair in zip(("ttft", "tpot"), zip(*values, strict=True), strict=True):
                    found[name][key].append(math.exp(sum(map(math.log, pair)) / 2))
    return {
        name: {key: np.asarray(values) for key, values in times.items()}
        for name, times in found.items()
    }


def score(arm: Process, texts: list[list[int]]) -> float:
    """Nats a token over all ``texts``."""
    return sum(arm.ask("score", ids=ids)["nll"] for ids in texts) / sum(
        len(ids) - 1 for ids in texts
    )


def profile(folder: Path) -> dict[str, float]:
    """Share of the time of decoding by operator, from onnxruntime's profile of our loop."""
    import onnxruntime

    graph = (
        folder
        / json.loads((folder / "manifest.json").read_text())["result"]["forms"][FORM]["graph"]
    )
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
        cache = {n: np.zeros((1, s[1], PROMPT, s[3]), np.float32) for n, s in shapes.items()}
        mask = np.ones((1, PROMPT + 1), np.int64)
        for _ in range(NEW):
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
    """Make both models, time them in turn, and score them."""
    if sys.argv[1:2] == ["serve"]:
        kinds = {"ours": Ours, "genai": Genai}
        serve(kinds[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=8, help="held-out blocks scored per domain")
    parser.add_argument(
        "--onnx", type=Path, help="an exported folder with int8-weight, instead of exporting now"
    )
    parser.add_argument(
        "--flash-attention", choices=("on", "off"), default="off", help="of llama.cpp"
    )
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    if not PEER.exists():
        raise SystemExit(f"{PEER} is missing; run: make .venvs/llama-cpp/.ready")
    from tests.benchmarks.smollm2 import demo_recipe, gguf_file, untrained_student

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        untrained_student(work / "student")
        folder = asked.onnx or work / "onnx"
        if asked.onnx is None:
            from export import export_student

            recipe = demo_recipe(f"export.forms=[fp32, {FORM}]")
            export_student(student=work / "student", out=folder, recipe=recipe)
        peer_script = str(ROOT / "tests/benchmarks/serving/peer_llama.py")
        gguf = work / "q8_0.gguf"
        subprocess.run(
            [PEER, peer_script, "quantize", gguf_file(), gguf], check=True, capture_output=True
        )
        heldout = load_heldout(work / "student" / HELDOUT)
        rows = {
            name: [b.input_ids[i, : b.lengths[i]] for i in range(min(asked.texts, len(b)))]
            for name, b in heldout.items()
        }
        threads = str(asked.threads)
        module = (sys.executable, "-m", "tests.benchmarks.serving.bench_decode", "serve")
        arms = {
            "ours": Process(*module, "ours", str(folder), threads),
            "genai": Process(*module, "genai", str(folder), threads),
            "llama.cpp": Process(
                str(PEER), peer_script, "serve", str(gguf), threads, asked.flash_attention
            ),
        }
        times = time_blocks(arms, [np.concatenate(texts) for texts in rows.values()], asked.rounds)
        arms["genai"].stop()
        texts = [row.tolist() for domain in rows.values() for row in domain]
        nll = {name: score(arms[name], texts) for name in ("ours", "llama.cpp")}
        sizes = {
            "ours": json.loads((folder / "manifest.json").read_text())["result"]["forms"][FORM][
                "bytes"
            ],
            "llama.cpp": gguf.stat().st_size,
        }
        made_of = profile(folder) if asked.profile else None
        for name in ("ours", "llama.cpp"):
            arms[name].stop()

    def ratio(key: str, over: str) -> Interval:
        return paired_ratio(times["ours"][key], times[over][key], first=first_look(asked.rounds))

    found = {
        "tpot_ratio": ratio("tpot", "llama.cpp"),
        "ttft_ratio": ratio("ttft", "llama.cpp"),
        "loop_ratio": ratio("tpot", "genai"),
    }
    print(
        json.dumps(
            {name: round(interval.value, 3) for name, interval in found.items()}
            | {
                "size_ratio": round(sizes["ours"] / sizes["llama.cpp"], 3),
                "nll_ours": round(nll["ours"], 4),
                "nll_peer": round(nll["llama.cpp"], 4),
                "intervals": {
                    n: [round(i.low, 3), round(i.high, 3)] if i.bounded else None
                    for n, i in found.items()
                },
                "ms": {
                    name: {
                        key: round(1e3 * float(np.median(values)), 2)
                        for key, values in by_key.items()
                    }
                    for name, by_key in times.items()
                },
                "megabytes": {name: round(size / 1e6, 1) for name, size in sizes.items()},
                "scored_tokens": sum(len(ids) - 1 for ids in texts),
                "rounds": asked.rounds,
                "threads": asked.threads,
                "libraries": {name: arm.library for name, arm in arms.items()},
                "profile": made_of,
            }
        )
    )


if __name__ == "__main__":
    main()
