"""`limbeck eval`: lm-eval's tasks over our decoder (`make test-eval` installs lm-eval in an
environment of its own).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import DataError, EnvironmentalError
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.text import load_text
from serve_bench.lm_eval import _figures, evaluate, markdown, score, start_token
from tests.factory import Factory
from tests.pico import make_tokenizer

ROOT = Path(__file__).parents[2]
QUESTIONS = [
    {"question": "two and two make", "choices": ["four", "nine"], "answer": 0},
    {"question": "the sky is", "choices": ["loud", "blue"], "answer": 1},
    {"question": "ice is", "choices": ["cold", "hot"], "answer": 0},
]
COMMON = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
    "doc_to_choice: choices\ndoc_to_target: answer\n",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list: [{metric: byte_perplexity}]\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{question}}'\n"
    "doc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def exported(tiny: Factory) -> Artifact:
    return tiny.exported()


@pytest.mark.parametrize(
    ("special", "start"),
    [({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"), ({"eos_token": "</s>"}, "</s>")],
)
def test_a_text_without_context_begins_as_in_lm_eval(
    tmp_path: Path, special: dict[str, str], start: str
) -> None:
    """lm-eval's `HFLM.prefix_token_id`: BOS, else EOS. Other end tokens may have smaller ids."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    text = load_text(tmp_path)
    assert min(text.stop_ids) == 7
    assert start_token(text) == tokenizer.convert_tokens_to_ids(start)


def test_score_sums_the_log_probabilities_of_what_is_wanted(exported: Artifact) -> None:
    decoder = Decoder(exported.path, threads=1, all_logits=True)
    before, wanted = [3, 14, 15], [92, 65]
    logits = decoder.score([[*before, *wanted]])[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found, greedy = score(decoder, before, wanted, context=64)
    assert found == pytest.approx(log_p[2, 92] + log_p[3, 65], abs=1e-4)
    assert not greedy
    likeliest = int(logits[2].argmax())
    assert score(decoder, before, [likeliest], context=64)[1]
    # Past the context the left is cut off: the model sees its last four tokens only.
    assert score(decoder, [9] * 50 + before, wanted, context=4) == score(
        decoder, before, wanted, context=4
    )


def test_figures_are_paired_with_their_errors() -> None:
    found = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "bleu,strict": 3.0,
        "bleu_stderr,strict": "N/A",
    }
    assert _figures(found) == {
        "acc": {"value": 0.5, "stderr": 0.1},
        "bleu (strict)": {"value": 3.0, "stderr": None},
    }
    table = markdown({"results": {"x": _figures(found)}, "samples": {"x": 4}})
    assert "| x | acc | 0.5000 | 0.1000 | 4 |" in table


def test_mistakes_are_reported(exported: Artifact, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        evaluate(exported.path, tasks=["choose"], include_path=tmp_path / "gone")
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(EnvironmentalError, match=r"pip install 'limbeck\[eval\]'"):
            evaluate(exported.path, tasks=["choose"])


@pytest.mark.slow
def test_tasks_of_ones_own_over_the_deployed_graph(exported: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="extra [eval] is not installed; run: make test-eval")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{COMMON % data}{text}")
    # In a process of its own: lm-eval and datasets warn as they are imported, and warnings are
    # errors here.
    command = [
        sys.executable,
        "-m",
        "limbeck.app.cli",
        "eval",
        str(exported.path),
        "--tasks",
        ",".join(TASKS),
    ]
    code = "from limbeck.app.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        *command[3:],
        "--include-path",
        str(tmp_path),
        "--threads",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    decoder, text = Decoder(exported.path, threads=1, all_logits=True), load_text(exported.path)
    right = 0
    for question in QUESTIONS:
        before = text.encode(str(question["question"]))
        sums = [
            score(decoder, before, text.encode(f" {choice}"), 64)[0]
            for choice in question["choices"]
        ]  # type: ignore[attr-defined]
        right += int(np.argmax(sums) == question["answer"])
    assert found["results"]["choose"]["acc"]["value"] == pytest.approx(right / 3)
    assert found["samples"] == {"choose": 3, "whole": 3, "answer": 3}
    ends = [score(decoder, [256], text.encode(str(q["question"])), 64)[0] for q in QUESTIONS]
    size = sum(len(str(q["question"]).encode()) for q in QUESTIONS)
    assert found["results"]["whole"]["byte_perplexity"]["value"] == pytest.approx(
        math.exp(-sum(ends) / size), rel=1e-4
    )
    assert found["form"] == "int8-weight"  # what the factory ships
    unknown = subprocess.run(
        [*command[:6], "nothing", *command[7:]], capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 2
    assert "found nothing, which is neither in" in unknown.stderr


@pytest.mark.slow
def test_the_shipped_tasks_agree_with_our_own_evaluations(
    exported: Artifact, tmp_path: Path
) -> None:
    """Data is made by the shipped script; lm-eval's accuracy is that of the greedy choices."""
    pytest.importorskip("lm_eval", reason="extra [eval] is not installed; run: make test-eval")
    shipped, folder = ROOT / "examples" / "lm-eval", tmp_path / "examples" / "lm-eval"
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    (tmp_path / "text.txt").write_text("once upon a time there was " * 40)
    made = [sys.executable, str(folder / "make_data.py"), "text.txt"]
    subprocess.run(made, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-m", "limbeck", "eval", str(exported.path.resolve()), "--json"]
    command += ["--tasks", "facts,last_words", "--include-path", "examples/lm-eval"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    decoder, text = Decoder(exported.path, threads=1, all_logits=True), load_text(exported.path)
    for name in ("facts", "last_words"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        greedy = [
            score(decoder, text.encode(r["prompt"]), text.encode(r["answer"]), 64)[1] for r in rows
        ]
        assert found["samples"][name] == len(rows) > 3
        assert found["results"][name]["acc"]["value"] == pytest.approx(np.mean(greedy))
