"""Text that the student writes itself: `training.on_policy`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import compress
from compress import loop as train
from compress.data.blocks import IGNORED
from compress.footprint.language import describe
from compress.footprint.own_text import writing
from compress.models.language import load_model
from compress.tasks.language import LanguageTask
from compress.tasks.own_text import OwnText, Sampler
from limbeck.app.pico import shrink_to_pico
from limbeck.app.plan import plan_recipe
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import DataError, RecipeError
from limbeck.contract.recipe import OnPolicy, OwnPrompts, Recipe, parse_recipe
from limbeck.contract.sources.tokenizer import load_tokenizer
from tests.compress.tasks.own_measure import measure_own_text
from tests.compress.teachers.test_other_tokenizers import mixed
from tests.compress.teachers.test_served import source
from tests.compress.test_compress import TINY, events, interrupted_after, tiny
from tests.pico import make_model
from tests.servers.logprob_server import LogprobServer

OWN = {"share": 0.5, "prompts": {"tokens": 8}, "new_tokens": 12}
# What times a step, and so differs between equal trainings.
_TIMES = ("seconds", "tokens_per_second", "step_seconds")


def own_recipe(folder: Path, own: dict[str, Any] | None = None, **over: Any) -> Recipe:
    """The tiny recipe with four rows a step, of which the student writes half."""
    training = {"batch_tokens": 128, "tokens": 128 * 6, "micro_batch": 2}
    training |= {"on_policy": OWN | (own or {})} | over.pop("training", {})
    return tiny(folder, training=training, **over)


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def loaded(recipe: Recipe, work: Path) -> LanguageTask:
    task = train.setup(recipe=recipe, products={}, work=work, key="k").task
    assert isinstance(task, LanguageTask)
    return task


# Nothing changes without it ---------------------------------------------------------------------


def test_a_share_of_nothing_is_the_loop_without_it(tmp_path: Path) -> None:
    plain = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "plain")
    none = compress.distill(
        recipe=tiny(tmp_path, training={"on_policy": {"share": 0.0}}), out=tmp_path / "none"
    )
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (plain.path / name).read_bytes() == (none.path / name).read_bytes()
    assert not (none.path / "samples.jsonl").exists()
    drop = ("seconds", "tokens_per_second")
    logs = [
        [{k: v for k, v in row.items() if k not in drop} for row in events(a.path, "step")]
        for a in (plain, none)
    ]
    assert logs[0] == logs[1]


def test_steps_between_are_steps_without_it(tmp_path: Path) -> None:
    artifact = compress.distill(recipe=own_recipe(tmp_path, {"every": 3}), out=tmp_path / "s")
    steps = events(artifact.path, "step")
    assert [step["own_text"] is not None for step in steps] == [True, False, False] * 2
    assert {sample["step"] for sample in samples(artifact.path)} == {1, 4}


# Sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.9)])
def test_samples_are_distributed_as_the_warped_softmax(temperature: float, top_p: float) -> None:
    """Against torch's softmax and the definition of nucleus sampling, by a chi-squared test."""
    n, scores = 40_000, torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 9.0]])
    p = torch.softmax(scores[0, :5].double() / temperature, -1).numpy()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    p = np.array([p[i] if i in kept else 0.0 for i in range(5)])
    p /= p.sum()
    draws = torch.from_numpy(np.random.default_rng(5).random((n, 1)))
    sampler = Sampler(draws, vocabulary=5, temperature=temperature, top_p=top_p)
    chosen = sampler(torch.zeros(n, 1, dtype=torch.long), scores.expand(n, -1)).argmax(-1)
    counts = np.bincount(chosen.numpy(), minlength=6)
    assert not counts[5]  # a row that no tokenizer and no teacher knows
    assert not counts[:5][p == 0].any()
    assert scipy.stats.chisquare(counts[:5][p > 0], n * p[p > 0]).pvalue > 1e-3


