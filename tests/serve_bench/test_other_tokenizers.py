"""The bench of a student whose teacher has another tokenizer: compared on bits a byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from export import export_student
from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.heldout import load_heldout
from serve_bench import bench, write_report
from serve_bench.judge.quality import summarise
from tests.compress.teachers.test_other_tokenizers import mixed


@pytest.mark.slow
def test_a_teacher_of_another_tokenizer_is_judged_by_its_own_tokens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = mixed(
        tmp_path,
        training={"tokens": 64 * 2},
        export={"forms": ["fp32"]},
        bench={"prompt_tokens": 8, "new_tokens": 4, "minutes": 0.05, "min_blocks": 3},
        gates={"max_loss_vs_best_teacher": 9},
    )
    student = compress.distill(recipe=recipe, out=run / "student")
    export_student(student=student.path, out=run / "onnx", recipe=recipe)
    found = bench(onnx=run / "onnx", student=student.path, out=run / "bench", recipe=recipe)
    quality = json.loads((found.path / "quality.json").read_text())
    assert quality["mixture_of"] == ["teacher:own"]
    assert quality["other_tokenizers"] == ["teacher:other"]
    figures = summarise(quality, "teacher:other")
    assert figures["mean_kl"] is None

    # transformers' own loss, on the teacher's tokens of the same text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gemma")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma").eval()
    own, rates = AutoTokenizer.from_pretrained(student.path / "model"), []
    for domain, blocks in load_heldout(student.path / "heldout.safetensors").items():
        nats = size = 0.0
        for ids, length in zip(blocks.input_ids, blocks.lengths, strict=True):
            text = own.decode(ids[:length].tolist())
            row = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logits = model(row).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            size += len(text.encode())
            rates.append((row.shape[1] - 1) / (int(length) - 1))
        theirs = nats / math.log(2) / size
        assert figures["domains"][domain]["bits_per_byte"] == pytest.approx(theirs, rel=0.05)

    result = open_artifact(found.path).result
    gate = next(g for g in result["gates"] if g["name"] == "max_loss_vs_best_teacher")
    best = min(("own", "other"), key=lambda n: summarise(quality, f"teacher:{n}")["mean_nll"])
    assert ("in bits a byte" in gate["sentence"]) == (best == "other")

    # The teacher was timed on as many tokens as the student, and needs fewer for the same text.
    arm = result["arms"]["teacher:other"]
    assert arm["token_rate"] == pytest.approx(sum(rates) / len(rates), rel=0.04)
    assert arm["token_rate"] < 0.95
    write_report(run=run, recipe=recipe)
    page = (run / "report.html").read_text()
    assert "Teachers with another tokenizer" in page
    assert "for each of the student’s" in page
    assert "reads and writes in its own tokens" in page

    # What it writes is transformers' own greedy continuation of the prompt's text.
    texts = quality["generation"]["texts"]
    for shown in texts:
        prompt = tokenizer(shown["prompt"], return_tensors="pt")
        new = math.ceil(4 * arm["token_rate"])
        kwargs = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        written = model.generate(**prompt, **kwargs)[0, prompt["input_ids"].shape[1] :]
        answer = tokenizer.decode(written)
        assert "".join(shown["answers"]["teacher:other"]) == answer
        assert page.count("<dt>other</dt>") == len(texts)
    assert "A teacher with another tokenizer answers in its own tokens" in page

    # What it answers: transformers' own choices after the texts of the rows.
    rows = load_heldout(student.path / "evals.safetensors")
    found = quality["evals"]["arms"]["teacher:other"]
    for name in ("facts", "python"):
        blocks = rows[name]
        for index, (ids, length, scored) in enumerate(
            zip(blocks.input_ids, blocks.lengths, blocks.scored, strict=True)
        ):
            first = int(scored.argmax())
            before, answer = own.decode(ids[:first]), own.decode(ids[first:length])
            mine = tokenizer(answer, add_special_tokens=False)["input_ids"]
            row = torch.tensor([[*tokenizer(before)["input_ids"], *mine]])
            with torch.no_grad():
                logits = model(row).logits[0, -len(mine) - 1 : -1]
            labels = row[0, -len(mine) :]
            nats = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right = float((logits.argmax(-1) == labels).float().mean())
            assert found[name]["nll"][index] == pytest.approx(nats, rel=1e-4)
            assert found[name]["right"][index] == pytest.approx(right * int(scored.sum()))
