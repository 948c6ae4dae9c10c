"""The cases that users reported, one row each: what we give, and what transformers or peft give.

Losses are in nats a token of one text; both sides load the same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compress.data.blocks import conversations
from compress.data.documents import documents
from compress.data.packing import special_prefix
from compress.models.gguf import gguf_tokenizer
from compress.teachers.pairs import pair_teachers
from export.build.choice import choose_backend
from export.build.surgery import attention_windows
from limbeck.app.given import exported_folder, require_made
from limbeck.app.init.inputs import adapter_bases, teacher_source, text_source
from limbeck.contract.recipe import ChatRows, FileText, HubModel, JsonLines, ParquetRows
from limbeck.contract.sources.hub import hub_config
from limbeck.contract.sources.models import require_fits
from limbeck.contract.sources.texts import text_files
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.runtime.chat import without_marks
from limbeck.runtime.text import load_text
from serve_bench.serve.wire import ChatBody, CompletionBody
from serve_bench.worker.runtimes import TorchEager
from tests.compress.data.test_conversations import MARKED as TOOL_TEMPLATE
from tests.pico import make_model, make_tokenizer
from tests.serve_bench.serve.test_refusals import CHATS, COMPLETIONS
from tests.tokenizers import END, byte_level
from tests.wild.cases.adapters import (
    IDS,
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    teacher,
)
from tests.wild.cases.chats import chats
from tests.wild.cases.models import models
from tests.wild.cases.recent import recent
from tests.wild.cases.row import Row, loss, said
from tests.wild.cases.texts import texts
from tests.wild.cases.variants import variants
from tests.wild.cases.wrappers import wrappers
from tests.wild.test_files import with_template
from tests.wild.test_gguf import BLOOM, CODER, DEEPSEEK3, FALCON, LLAMA3, splitting, written
from tests.wild.test_tokenizers import lowering, starting

_Q = ["q_proj", "v_proj"]


def rows(folder: Path) -> Iterator[Row]:
    """Every case, made below ``folder``, which must be the working directory. Asks no network."""
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        for part in (
            _adapters,
            _tokenizers,
            _ggufs,
            _readings,
            _models,
            _files,
            _commands,
            variants,
            recent,
            texts,
            models,
            wrappers,
            chats,
        ):
            yield from part(folder)


def _adapters(root: Path) -> Iterator[Row]:
    tied, untied = (make_base(root / f"base-{t}", tied=t) for t in (True, False))

    def made(name: str, base: Path, *, rows: int = 0, **options: Any) -> Path:
        config = LoraConfig(target_modules=options.pop("targets", _Q), **options)
        adapter = root / name
        return make_adapter(base, adapter, config, seed=len(name) + rows, rows=rows)

    head = made("head", tied, targets=[*_Q, "lm_head"])
    yield Row(
        "teacher: LoRA on lm_head",
        loss(our_logits([teacher("one", tied, head)])[0]),
        loss(peft_logits(tied, head)),
    )
    saved = [made(f"saved{i * '-'}", untied, modules_to_save=["lm_head"]) for i in (1, 2)]
    plain = made("plain", untied)
    tokens = made("tokens", tied, trainable_token_indices=IDS[0, :3].tolist())
    embedding = made("embedding", tied, modules_to_save=["embed_tokens"])
    for what, base, first, second in (
        ("two adapters that save their lm_head, the second", untied, *saved),
        ("a plain adapter after one that saves lm_head", untied, saved[0], plain),
        ("trainable tokens, on a tied base", tied, head, tokens),
        ("trainable tokens after a saved embedding", tied, embedding, tokens),
    ):
        ours = our_logits([teacher("one", base, first), teacher("two", base, second)])
        yield Row(f"teacher: {what}", loss(ours[1]), loss(peft_logits(base, second)))
    arm = TorchEager(model=str(tied), adapter=str(head), threads=1)
    scored = torch.stack([torch.from_numpy(arm.score(row.numpy())) for row in IDS])
    yield Row("bench: LoRA on a tied lm_head", loss(scored), loss(peft_logits(tied, head)))
    resized = made("resized", untied, rows=260)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(resized)
    yield Row(
        "teacher: an adapter with two added tokens",
        loss(our_logits([teacher("one", untied, resized)])[0]),
        loss(peft_logits(untied, resized, rows=260)),
    )
    filled = made("filled", untied, rows=320)
    make_tokenizer().save_pretrained(filled)
    yield Row(
        "teacher: an adapter whose embedding was filled up to a multiple of 64",
        loss(our_logits([teacher("one", untied, filled)])[0]),
        loss(peft_logits(untied, filled, rows=320)),
    )
    made("on-hub", untied, base_model_name_or_path="some/base")
    mapped = adapter_bases([f"some/base={untied}"])
    yield Row(
        "an adapter whose base is a hub id, offline",
        said(lambda: hub_config("some/base", "main")),
        said(lambda: AutoModelForCausalLM.from_pretrained("some/base", local_files_only=True)),
        "some/base@main: .* not on this machine",
    )
    source = teacher_source(str(root / "on-hub"), mapped)
    found = our_logits([teacher("one", Path(source["model"]["path"]), Path(source["adapter"]))])
    yield Row(
        "the same with --base some/base=PATH",
        loss(found[0]),
        loss(peft_logits(untied, root / "on-hub")),
    )


def _tokenizers(root: Path) -> Iterator[Row]:
    folder = root / "ends"
    tokenizer = with_template("<s> $A </s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|endoftext|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    turn, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    yield Row(
        "ends: tokenizer <|im_end|>, generation configuration <|endoftext|>",
        str(sorted(load_text(folder).stop_ids)),
        f"transformers stops at {end} alone, its template ends turns with {turn}",
        re.escape(str([turn, end])),
    )
    text = "hello there"
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    own = load_tokenizer(folder)
    plain = own(text, add_special_tokens=False)["input_ids"]
    shown = tokenizer.convert_ids_to_tokens
    begin = " ".join(shown(ids[:1]))
    for what, found in (
        ("training", [*special_prefix(own), *plain]),
        ("a prompt", load_text(folder).encode(text)),
    ):
        ours = " ".join(shown(found))
        yield Row(
            f"template <s> $A </s>: {what}",
            ours,
            " ".join(shown(ids)),
            rf"^{re.escape(begin)} h.* e$",
        )


def _ggufs(root: Path) -> Iterator[Row]:
    for pre, tokenizer in {
        "llama-bpe": starting(splitting(LLAMA3, whole_words=True), "<bos>"),
        "smollm": byte_level(digits=True),
        "falcon": FALCON,
        "bloom": BLOOM,
        "deepseek-coder": CODER,
        "deepseek-v3": DEEPSEEK3,
    }.items():
        file = written(root / f"{pre}.gguf", tokenizer, pre=pre)
        text = "def f(x):\n    1"
        ours = gguf_tokenizer(file)(text)["input_ids"]
        what = f"GGUF with pre-tokenizer {pre}, without add_bos_token: tokens of code"
        yield Row(what, str(ours), str(tokenizer.encode(text).ids))
    file = written(root / "other.gguf", byte_level(), pre="kimi-k2")
    yield Row(
        "GGUF with a pre-tokenizer that transformers splits as GPT-2 does",
        said(lambda: gguf_tokenizer(file)),
        "as GPT-2",
        "splits text as 'kimi-k2' does .*tokenizer.json beside this file",
    )


def _readings(root: Path) -> Iterator[Row]:
    """Teachers that have the student's tokens and read a text in another way."""
    student = make_base(root / "own-tokens", tied=True, vocab_size=340)
    for what, tokenizer in {
        "puts a BOS before a text": starting(byte_level(), "<bos>"),
        "lower-cases a text": lowering(byte_level()),
    }.items():
        PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=END).save_pretrained(
            student
        )
        folder = make_base(root / what.partition(" ")[0], tied=True, vocab_size=340)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
        text = "The cat sat on the mat, and the Dog"
        pair = pair_teachers(student, {"t": folder})[0]
        mine = torch.tensor([load_tokenizer(student)(text)["input_ids"]])
        yield Row(
            f"teacher: has the student's tokens and {what}",
            str(pair.align(mine).texts[0] if pair else mine[0].tolist()),
            str(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]),
        )


