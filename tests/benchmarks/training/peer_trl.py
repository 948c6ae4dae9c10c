"""The peer's side of bench_peers: TRL's GKDTrainer (lmbda = 0, forward KL), in its own environment.

Arguments: model folder, file of token ids [N, L] (npy), steps. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) * 1024


class Clock(TrainerCallback):
    """Time of every optimiser step; memory before the first."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.before = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.stamps.append(time.perf_counter())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stamps.append(time.perf_counter())


def main() -> None:
    """Train a few steps."""
    folder, ids, steps = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist()})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        tokens = torch.tensor([row["input_ids"] for row in batch])
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": tokens,
            "prompts": tokens[:, :1],
        }

    clock = Clock()
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir="/tmp/limbeck-peer",
            max_steps=steps,
            per_device_train_batch_size=len(ids) // steps,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=1e-3,
        ),
        data_collator=collate,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    gaps = np.diff(clock.stamps)[1:]
    print(
        json.dumps({"seconds": float(np.median(gaps)), "growth": resident("VmHWM") - clock.before})
    )


if __name__ == "__main__":
    main()