def test_a_rows_text_does_not_depend_on_the_rows_beside_it(tmp_path: Path) -> None:
    """Left padding and batches of any size: the text that transformers gives each row alone."""
    task = loaded(own_recipe(tmp_path), tmp_path / "w")
    model, own = task.student.model, task.own
    assert own is not None
    prompts = own.prompts(0, task.batch(0)) + own.prompts(1, task.batch(1))
    prompts = [type(p)(p.row, p.place, p.seed, p.ids[: 3 + i]) for i, p in enumerate(prompts)]
    together = own.continuations(model, prompts)
    alone = [own.continuations(model, [prompt])[0] for prompt in prompts]
    assert [row.new for row in together] == [row.new for row in alone]
    # Each token is the inverse of the cumulative distribution of the model's own logits.
    row, ids = together[0], list(prompts[0].ids)
    draws = np.random.default_rng((*prompts[0].seed, 2)).random(12)
    model.eval()
    for token, draw in zip(row.new, draws, strict=False):
        with torch.no_grad():
            p = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)
        below = float(p[:token].sum())
        assert below - 1e-6 <= draw <= below + float(p[token]) + 1e-6
        ids.append(token)


def test_a_generation_configuration_does_not_change_what_is_sampled(tmp_path: Path) -> None:
    task = loaded(own_recipe(tmp_path), tmp_path / "w")
    assert task.own is not None
    prompts, lm = task.own.prompts(0, task.batch(0)), task.student.model.get_base_model()
    before = [row.new for row in task.own.continuations(task.student.model, prompts)]
    lm.generation_config.repetition_penalty = 5.0
    lm.generation_config.no_repeat_ngram_size = 1
    assert [row.new for row in task.own.continuations(task.student.model, prompts)] == before
    assert lm.generation_config.repetition_penalty == 5.0


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.5, 8), (0.3, 8), (1.0, 3), (0.1, 4)])
def test_the_share_holds_over_steps_and_every_process_gets_its_part(
    tmp_path: Path, share: float, count: int
) -> None:
    own = loaded(own_recipe(tmp_path, {"share": share}), tmp_path / "w").own
    assert isinstance(own, OwnText)
    steps = [own.rows(step, count) for step in range(50)]
    assert sum(map(len, steps)) == pytest.approx(50 * share * count, abs=1)
    assert {row for rows in steps for row in rows} == set(range(count))
    if not count % 2:
        for rows in steps:
            assert abs(2 * sum(row % 2 for row in rows) - len(rows)) <= 1