def _models(root: Path) -> Iterator[Row]:
    stray = make_model(root / "stray", sliding_window=4)
    yield Row(
        "llama with the sliding_window of another architecture in its file: windows of the graph",
        str(attention_windows(stray)),
        str([getattr(load(stray).model.layers[0].self_attn, "sliding_window", -1)] * 2),
    )
    for kind, builder in (("yarn", "dynamo"), ("linear", "dynamo"), ("longrope", "dynamo")):
        config = {"model_type": "llama", "rope_parameters": {"rope_type": kind}, "head_dim": 16}
        yield Row(
            f"llama with rope {kind}, backend: auto",
            said(lambda config=config: choose_backend(config)[0]),
            "torch's exporter alone gives the logits of torch (tests/export/build/test_rope.py)",
            builder,
        )
    gpt2 = make_model(root / "gpt2", model_type="gpt2", n_embd=32, n_head=4, n_positions=64)
    long = torch.zeros((1, 65), dtype=torch.long)
    yield Row(
        "a block longer than n_positions",
        said(lambda: require_fits(gpt2, block=65)),
        said(lambda: load(gpt2)(input_ids=long)),
        "data.block is 65, but the model reads 64 tokens at most",
    )
    larger = make_tokenizer()
    larger.add_tokens(["<one>"])
    larger.save_pretrained(gpt2)
    yield Row(
        "a tokenizer with more ids than the embedding has rows",
        said(lambda: require_fits(gpt2)),
        said(lambda: load(gpt2)(input_ids=torch.tensor([larger("<one>")["input_ids"]]))),
        "its tokenizer has 259 tokens, but its embedding has 258 rows",
    )


