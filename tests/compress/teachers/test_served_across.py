"""Teachers behind a server with another tokenizer: what they answer is what the local ones give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.ablate.arms import require_arm
from compress.aligned import AlignedStates, Alignment
from compress.models.body import Body
from compress.states import SparseStates
from compress.teachers.cache import CachedTeachers
from compress.teachers.pairs import Pairs, pair_teachers
from compress.teachers.served import ServedTeachers, served_teacher
from limbeck.app.plan import plan_recipe
from limbeck.app.products import mistakes
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import DataError, RecipeError
from limbeck.contract.recipe import Recipe, TopkCache
from limbeck.contract.sources.teacher_tokens import compare_tokenizers
from tests.compress.teachers.test_across import rows
from tests.compress.teachers.test_other_tokenizers import save_teacher
from tests.compress.teachers.test_served import local, source
from tests.compress.test_compress import TINY, events, tiny
from tests.serve_bench.serve.asking import serving
from tests.servers.logprob_server import LogprobServer
from tests.tokenizers import byte_level, piece_level

ALL = 420  # tokens of the teacher
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "gemma"
    return save_teacher(folder, piece_level(ALL), initializer_range=0.3)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("student") / "student", byte_level())


@pytest.fixture
def server(gemma: Path) -> Iterator[LogprobServer]:
    with LogprobServer(gemma) as serving:
        yield serving


def far(server: LogprobServer, gemma: Path, **over: Any) -> dict[str, Any]:
    return {"name": "big", "model": source(server, gemma, **{"top": ALL} | over)}


def answers(
    tmp_path: Path, server: LogprobServer, gemma: Path, pairs: Pairs, *, top: int
) -> ServedTeachers:
    recipe = tiny(
        tmp_path, teachers=[far(server, gemma, top=top)], fusion={"calibration": {"kind": "none"}}
    )
    teacher = served_teacher(recipe.teachers[0], recipe)
    found = ServedTeachers([teacher], device=CPU, pairs=pairs.pairs)
    ids, labels = rows()
    found.prepare(list(zip(ids, labels, strict=True)))
    return found


def distributions(states: Any) -> tuple[torch.Tensor, ...]:
    """The distribution at every label with a teacher, its statistics and the lost mass."""
    _, labels = rows()
    at = (labels != -100) & states.spans.target_RL
    place = at.nonzero(as_tuple=True)
    p, entropy, logp = states.read(place, 330).distribution(slice(None), labels[place])
    return p, entropy, logp


def test_all_answers_are_the_local_topk_cache(
    tmp_path: Path, server: LogprobServer, gemma: Path, student: Path
) -> None:
    pairs = pair_teachers(student, {"big": gemma})
    ids, labels = rows()
    found = answers(tmp_path, server, gemma, pairs, top=ALL).states(0, ids, labels)
    cached = CachedTeachers(
        [local(gemma)], cache=TopkCache(kind="topk", k=ALL), device=CPU, compute_dtype=FP32,
        pairs=pairs,
    )  # fmt: skip
    cached.prepare(list(zip(ids, labels, strict=True)), None)
    expected = cached.states(ids, labels_RL=labels)[0][0]
    assert isinstance(expected, SparseStates)
    for ours, theirs in zip(distributions(found), distributions(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.lost_RL is not None
    assert expected.lost_RL is not None
    assert found.spans is not None
    has = found.spans.target_RL & (labels != -100)
    torch.testing.assert_close(found.lost_RL[has], expected.lost_RL[has], rtol=1e-4, atol=1e-5)
    # The server was sent the teacher's own tokens of the text, its begin-of-text token first.
    a = pairs[0].align(ids, labels)  # type: ignore[union-attr]
    assert sorted(server.asked[1:]) == sorted(a.texts)


@pytest.mark.parametrize("top", [1, 7, 64])
def test_a_few_answers_are_projected_and_the_rest_is_tail(
    top: int, tmp_path: Path, server: LogprobServer, gemma: Path, student: Path
) -> None:
    """Against the k likeliest of transformers' softmax, added up by target one at a time."""
    pairs = pair_teachers(student, {"big": gemma})
    pair = pairs[0]
    assert pair is not None
    ids, labels = rows()
    found = answers(tmp_path, server, gemma, pairs, top=top).states(0, ids, labels)
    a = pair.align(ids, labels)
    with torch.no_grad():
        p_RMV = AutoModelForCausalLM.from_pretrained(gemma)(a.ids_RM).logits.softmax(-1)
    q = torch.log_softmax(torch.randn(1, 330, generator=torch.Generator().manual_seed(3)), -1)
    checked = 0
    for r, i in (labels != -100).nonzero().tolist():
        m = int(a.at_RL[r, i])
        if m < 0:
            continue
        place = torch.tensor([r]), torch.tensor([i])
        reading = found.read(place, 330)
        bare, _, _ = reading.distribution(slice(None), labels[place])
        expected, lost = torch.zeros(330), 0.0
        for value, token in zip(*p_RMV[r, m].topk(top), strict=True):
            target = int(pair.target_V[token])
            if target < 0:
                lost += float(value)
            else:
                expected[target] += value
        torch.testing.assert_close(bare[0], expected, rtol=1e-4, atol=1e-5)
        assert found.lost_RL is not None
        assert float(found.lost_RL[r, i]) == pytest.approx(lost, abs=1e-5)
        whole, _, _ = reading.distribution(slice(None), labels[place], logq_BV=q)
        tail = 1 - float(expected.sum()) - lost
        others = torch.where(expected > 0, 0.0, q[0].exp())
        spread = expected + tail * others / others.sum() + lost * q[0].exp()
        if expected.sum() > 0:  # else one token of the tail takes no part
            torch.testing.assert_close(whole[0], spread, rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked > 20
    torch.testing.assert_close(found.label_logp_RL.sum(1), evidence(gemma, a), rtol=1e-4, atol=1e-3)


def evidence(gemma: Path, a: Alignment) -> torch.Tensor:
    """The log-likelihood of all chunks, by torch's cross-entropy."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(gemma)(a.ids_RM).logits
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), a.labels_RM, reduction="none", ignore_index=-100
    )
    return -nll.sum(1)


def recipe_of(tmp_path: Path, teacher: dict[str, Any], **over: Any) -> Recipe:
    """One random teacher of the student's tokenizer, and the given one."""
    own = {"name": "own", "model": {"kind": "random", "config": TINY, "seed": 1}}
    parts: dict[str, Any] = {
        "teachers": [own, teacher],
        "features": {"weight": 0.0},
        "student": {"dropout": 0.0},
        "training": {"tokens": 64 * 4, "teacher_cache": {"kind": "topk", "k": 1000}},
        "fusion": {"calibration": {"kind": "none"}},
    }
    parts["fusion"] |= over.pop("fusion", {})
    return tiny(tmp_path, **parts | over)


@pytest.mark.parametrize("across", ["projected", "chunk"])
def test_the_losses_are_those_of_the_same_model_here(
    across: str, tmp_path: Path, server: LogprobServer, gemma: Path
) -> None:
    fusion = {"across": across}
    here = {"name": "big", "model": {"kind": "local", "path": str(gemma)}}
    there = recipe_of(tmp_path, far(server, gemma), fusion=fusion)
    made = compress.distill(recipe=there, out=tmp_path / "there")
    local_one = compress.distill(
        recipe=recipe_of(tmp_path, here, fusion=fusion), out=tmp_path / "h"
    )
    losses = [
        [step["loss"] for step in events(artifact.path, "step")] for artifact in (made, local_one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if across == "chunk":
        count = len(server.bodies)
        again = compress.distill(recipe=there, out=tmp_path / "again")
        assert len(server.bodies) == count  # nothing is asked for twice
        assert losses[0] == [step["loss"] for step in events(again.path, "step")]
    ours, theirs = (found.result["teachers"]["big"] for found in (made, local_one))
    assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-4)
    assert ours["coverage"] == theirs["coverage"]
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-4)


def test_own_text_and_a_few_tokens(tmp_path: Path, server: LogprobServer, gemma: Path) -> None:
    own = {"share": 0.5, "new_tokens": 8, "prompts": {"tokens": 6}}
    training = {"tokens": 64 * 4, "on_policy": own}
    recipe = recipe_of(tmp_path, far(server, gemma, top=8), training=training)
    steps = events(compress.distill(recipe=recipe, out=tmp_path / "student").path, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    weights = [step["weights"][domain]["big"] for step in steps for domain in step["weights"]]
    assert all(weight > 0 for weight in weights)


def test_sorted_probabilities_are_refused(
    tmp_path: Path, server: LogprobServer, gemma: Path
) -> None:
    wanted = r"fusion\.across: uld compares whole distributions, and "
    fusion = {"across": "uld"}
    served = recipe_of(tmp_path, far(server, gemma), fusion=fusion, training={"tokens": 64})
    with pytest.raises(RecipeError, match=wanted + "its server gives"):
        compress.distill(recipe=served, out=tmp_path / "student")
    base = {"kind": "local", "path": str(save_teacher(tmp_path / "base", byte_level()))}
    plain = recipe_of(tmp_path, far(server, gemma), student={"base": base, "dropout": 0.0})
    require_arm(plain, "across-chunk")
    with pytest.raises(RecipeError, match=r"--arms across-uld: " + wanted):  # before any training
        require_arm(plain, "across-uld")
    here = {"name": "big", "model": {"kind": "local", "path": str(gemma)}}
    with pytest.raises(RecipeError, match=wanted + "the cache topk keeps"):
        compress.distill(recipe=recipe_of(tmp_path, here, fusion=fusion), out=tmp_path / "student")
    known = recipe_of(tmp_path, here, fusion=fusion, student={"base": base, "dropout": 0.0})
    assert any("uld compares whole" in line for line in mistakes(known))
    assert not server.bodies


def test_validate_plan_and_the_floor_know_it(
    tmp_path: Path, server: LogprobServer, gemma: Path, student: Path
) -> None:
    base = {"kind": "local", "path": str(student)}
    teacher = far(server, gemma) | {"min_coverage": 1.0}
    recipe = recipe_of(tmp_path, teacher, student={"base": base})
    assert [str(found) for found in compare_tokenizers(recipe)] == [
        "teacher big: another tokenizer; aligned with the student's on bytes of the text"
    ]
    assert mistakes(recipe) == []
    assert plan_recipe(recipe).asked["big"].requests > 0
    with pytest.raises(DataError, match=r"teachers\.1\.min_coverage: big has .*% of code"):
        compress.distill(recipe=recipe, out=tmp_path / "student")
    assert not server.bodies


def test_a_student_that_limbeck_serves_teaches_one_of_another_tokenizer(
    tmp_path: Path, served: Artifact, student: Path
) -> None:
    """Through `limbeck serve`; the right values are those of torch on the same weights."""
    ids, labels = rows()
    pairs = pair_teachers(student, {"big": served.path})
    pair = pairs[0]
    assert pair is not None
    with serving(served.path) as listener:
        model = {
            "kind": "server",
            "url": listener.address,
            "model": "pico",
            "top": 64,
            "tokenizer": {"kind": "local", "path": str(served.path)},
        }
        recipe = tiny(
            tmp_path,
            teachers=[{"name": "big", "model": model}],
            fusion={"calibration": {"kind": "none"}},
        )
        teachers = ServedTeachers(
            [served_teacher(recipe.teachers[0], recipe)], device=CPU, pairs=pairs.pairs
        )
        teachers.prepare(list(zip(ids, labels, strict=True)))
    found = teachers.states(0, ids, labels)
    a = pair.align(ids, labels)
    body = Body(AutoModelForCausalLM.from_pretrained(served.path.parent / "student/model"))
    with torch.no_grad():
        exact = AlignedStates(body.states(a.ids_RM)[0], body.head, a, pair.target_V)
    p, entropy, logp = distributions(found)
    wanted, exact_entropy, exact_logp = distributions(exact)
    torch.testing.assert_close(logp, exact_logp, rtol=1e-3, atol=1e-3)
    kept = p > 0
    torch.testing.assert_close(p[kept], wanted[kept], rtol=1e-3, atol=1e-4)
    assert float(p.sum(-1).min()) > 64 / 258  # the likeliest, and no others
    assert float((entropy - exact_entropy).abs().max()) < 1.0