def test_a_written_row_keeps_its_prompt_and_scores_the_rest(tmp_path: Path) -> None:
    task = loaded(own_recipe(tmp_path), tmp_path / "w")
    assert task.own is not None
    batch = task.batch(0)
    written = task.own.write(task.student.model, 0, batch, rank=0, processes=1)
    assert [row.prompt.row for row in written.rows] == task.own.rows(0, 4)
    for index in range(4):
        if not written.is_own_R[index]:
            assert torch.equal(written.ids_RL[index], batch[1][index])
            assert torch.equal(written.labels_RL[index], batch[2][index])
    for own in written.rows:
        row, p = own.prompt.row, len(own.prompt.ids)
        assert written.ids_RL[row, :p].tolist() == batch[1][row, :p].tolist()
        assert written.ids_RL[row, p : len(own)].tolist() == own.new
        assert 1 <= len(own.new) <= 12
        labels = written.labels_RL[row]
        assert labels[p - 1 : p - 1 + len(own.new)].tolist() == own.new
        assert int((labels != IGNORED).sum()) == len(own.new)
        assert written.prompt_labels_RL[row, : p - 1].tolist() == own.prompt.ids[1:]
        assert int((written.prompt_labels_RL[row] != IGNORED).sum()) == p - 1


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "entropy_switch"])
def test_a_student_equal_to_its_only_teacher_has_nothing_to_learn(
    tmp_path: Path, divergence: str
) -> None:
    """Loss and gradient are zero on own text: no label is learnt there."""
    recipe = own_recipe(
        tmp_path,
        {"share": 1.0},
        teachers=[{"name": "a", "model": {"kind": "random", "config": TINY, "seed": 0}}],
        student={"dropout": 0.0, "init": "base"},
        fusion={"divergence": {"kind": divergence}, "calibration": {"kind": "none"}},
        features={"weight": 0.0},
        training={"tokens": 128},
    )
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    (step,) = events(artifact.path, "step")
    assert step["loss"] == pytest.approx(0, abs=1e-6)
    assert step["gradient_norm"] == pytest.approx(0, abs=1e-5)
    assert step["own_text"]["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert step["cross_entropy"] is None


def test_the_loss_on_own_text_is_the_formula_on_the_texts_that_were_kept(tmp_path: Path) -> None:
    """One step, again from the kept ids with transformers' logits and torch's `kl_div`.

    The weights are Bayes' rule over the teachers, with the prompt in the evidence.
    """
    recipe = own_recipe(
        tmp_path,
        {"share": 1.0},
        student={"dropout": 0.0, "init": "base"},
        fusion={"divergence": {"kind": "reverse_kl"}, "calibration": {"kind": "none"}},
        features={"weight": 0.0},
    )
    run = train.setup(recipe=recipe, products={}, work=tmp_path / "w", key="k")
    task = run.task
    assert isinstance(task, LanguageTask)
    student = run.accelerator.prepare(task.student)
    student.train()
    step = task.step(0, progress=0.0)
    loss = sum(float(step.loss(student, part).detach()) for part in step.parts)
    assert step.written is not None
    total = ratio = count = 0.0
    folders = [task.folder, *(f.base for f in task.folders)]
    models = [load_model(folder) for folder in folders]
    for own in step.written.rows:
        ids, p = torch.tensor([[*own.prompt.ids, *own.new]]), len(own.prompt.ids)
        logq, *logps = [torch.log_softmax(m(input_ids=ids).logits[0].double(), -1) for m in models]
        said = torch.stack([lp[:-1].gather(1, ids[0, 1:, None])[:, 0] for lp in logps])
        for t in range(p - 1, ids.shape[1] - 1):
            weights = torch.softmax(said[:, :t].sum(1), 0)
            mixture = torch.logsumexp(
                torch.stack([lp[t] for lp in logps]) + weights.log()[:, None], 0
            )
            total += float(
                torch.nn.functional.kl_div(mixture, logq[t], reduction="sum", log_target=True)
            )
            ratio += float((logq[t] - mixture)[ids[0, t + 1]])
            count += 1
    assert step.count == count
    assert loss == pytest.approx(0.7 * total / count, rel=1e-4)
    figures = step.figures()
    assert figures["own_text"]["divergence"] == pytest.approx(total / count, rel=1e-4)
    assert figures["own_text"]["reverse_kl"] == pytest.approx(ratio / count, rel=1e-3)
    assert sum(figures["own_text"]["weights"]["code"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["label", "ca_mkd", "corrected_entropy"])
def test_weights_that_look_at_the_drawn_token_give_no_reverse_kl(tmp_path: Path, kind: str) -> None:
    """They favour the teacher that expects it, so the estimate would be too low."""
    task = loaded(own_recipe(tmp_path, fusion={"weights": {"kind": kind}}), tmp_path / "w")
    step = task.step(0, progress=0.0)
    for part in step.parts:
        step.loss(task.student, part)
    own = step.figures()["own_text"]
    assert own["reverse_kl"] is None
    assert own["judged"] == own["tokens"] > 0


def test_own_and_corpus_rows_add_up_whatever_the_micro_batch(tmp_path: Path) -> None:
    losses = []
    for micro in (1, 2, 4):
        recipe = own_recipe(
            tmp_path, student={"dropout": 0.0}, training={"micro_batch": micro, "tokens": 128 * 3}
        )
        artifact = compress.distill(recipe=recipe, out=tmp_path / f"micro-{micro}")
        losses.append([step["loss"] for step in events(artifact.path, "step")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The student of the recipe with own text, made without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return compress.distill(recipe=own_recipe(folder), out=folder / "whole")


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_writes_the_same_text(
    whole: Artifact, tmp_path: Path, after: int
) -> None:
    with interrupted_after(after):
        compress.distill(recipe=own_recipe(tmp_path), out=tmp_path / "cut")
    torch.rand(7)  # whatever the process did in between
    cut = compress.distill(recipe=own_recipe(tmp_path), out=tmp_path / "cut")
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes()
    logs = [
        [{k: v for k, v in row.items() if k not in _TIMES} for row in events(a.path, "step")]
        for a in (whole, cut)
    ]
    assert logs[0] == logs[1]
    assert [s["step"] for s in samples(whole.path)] == [n for n in range(1, 7) for _ in range(2)]


def test_own_text_teaches_what_the_corpus_does_not(tmp_path: Path) -> None:
    """A language of a random Markov chain, and a teacher that knows another one beside it.

    At equal tokens and steps, with the same divergence, the student that also reads its own text is
    nearer to the teacher on its own text.
    """
    draw = np.random.default_rng(0)
    chain, letters = draw.dirichlet(np.full(12, 0.3), size=12), "abcdefgh \n.,"
    text = [0]
    for _ in range(20_000):
        text.append(int(draw.choice(12, p=chain[text[-1]])))
    (tmp_path / "chain.txt").write_text("".join(letters[i] for i in text))
    source = {"kind": "files", "paths": ["chain.txt"]}
    wide = {"hidden_size": 64, "initializer_range": 0.5}
    found = {}
    for share in (0.0, 0.5):
        recipe = own_recipe(
            tmp_path,
            {"share": share},
            teachers=[{"name": "a", "model": {"kind": "random", "config": TINY | wide, "seed": 1}}],
            data={"domains": [{"name": "chain", "text": source}]},
            fusion={"divergence": {"kind": "reverse_kl"}, "weight": 1.0, "cross_entropy": 0.0},
            features={"weight": 0.0},
            training={"tokens": 128 * 60, "evaluate_every": 60, "checkpoint_every": 60},
        )
        tree = recipe.resolved() | {"student": {"kind": "fresh", "config": TINY}}
        fresh = parse_recipe(tree)
        fresh._folder = tmp_path
        run = train.setup(recipe=fresh, products={}, work=tmp_path / str(share), key="k")
        train.measure_teachers(run)
        assert train.fit(run).step == 60
        task = run.task
        assert isinstance(task, LanguageTask)
        asked = OnPolicy(prompts=OwnPrompts(tokens=8), new_tokens=20)
        own = OwnText(fresh, asked, load_tokenizer(task.folder), vocabulary=task.vocabulary)
        prompts = [p for step in range(1000, 1016) for p in own.prompts(step, task.batch(step))]
        found[share] = measure_own_text(task, own, prompts)
    assert found[0.5].reverse_kl < 0.95 * found[0.0].reverse_kl


def test_a_teacher_of_another_tokenizer_reads_own_text(tmp_path: Path) -> None:
    own = {"share": 1.0, "prompts": {"tokens": 8}, "new_tokens": 12}
    recipe = mixed(tmp_path, training={"on_policy": own, "tokens": 64 * 3})
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    for step in events(artifact.path, "step"):
        assert math.isfinite(step["loss"])
        assert step["gradient_norm"] > 0
        assert math.isfinite(step["own_text"]["reverse_kl"])
        assert step["own_text"]["divergence"] >= 0
    assert all("<|" not in s["text"].removesuffix("<|end|>") for s in samples(artifact.path))


# Every kind of student ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student",
    [
        {"kind": "fresh", "config": TINY},
        {
            "kind": "shrink",
            "base": {"kind": "random", "config": TINY, "seed": 0},
            "layers": 1,
            "calibration_blocks": 2,
        },
    ],
    ids=["fresh", "shrink"],
)
def test_whole_students_write_and_learn(tmp_path: Path, student: dict[str, Any]) -> None:
    recipe = own_recipe(tmp_path, features={"weight": 0.0}).resolved() | {"student": student}
    artifact = compress.distill(recipe=parse_recipe(recipe), out=tmp_path / "student")
    steps = events(artifact.path, "step")
    assert all(math.isfinite(step["own_text"]["reverse_kl"]) for step in steps)
    assert {*steps[0]["step_seconds"]} == {"generate", "teachers", "student"}
    weights = load_file(artifact.path / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


# The plan -----------------------------------------------------------------------------------------


def test_the_plan_counts_what_writing_takes(tmp_path: Path) -> None:
    """Operations by torch's counter during the writing, bytes of transformers' own cache."""
    recipe = own_recipe(tmp_path, {"batch": 2}, training={"tokens": 128 * 2})
    task = loaded(recipe, tmp_path / "w")
    own, model = task.own, task.student.model
    assert own is not None
    shape = describe(model.get_base_model().config)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_base_model().model(input_ids=tokens)
    taken = writing(
        recipe, shape.config, parameters=shape.parameters, compute=4,
        head=2 * shape.width * shape.vocabulary, forward=counter.get_total_flops() / 32,
    )  # fmt: skip
    assert taken is not None
    own._tokenizer.eos_token_id, own._vocabulary = None, 256  # no row ends early
    model.get_base_model().generation_config.eos_token_id = None
    with FlopCounterMode(display=False) as counter:
        prompts = [own.prompts(step, task.batch(step)) for step in (0, 1)]
        rows = [row for group in prompts for row in own.continuations(model, group)]
    assert sum(len(row.new) for row in rows) == taken.tokens == 4 * 12
    assert taken.operations == pytest.approx(counter.get_total_flops(), rel=0.1)
    with torch.no_grad():
        ids = torch.zeros(2, 20, dtype=torch.long)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert taken.cache == kept


def test_a_plan_says_how_much_the_student_writes(tmp_path: Path) -> None:
    found = plan_recipe(own_recipe(tmp_path))
    assert found.own_text == 6 * 2 * 12
    assert "own text              at most 144 tokens written by the student" in found.as_text()
    plain = plan_recipe(own_recipe(tmp_path, {"share": 0.0}))
    assert plain.own_text == 0
    assert "own text" not in plain.as_text()
    assert found.operations > plain.operations


def test_own_text_shrinks_with_its_recipe(tmp_path: Path) -> None:
    over = {"data": {"block": 64}, "training": {"on_policy": {"prompts": {"tokens": 63}}}}
    small = shrink_to_pico(tiny(tmp_path, **over))
    assert small.training.on_policy is not None
    assert small.training.on_policy.prompts.tokens < small.data.block


# The recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        ({"teachers": []}, r"training.on_policy: only teachers can judge own text; name teachers"),
        ({"fusion": {"weight": 0.0}}, r"fusion.weight is 0; raise fusion.weight"),
        (
            {"training": {"teacher_cache": "hidden"}},
            r"a teacher cache cannot know own text beforehand; set training.teacher_cache: none",
        ),
        (
            {"training": {"on_policy": {"prompts": {"tokens": 32}}}},
            r"on_policy.prompts.tokens: found 32; it should be below data.block \(32\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, over: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        own_recipe(tmp_path, **over)


def test_prompts_come_from_a_text_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "Once upon"}\n{"text": "In the"}\n')
    source = {"kind": "files", "paths": ["prompts.jsonl"], "format": {"kind": "jsonl"}}
    own = {"prompts": {"tokens": 6, "text": source}}
    artifact = compress.distill(recipe=own_recipe(tmp_path, own), out=tmp_path / "student")
    assert {s["prompt"] for s in samples(artifact.path)} == {"Once u", "In the"}
    assert set(events(artifact.path, "step")[0]["own_text"]["weights"]) == {"prompts"}
    assert "text own-text prompts" in artifact.manifest["parents"]
    (tmp_path / "prompts.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"on_policy.prompts.text: no document.*prompts.jsonl"):
        compress.distill(recipe=own_recipe(tmp_path, own), out=tmp_path / "other")


@pytest.mark.parametrize("granularity", ["token", "batch"])
def test_a_server_reads_each_text_once_and_without_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    """Whatever stands beside it in a micro-batch, and where a step reads it twice."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    rows = "".join(json.dumps({"text": "word" * n}) + "\n" for n in range(1, 6))
    (tmp_path / "prompts.jsonl").write_text(rows)
    form = {"kind": "jsonl", "field": "text"}
    text = {"kind": "files", "paths": ["prompts.jsonl"], "format": form}
    folder = make_model(tmp_path / "big", seed=5)
    with LogprobServer(folder) as server:
        recipe = own_recipe(
            tmp_path,
            {"share": 1.0, "prompts": {"text": text, "tokens": 20}, "new_tokens": 6},
            teachers=[{"name": "big", "model": source(server, folder)}],
            student={"base": {"kind": "local", "path": str(folder)}, "init": "base"},
            fusion={"calibration": {"kind": "none"},
                    "weights": {"kind": "entropy", "granularity": granularity}},
        )  # fmt: skip
        made = compress.distill(recipe=recipe, out=tmp_path / "student")
        written = samples(made.path)
        asked = len(list((tmp_path / "cache").glob("teachers/served-*/answers/*")))
        assert asked == len(written)
        expected = sorted(len(sample["prompt"]) + sample["tokens"] for sample in written)
        assert sorted(len(prompt) for prompt in server.asked[-asked:]) == expected
    assert len(set(expected)) > 1