def _files(root: Path) -> Iterator[Row]:
    half = "a\ud800b"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(root / "bytes")
    text = load_text(root / "bytes")
    yield Row(
        "a lone surrogate in a prompt",
        tokenizer.decode(text.encode(half)),
        said(lambda: tokenizer(half)),
        "^a\ufffdb$",
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": talk[:1], "chosen": talk[1:], "rejected": []}
    (root / "preference.jsonl").write_text(json.dumps(row))
    form = ChatRows(kind="chat", field="chosen")
    yield Row(
        "a row of prompt, chosen and rejected, read with field: chosen",
        next(conversations(root / "preference.jsonl", form, tokenizer)).text,
        tokenizer.apply_chat_template(talk, tokenize=False),
    )
    (root / "array.jsonl").write_text('[{"text": "a"},\n {"text": "b"}]')
    yield Row(
        "a JSON array in a .jsonl file",
        str([*documents(root / "array.jsonl", JsonLines(kind="jsonl"))]),
        str([row["text"] for row in json.loads((root / "array.jsonl").read_text())]),
    )
    (root / "half.jsonl").write_text(json.dumps({"text": half}))
    yield Row(
        "a lone surrogate in JSON lines",
        str(*documents(root / "half.jsonl", JsonLines(kind="jsonl"))),
        said(lambda: json.loads((root / "half.jsonl").read_text())["text"].encode()),
        "^a\ufffdb$",
    )
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": half}]})
    yield Row("a lone surrogate in a request", str(body.messages[0].content), "-", "^a\ufffdb$")
    for name in ("text/my [2024] notes.txt", "text/b.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("text")
    (root / "text" / "loop").symlink_to(".")
    (root / "text" / "again.txt").symlink_to("b.txt")
    yield Row(
        "'text/**/*.txt', with a link back to the folder and one to a file",
        str(len(text_files(FileText(kind="files", paths=("text/**/*.txt",)), folder=root))),
        str(len(list((root / "text").glob("[bm]*.txt")))),
    )
    for given, count in (("text/my [2024] notes.txt", 1), ("text/*.txt", 2), ("text", 2)):
        source = FileText(kind="files", paths=(given,))
        read = text_source(given)["paths"][0]
        yield Row(
            f"init --data '{given}'",
            f"{len(text_files(source, folder=root))} files, {read == str(Path.cwd() / given)}",
            "-",
            f"^{count} files, True",
        )
    (root / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), root / "null.parquet")
    for name, form, place in (
        ("null.jsonl", JsonLines(kind="jsonl"), "line 2"),
        ("null.parquet", ParquetRows(kind="parquet"), "row 2"),
    ):
        yield Row(
            f"a null in {name}",
            said(lambda name=name, form=form: list(documents(root / name, form))),
            "-",
            f"{name}, {place}: the text under 'text' is null; leave the row out",
        )
    share = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (root / "share.json").write_text(json.dumps([{"conversations": share}]))
    chosen = text_source("share.json")["format"]
    (found,) = conversations(root / "share.json", ChatRows(**chosen), tokenizer)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    yield Row(
        "ShareGPT in one JSON array, as init reads it",
        found.text,
        tokenizer.apply_chat_template(turns, tokenize=False),
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    asked = [turns[0], {"role": "assistant", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tokenizer.chat_template = without_marks(TOOL_TEMPLATE)
    row = {"messages": asked, "tools": json.dumps([tool]), "system": "s"}
    (root / "tools.jsonl").write_text(json.dumps(row))
    (found,) = conversations(root / "tools.jsonl", ChatRows(kind="chat"), tokenizer)
    (span,) = found.answers or ()
    tokenizer.chat_template = TOOL_TEMPLATE
    theirs = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, *asked],
        tools=[tool],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learned = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    yield Row(
        "chat with a system text and tools (as JSON) beside a tool call: text, and what is learned",
        f"{found.text} | {found.text[slice(*span)]}",
        f"{tokenizer.decode(theirs['input_ids'])} | "
        f"{tokenizer.decode([token for token, mark in learned if mark])}",
    )
    bodies = [(CompletionBody, {"prompt": "a"} | body) for body in COMPLETIONS.values()]
    bodies += [(ChatBody, body) for body in CHATS.values()]
    for kind, sent in bodies:
        kind.model_validate({"model": "m"} | sent)
    named = ", ".join([*COMPLETIONS, *(f"{name} (chat)" for name in CHATS)])
    yield Row(f"payloads of clients: {named}", "taken", "-", "taken")


def _commands(root: Path) -> Iterator[Row]:
    models = root / "models"
    make_model(models / "base")
    (models / "fortunes-lora").mkdir()
    (models / "fortunes-lora" / "adapter_config.json").write_text("{}")
    mistyped = "models/fortuns-lora"
    yield Row(
        f"--teacher {mistyped}",
        said(lambda: teacher_source(mistyped, {})),
        said(lambda: AutoConfig.from_pretrained(mistyped, local_files_only=True)),
        "did you mean models/fortunes-lora",
    )
    yield Row(
        "generate models/base",
        said(lambda: exported_folder(Path("models/base"), command="generate")),
        "-",
        "is a model folder, not an exported student; `limbeck init",
    )
    (root / "mine.yaml").write_text("name: mine")
    yield Row(
        "verify mine.yaml",
        said(lambda: require_made(Path("mine.yaml"), command="verify")),
        "-",
        "is a recipe, .*`limbeck run mine.yaml` makes it",
    )
    pages = ("https://huggingface.co/some/base", "hf.co/some/base/")
    yield Row(
        f"--teacher {' and '.join(pages)}",
        str([teacher_source(page, {}) for page in pages]),
        str([{"model": {"kind": "hub", "id": "some/base"}}] * 2),
    )
    hub = HubModel(kind="hub", id="some/base")
    yield Row(
        "a hub model, offline",
        said(lambda: hub_config(hub.id, hub.revision)),
        said(lambda: AutoConfig.from_pretrained(hub.id, local_files_only=True)),
        "hf download some/base config.json",
    )
