"""Distilling from teachers of other tokenizers, from the recipe to the student's result."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import compress
from compress import loop as train
from compress.data.training_text import heldout_batches
from compress.head import IGNORED
from compress.models.language import byte_tokenizer
from compress.tasks.continuations import against_mixture
from compress.tasks.language import LanguageTask
from compress.tasks.own_terms import evidence_of_prompts
from compress.teachers.pairs import measure_coverage, pair_teachers
from limbeck.contract.errors import DataError, ModelError, RecipeError
from limbeck.contract.recipe import Recipe
from tests.compress.test_compress import TINY, events, tiny
from tests.tokenizers import END, byte_level, piece_level


def save_teacher(folder: Path, tokenizer: Tokenizer, *, seed: int = 3, **sizes: Any) -> Path:
    """A random causal LM with a tokenizer of its own."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token="<bos>" if tokenizer.token_to_id("<bos>") is not None else END,
    )
    options = {**TINY, "vocab_size": len(fast), "max_position_embeddings": 128, **sizes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(options.pop("model_type"), **options)
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def mixed(tmp_path: Path, **over: Any) -> Recipe:
    """One random teacher of the student's tokenizer, and one of another."""
    save_teacher(tmp_path / "gemma", piece_level(), hidden_size=48)
    teachers = [
        {"name": "own", "model": {"kind": "random", "config": TINY, "seed": 1}},
        {"name": "other", "model": {"kind": "local", "path": "gemma"}, **over.pop("other", {})},
    ]
    return tiny(tmp_path, teachers=teachers, **over)


@pytest.mark.parametrize("across", ["projected", "chunk", "uld"])
def test_a_student_learns_from_both(tmp_path: Path, across: str) -> None:
    recipe = mixed(tmp_path, fusion={"across": across}, training={"tokens": 64 * 30})
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    first, *_, last = events(artifact.path, "evaluate")
    assert last["mean_nll"] < first["mean_nll"] - 0.1
    steps = events(artifact.path, "step")
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert {"own", "other"} == set(steps[0]["weights"]["code"])
    assert steps[0]["weights"]["code"]["other"] > 0
    found = artifact.result["teachers"]["other"]
    for coverage in found["coverage"].values():
        assert 0.9 < coverage["bytes"] <= 1
        assert 0 < coverage["positions"] <= 1
    assert "coverage" not in artifact.result["teachers"]["own"]
    # The bytes that a teacher of another tokenizer reads are those of the student.
    for domain, bits in found["bits_per_byte"].items():
        assert bits / found["nll"][domain] == pytest.approx(
            artifact.result["bits_per_byte"][domain] / artifact.result["nll"][domain]
        )


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    losses = []
    for micro in (1, 2):
        recipe = mixed(
            tmp_path,
            training={"micro_batch": micro, "tokens": 64 * 3},
            student={"dropout": 0.0},
            fusion={"weights": {"kind": "entropy", "granularity": "batch"}},
        )
        artifact = compress.distill(recipe=recipe, out=tmp_path / str(micro))
        losses.append([step["loss"] for step in events(artifact.path, "step")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("across", ["projected", "chunk"])
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_cache_gives_the_live_loss(tmp_path: Path, kind: str, across: str) -> None:
    """`topk` keeps every token here, so that only the rounding of `hidden` to bf16 differs."""
    losses = []
    cache = {"kind": "topk", "k": 1000} if kind == "topk" else {"kind": kind}
    for chosen in ({"kind": "none"}, cache):
        recipe = mixed(
            tmp_path,
            training={"teacher_cache": chosen, "tokens": 64 * 4},
            student={"dropout": 0.0},
            features={"weight": 0.0 if kind == "topk" else 0.1},
            fusion={"across": across, "calibration": {"kind": "none"}},
        )
        artifact = compress.distill(recipe=recipe, out=tmp_path / chosen["kind"])
        losses.append([step["loss"] for step in events(artifact.path, "step")])
        nll = artifact.result["teachers"]["other"]["nll"]
        losses[-1] += list(nll.values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if kind == "topk" else 2e-3)


def test_unbiased_samples_hold_for_other_tokenizers(tmp_path: Path) -> None:
    recipe = mixed(
        tmp_path,
        training={"teacher_cache": {"kind": "topk", "k": 16, "sampling": "unbiased"},
                  "tokens": 64 * 2},
        features={"weight": 0.0},
        fusion={"calibration": {"kind": "none"}},
    )  # fmt: skip
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    assert all(math.isfinite(step["loss"]) for step in events(artifact.path, "step"))


def test_the_floor_of_coverage_stops_with_the_numbers(tmp_path: Path) -> None:
    recipe = mixed(tmp_path, other={"min_coverage": 1.0})
    with pytest.raises(DataError, match=r"teachers\.1\.min_coverage: other has .*% of code"):
        compress.distill(recipe=recipe, out=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_teacher_of_the_base_s_shape_is_not_merged_into_it(tmp_path: Path) -> None:
    recipe = mixed(tmp_path)
    save_teacher(tmp_path / "gemma", byte_level(len(byte_tokenizer()) + 3), vocab_size=257)
    teachers = [{"name": "other", "model": {"kind": "local", "path": "gemma"}}]
    student = {**recipe.resolved()["student"], "init": "merge"}
    merging = tiny(tmp_path, teachers=teachers).model_copy()
    merging = tiny(tmp_path, teachers=teachers, student=student)
    with pytest.raises((RecipeError, ModelError)):
        compress.distill(recipe=merging, out=tmp_path / "student")


def in_pairs(tmp_path: Path, training: dict[str, Any], **over: Any) -> LanguageTask:
    """A student of single bytes, and a teacher whose first token has several of a text's bytes,
    so that it judges none of them: it has no token before a text."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog sat on the log;\n" * 99)
    domain = {"name": "cats", "text": {"kind": "files", "paths": ["text.txt"]}}
    save_teacher(tmp_path / "pairs", byte_level(330), initializer_range=0.3)
    wide = {**TINY, "vocab_size": 300, "initializer_range": 0.3}  # rows without a token
    recipe = tiny(
        tmp_path,
        teachers=[
            {"name": "own", "model": {"kind": "random", "config": wide, "seed": 1}},
            {"name": "other", "model": {"kind": "local", "path": "pairs"}},
        ],
        data={"domains": [domain]},
        features={"weight": 0.0},
        training={"batch_tokens": 128, "micro_batch": 2, **training},
        fusion={"calibration": {"kind": "none"}, **over},
    )
    task = train.setup(recipe=recipe, products={}, work=tmp_path / "w", key="k").task
    assert isinstance(task, LanguageTask)
    return task


@torch.no_grad()
def judged(task: LanguageTask, row: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    """Of one row: log-probabilities ``[L, V]`` of `own`; the byte where each token of `other` ends,
    and its log-probabilities ``[M, V_T]``, with their own tokens. By transformers.
    """
    pair = task.pairs[1]
    assert pair is not None
    own, other = (AutoModelForCausalLM.from_pretrained(f.base).eval() for f in task.folders)
    text = torch.tensor(pair.align(row[None], labels[None]).texts)
    ends = torch.tensor([len(piece) for piece in pair.aligner.other.pieces(text[0].tolist())])
    theirs = torch.log_softmax(other(text).logits[0].double(), -1)
    return (
        torch.log_softmax(own(row[None]).logits[0, :, : task.vocabulary].double(), -1),
        (ends.cumsum(0).tolist(), theirs, text[0]),
    )


def test_bytes_of_a_prompt_that_a_teacher_does_not_judge_speak_for_none(tmp_path: Path) -> None:
    asked = {"share": 1.0, "prompts": {"tokens": 12}, "new_tokens": 1}
    task = in_pairs(tmp_path, {"on_policy": asked})
    written = task.step(0, progress=0.0).written
    assert written is not None
    prompts, rows = written.prompt_labels_RL, written.ids_RL
    read = torch.where(written.labels_RL == IGNORED, prompts, written.labels_RL)
    states, _ = task.teachers.states(rows, labels_RL=read)
    found = evidence_of_prompts(task, states, prompts)
    assert found is not None
    unjudged = 0
    for n, row in enumerate(rows):
        logp, (ends, theirs, text) = judged(task, row, read[n])
        mine = logp[:11].gather(1, row[1:12, None])[:, 0]
        said = [theirs[m - 1, text[m]] for m in range(1, len(text)) if ends[m] <= 12]
        assert found[0, n] == pytest.approx(float(mine.sum()), rel=1e-4)
        expected = float(mine[: ends[0] - 1].sum() + sum(said))
        assert found[1, n] == pytest.approx(expected, rel=1e-4)
        unjudged += ends[0] - 1
    assert unjudged


def test_means_of_a_batch_are_of_the_same_tokens_and_bytes(tmp_path: Path) -> None:
    """Of tokens that all have, as each position's are; and bytes that `other` does not judge speak
    for no teacher."""
    weights = {"kind": "label", "granularity": "batch"}
    task = in_pairs(tmp_path, {}, weights=weights)
    step = task.step(0, progress=0.0)
    assert step._means_2K is not None
    entropy, mine, other = 0.0, 0.0, 0.0
    for row, labels in zip(step.ids_RL, step.labels_RL, strict=True):
        logp, (ends, theirs, text) = judged(task, row, labels)
        valid = labels != IGNORED
        entropy -= float((logp.exp() * logp).sum(-1)[valid].sum())
        each = logp[valid].gather(1, labels[valid][:, None])[:, 0]
        mine += float(each.sum())
        other += float(each[: ends[0] - 1].sum())
        other += sum(float(theirs[m - 1, text[m]]) for m in range(1, len(text)))
    assert step._means_2K[0, 0] == pytest.approx(entropy / step.count, rel=1e-4)
    assert step._means_2K[1, 0] == pytest.approx(mine / step.count, rel=1e-4)
    assert step._means_2K[1, 1] == pytest.approx(other / step.count, rel=1e-4)


@pytest.mark.parametrize("some", [True, False])
def test_held_out_text_that_a_teacher_does_not_judge_is_not_taken_for_known(
    tmp_path: Path, some: bool
) -> None:
    """A row that is one token of the teacher's has the nats a byte of its domain, and not 0."""
    save_teacher(tmp_path / "pairs", byte_level(330), initializer_range=0.3)
    rows = ["the", "the dog sat on the log"] if some else ["the"]
    lines = ""
    for n in range(30):  # every third row is held out
        for row in (
            "the cat sat on the mat, " * 4,
            "the dog sat on the log; " * 4,
            rows[n % len(rows)],
        ):
            lines += json.dumps({"text": row}) + "\n"
    (tmp_path / "rows.jsonl").write_text(lines)
    text = {"kind": "files", "paths": ["rows.jsonl"], "format": {"kind": "jsonl"}}
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "other", "model": {"kind": "local", "path": "pairs"}}],
        data={"domains": [{"name": "rows", "text": text}],
              "heldout": {"every": 3, "piece_chars": 128, "blocks": 6}},
        features={"weight": 0.0},
        fusion={"calibration": {"kind": "none"}},
    )  # fmt: skip
    task = train.setup(recipe=recipe, products={}, work=tmp_path / "w", key="k").task
    assert isinstance(task, LanguageTask)
    if not some:
        wanted = "teachers.0: other judges no held-out text of rows"
        with pytest.raises(DataError, match=wanted):
            task.measure_teacher(0)
        return
    found = task.measure_teacher(0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pairs")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pairs").eval()
    ids = torch.tensor([tokenizer(rows[1], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    nats = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    first = len(tokenizer.decode(ids[0, 0]))  # what nothing precedes is not judged
    expected = nats / (len(rows[1]) - first) / math.log(2)
    assert found.bits_per_byte is not None
    assert found.bits_per_byte["rows"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cache", ["none", "hidden"])
def test_a_text_that_is_too_long_in_the_teacher_s_tokens_is_named(
    tmp_path: Path, cache: str
) -> None:
    """A block fits in the student's tokens; the teacher has no position for all of its own."""
    base = save_teacher(tmp_path / "base", byte_level(400))
    save_teacher(tmp_path / "short", byte_level(258), max_position_embeddings=32)
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "short", "model": {"kind": "local", "path": "short"}}],
        student={"base": {"kind": "local", "path": str(base)}},
        training={"teacher_cache": {"kind": cache}},
    )
    wanted = r"teacher short: a block of the text takes \d+ of its tokens, but it reads 32 at most"
    with pytest.raises(ModelError, match=wanted):
        compress.distill(recipe=recipe, out=tmp_path / "student")


# Which are the same ------------------------------------------------------------------------------


def test_added_tokens_leave_the_map_the_same(tmp_path: Path) -> None:
    own, other = byte_level(), byte_level()
    other.add_special_tokens(["<tool>"])
    for name, tokenizer in (("own", own), ("other", other), ("third", byte_level(290))):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(
            tmp_path / name
        )
    found = pair_teachers(tmp_path / "own", {n: tmp_path / n for n in ("own", "other", "third")})
    assert [pair is None for pair in found.pairs] == [True, True, False]
    assert found.differ == ((), ("<tool>",), ())
    assert found.digest(0) is None
    assert found.digest(2) is not None


@pytest.mark.parametrize("added", [[], ["<tool>"]], ids=["same", "added"])
def test_the_same_map_in_another_file_gives_the_present_loss_to_the_bit(
    tmp_path: Path, added: list[str]
) -> None:
    base = save_teacher(tmp_path / "base", byte_level(400))
    teacher = save_teacher(tmp_path / "teacher", byte_level(400), seed=4, vocab_size=400)
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "twin", "model": {"kind": "local", "path": str(teacher)}}],
        student={"base": {"kind": "local", "path": str(base)}},
    )
    weights = []
    for out in ("present", "other"):
        artifact = compress.distill(recipe=recipe, out=tmp_path / out)
        steps = events(artifact.path, "step")
        saved = (artifact.path / "model" / "model.safetensors").read_bytes()
        weights.append(([step["loss"] for step in steps], saved))
        other = byte_level(400)
        other.add_special_tokens(added)
        other.save(str(teacher / "tokenizer.json"), pretty=False)
    assert weights[0] == weights[1]


