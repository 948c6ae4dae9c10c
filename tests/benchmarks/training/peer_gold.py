"""The peer's side of bench_peers_cross: TRL's GOLDTrainer in `bayesian` mode, on given text alone.

Arguments: a folder with ``peer.json`` (paths of student and teacher, rows of a batch, learning
rate, precision), ``rows.jsonl`` (prompt and completion a line) and ``heldout.json`` (token ids of
the student, row by row). Prints one JSON object: seconds of each step after the first, growth of
memory in bytes, and the summed held-out loss in nats after the training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peer_trl import Clock, resident
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer


def main() -> None:
    """Train on every text once, then score the held-out rows."""
    work = Path(sys.argv[1])
    job = json.loads((work / "peer.json").read_text(encoding="utf-8"))
    texts = (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # GOLD aligns bytes for byte-level tokenizers alone; for others TRL says to leave it out.
    aligned = (
        "ByteLevel" in AutoTokenizer.from_pretrained(job["teacher"]).backend_tokenizer.to_str()
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32)
        for name in ("student", "teacher")
    )
    clock = Clock()
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=GOLDConfig(
            output_dir=str(work / "gold"),
            num_train_epochs=1,
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["batch"] // job["micro_batch"],
            max_length=None,
            lmbda=0.0,  # the corpus alone
            use_uld_loss=True,
            uld_token_merge_strategy="bayesian",
            use_extended_uld=aligned,
            uld_use_hybrid_loss=True,
            uld_crossentropy_weight=job["cross_entropy"],
            uld_distillation_weight=job["fusion"],
            teacher_tokenizer_name_or_path=job["teacher"],
            bf16=job["precision"] == "bf16",
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            learning_rate=job["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=job["warmup_steps"],
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in texts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    growth = resident("VmHWM") - clock.before
    trainer.model.eval()
    nats = 0.0
    for ids in json.loads((work / "heldout.json").read_text(encoding="utf-8")):
        row = torch.tensor(ids)
        with torch.no_grad():
            logits = trainer.model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    gaps = np.diff(clock.stamps)[1:].tolist()
    print(json.dumps({"seconds": gaps, "growth": growth, "nats": nats, "aligned": aligned}))


if __name__ == "__main__":
    main()
