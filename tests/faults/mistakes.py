"""Mistakes in what a user writes and brings: recipes, models, adapters and texts.

Each is a command as it is typed, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from limbeck.contract.errors import UserError
from tests.app.cli.calls import call
from tests.pico import make_model

Mistake = Callable[[Path], None]
_FILES: dict[str, Any] = {"kind": "files", "paths": ["text.txt"]}
_MODEL = {"kind": "local", "path": "models/base"}


def _data(text: dict[str, Any], *, block: int) -> dict[str, Any]:
    heldout = {"every": 4, "piece_chars": 256, "blocks": 2}
    return {"domains": [{"name": "letters", "text": text}], "block": block, "heldout": heldout}


def _typed(folder: Path, *command: str) -> None:
    """Run a command in ``folder``; raise what it prints, without the lines of its progress."""
    with contextlib.chdir(folder):
        result = call(*command)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.strip().splitlines() if not line.startswith("== ")]
    while lines and lines[0].startswith("  "):  # progress comes before the message
        del lines[0]
    message = "\n".join(lines).removeprefix("limbeck: ").replace(f"{folder}/", "")
    raise UserError(message.replace(str(folder), "/home/me"))


def _recipe(*command: str, text: dict[str, Any] = _FILES, **over: Any) -> Mistake:
    """``limbeck COMMAND mine.yaml`` with fields of the recipe changed."""

    def make(folder: Path) -> None:
        tree = {
            "name": "mine",
            "teachers": [{"name": "legal", "model": _MODEL}],
            "data": _data(text, block=32),
            "student": {"kind": "lora", "base": _MODEL},
            "training": {"tokens": 640, "batch_tokens": 64},
            "bench": {"prompt_tokens": 8, "new_tokens": 8},
        }
        written = yaml.safe_dump(tree | over, sort_keys=False)
        (folder / "mine.yaml").write_text(written, encoding="utf-8")
        (folder / "text.txt").write_text("Some words to read. " * 200)
        make_model(folder / "models" / "base")
        _typed(folder, *(command or ("validate",)), "mine.yaml")

    return make


def _written(text: str) -> Mistake:
    def make(folder: Path) -> None:
        (folder / "mine.yaml").write_text(text, encoding="utf-8")
        _typed(folder, "validate", "mine.yaml")

    return make


def _near(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: mine")
    _typed(folder, "validate", "mien.yaml")


def _shipped(folder: Path) -> None:
    _typed(folder, "run", "smollm2/135m-two-expert")


def _of_a_teacher(model: Any, **fields: Any) -> Mistake:
    return _recipe(teachers=[{"name": "legal", "model": model, **fields}])


def _pickle(folder: Path) -> None:
    base = make_model(folder / "models" / "pickle")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    _of_a_teacher({"kind": "local", "path": "models/pickle"})(folder)


def _nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_model(folder / "models" / "broken")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    source = {"kind": "local", "path": "models/broken"}
    teachers = [{"name": "legal", "model": source}]
    with _own_cache(folder):
        _recipe("compress", teachers=teachers)(folder)


def _too_many_tokens(folder: Path) -> None:
    make_model(folder / "models" / "small", vocab_size=200, eos_token_id=0, bos_token_id=0,
               pad_token_id=0)  # fmt: skip
    _recipe(student={"kind": "lora", "base": {"kind": "local", "path": "models/small"}})(folder)


def _no_tokenizer(folder: Path) -> None:
    base = make_model(folder / "models" / "bare")
    (base / "tokenizer.json").unlink()
    _of_a_teacher({"kind": "local", "path": "models/bare"})(folder)


def _of_another_task(folder: Path) -> None:
    base = make_model(folder / "models" / "t5")
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (base / "config.json").write_text(json.dumps(config))
    _of_a_teacher({"kind": "local", "path": "models/t5"})(folder)


def _experts(folder: Path) -> None:
    make_model(folder / "models" / "moe", model_type="mixtral", num_local_experts=4)
    _recipe(student={"kind": "lora", "base": {"kind": "local", "path": "models/moe"}})(folder)


def _adapter(weights: str = "adapter_model.safetensors", **config: Any) -> Mistake:
    def make(folder: Path) -> None:
        adapter = folder / "adapters" / "legal"
        adapter.mkdir(parents=True)
        facts = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "models/base",
            "target_modules": ["q_proj"],
        }
        (adapter / "adapter_config.json").write_text(json.dumps(facts | config))
        (adapter / weights).write_bytes(b"")
        _of_a_teacher(_MODEL, adapter="adapters/legal")(folder)

    return make


def _adapter_path(folder: Path) -> None:
    (folder / "adapters" / "legal").mkdir(parents=True)
    _of_a_teacher(_MODEL, adapter="adapters/leagl")(folder)


def _text(name: str, content: str | bytes, **form: Any) -> Mistake:
    """A recipe that trains on one file."""

    def make(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        source = {"kind": "files", "paths": [name]} | ({"format": form} if form else {})
        with _own_cache(folder):
            _recipe("compress", text=source)(folder)

    return make


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    kept = os.environ.get("LIMBECK_CACHE")
    os.environ["LIMBECK_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("LIMBECK_CACHE")
        if kept is not None:
            os.environ["LIMBECK_CACHE"] = kept
        shutil.rmtree(folder / "cache", ignore_errors=True)


_CHAT_WITHOUT_ANSWER = '{"messages": [{"role": "user", "content": "Hi"}]}\n' * 30

SECTIONS: dict[str, dict[str, Mistake]] = {
    "Recipes": {
        "The file is not there": _near,
        "A shipped recipe has another name": _shipped,
        "The file is not YAML": _written("name: mine\n\tteachers: []\n"),
        "The recipe that it extends is not there": _written("extends: base.yaml\nname: mine\n"),
        "A key is misspelt": _recipe(training={"token": 640}),
        "A value has another type": _recipe(training={"tokens": "many", "batch_tokens": 64}),
        "Two mistakes": _recipe(
            training={"tokens": -1, "batch_tokens": 64}, student={"kind": "lorra", "base": _MODEL}
        ),
        "Two fields contradict each other": _recipe(training={"tokens": 640, "batch_tokens": 50}),
        "A weight is for a teacher that is not there": _recipe(
            fusion={"weights": {"kind": "static", "values": {"leagl": 1.0}}}
        ),
        "A block is longer than the model's context": _recipe(
            data=_data(_FILES, block=128), training={"tokens": 1280, "batch_tokens": 128}
        ),
        "A form is not known": _recipe(export={"forms": ["int9"]}),
    },
    "Models and adapters": {
        "The folder is not there": _of_a_teacher({"kind": "local", "path": "models/bsae"}),
        "The weights are a pickle": _pickle,
        "The folder has no tokenizer": _no_tokenizer,
        "The model does another task": _of_another_task,
        "The student could not be exported": _experts,
        "A weight is not a number": _nan,
        "The tokenizer has more tokens than the model": _too_many_tokens,
        "The folder of the adapter is not there": _adapter_path,
        "The adapter's weights are a pickle": _adapter("adapter_model.bin"),
        "The adapter is of mlx-lm": _adapter("adapters.safetensors"),
        "The adapter is of a classifier": _adapter(task_type="SEQ_CLS"),
        "The adapter is of a kind that changes more than layers": _adapter(
            peft_type="PROMPT_TUNING", num_virtual_tokens=4
        ),
    },
    "Texts": {
        "The file is not there": _recipe(text=_FILES | {"paths": ["txet.txt"]}),
        "The file is empty": _text("letters.txt", ""),
        "The text is too short": _text("letters.txt", "Some words."),
        "The file is not text": _text("letters.txt", bytes(range(256))),
        "A row is not JSON": _text("letters.jsonl", '{"text": "one"}\n{"text":\n', kind="jsonl"),
        "A row is null": _text("letters.jsonl", '{"text": "one"}\n{"text": null}\n', kind="jsonl"),
        "The text has another key": _text("letters.jsonl", '{"body": "one"}\n', kind="jsonl"),
        "A conversation has no answer": _text("chats.jsonl", _CHAT_WITHOUT_ANSWER, kind="chat"),
    },
}