def test_the_mixture_of_the_table_is_over_the_tokens_that_all_have(tmp_path: Path) -> None:
    """Against transformers' logits: one teacher has a token more than student and other teacher."""
    wide = byte_level()
    V = wide.get_vocab_size()
    wide.add_special_tokens(["<tool>"])
    folders = [
        save_teacher(tmp_path / "base", byte_level(), seed=0),
        save_teacher(tmp_path / "own", byte_level(), seed=1),
        save_teacher(tmp_path / "wide", wide, seed=2),
    ]
    recipe = tiny(
        tmp_path,
        teachers=[{"name": n, "model": {"kind": "local", "path": n}} for n in ("own", "wide")],
        student={"base": {"kind": "local", "path": "base"}, "init": "base", "dropout": 0.0},
    )
    task = train.setup(recipe=recipe, products={}, work=tmp_path / "w", key="k").task
    assert isinstance(task, LanguageTask)
    batches = [heldout_batches(b.heldout) for b in task.blocks]
    divergence = count = 0.0
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    for ids, labels in itertools.chain.from_iterable(batches):
        with torch.no_grad():
            logits = [m(ids).logits[labels != IGNORED][:, :V] for m in models]
        q, *p = [torch.log_softmax(z.double(), -1) for z in logits]
        mixture = torch.stack(p).exp().mean(0).log()
        divergence += float(
            torch.nn.functional.kl_div(q, mixture, reduction="sum", log_target=True)
        )
        count += len(q)
    found = against_mixture(task, batches)
    assert found["kl_to_mixture"] == pytest.approx(divergence / count, rel=1e-4)


def test_text_with_a_token_that_the_teacher_lacks_is_refused(tmp_path: Path) -> None:
    student = byte_level()
    student.add_special_tokens(["<tool>"])
    save_teacher(tmp_path / "base", student)
    save_teacher(tmp_path / "teacher", byte_level())
    (tmp_path / "text.txt").write_text("the cat <tool> sat on the mat and the dog\n" * 80)
    text = {"kind": "files", "paths": ["text.txt"]}
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "t", "model": {"kind": "local", "path": "teacher"}}],
        student={"base": {"kind": "local", "path": "base"}},
        data={"domains": [{"name": "tools", "text": text}]},
    )
    with pytest.raises(ModelError, match=r"teacher t: its tokenizer does not have .*'<tool>'"):
        compress.distill(recipe=recipe, out=tmp_path / "student")


def test_coverage_counts_bytes_and_labels(tmp_path: Path) -> None:
    """Against a count by hand: tokens of single bytes against pairs of bytes."""
    for name, tokenizer in (("own", byte_level(257)), ("other", byte_level(330))):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(
            tmp_path / name
        )
    found = pair_teachers(tmp_path / "own", {"other": tmp_path / "other"})
    pair = found[0]
    assert pair is not None
    ids = pair.aligner.own.tokenizer.encode("the cat sat").ids
    theirs = pair.aligner.other.tokenizer.encode("the cat sat").ids
    labels = [*ids[1:], -100]
    coverage = measure_coverage(pair, [([ids], [labels])])
    ends = [len(pair.aligner.other.tokenizer.decode(theirs[: n + 1])) for n in range(len(theirs))]
    assert coverage.positions == pytest.approx(
        len([end for end in ends if end < len(ids)]) / (len(ids) - 1)
    )
    first = ends[0]  # its chunk begins before the first label
    whole = len(ids) - 1
    assert coverage.bytes == pytest.approx((len(ids) - first) / whole if first > 1 else 1)


@torch.no_grad()
def test_features_are_compared_where_both_sides_end_a_token(tmp_path: Path) -> None:
    """By transformers' states. A token of byte-level BPE has one character for each byte."""
    text = "  naïve café a\u0301e\u0308 🙂👍🏽 語言 は\r\n\tthe cat  sat, 1234 ﬁsh\u200d\u00a0\n"
    (tmp_path / "odd.txt").write_bytes(text.encode() * 60)
    folders = [tmp_path / name for name in ("base", "other")]
    save_teacher(folders[0], byte_level(330), seed=1)
    save_teacher(folders[1], byte_level(420, words=False), hidden_size=48, num_hidden_layers=3)
    recipe = tiny(
        tmp_path,
        teachers=[{"name": "other", "model": {"kind": "local", "path": "other"}}],
        student={"base": {"kind": "local", "path": "base"}, "init": "base", "dropout": 0.0},
        data={"domains": [{"name": "odd", "text": {"kind": "files", "paths": ["odd.txt"]}}]},
        features={"weight": 0.3, "layers": [[1, 2], [2, 3]]},
        fusion={"calibration": {"kind": "none"}},
        training={"batch_tokens": 32, "micro_batch": 1},
    )
    task = train.setup(recipe=recipe, products={}, work=tmp_path / "w", key="k").task
    assert isinstance(task, LanguageTask)
    assert task.student.projections is not None
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    own, other = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    compared = 0
    for step in (task.step(index, progress=1.0) for index in range(8)):
        ids = step.ids_RL[0, : int((step.labels_RL[0] != IGNORED).sum()) + 1]
        if "\ufffd" in own.decode(ids):  # cut within a character
            continue
        read = torch.tensor(other(own.decode(ids), add_special_tokens=False).input_ids)
        mine, theirs = (
            list(itertools.accumulate(map(len, tokenizer.convert_ids_to_tokens(side))))
            for tokenizer, side in ((own, ids.tolist()), (other, read.tolist()))
        )
        at = [(i, theirs.index(end)) for i, end in enumerate(mine[:-1]) if end in theirs]
        states = [
            model(side[None], output_hidden_states=True).hidden_states
            for model, side in zip(models, (ids, read), strict=True)
        ]
        expected = (
            sum(
                float(
                    1 - torch.cosine_similarity(linear(states[0][a][0, i]), states[1][b][0, j], 0)
                )
                for linear, (a, b) in zip(
                    task.student.projections.linears[0], [(1, 2), (2, 3)], strict=True
                )
                for i, j in at
            )
            / 2
        )
        step.loss(task.student, step.parts[0])
        assert step.figures()["features"] == pytest.approx(expected / (len(ids) - 1), rel=1e-4)
        assert 0 < len(at) < len(ids) - 1
        compared += 1
    assert compared
