"""Teachers behind a server: the cache equals the local one, faults are named, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import compress
from compress.head import IGNORED
from compress.states import SparseStates
from compress.teachers.cache import CachedTeachers
from compress.teachers.live import TeacherFolder, Teachers
from compress.teachers.mixed import MixedTeachers, open_teachers
from compress.teachers.prompt_logprobs import Server
from compress.teachers.served import ServedTeachers, entropy_bounds, served_teacher
from limbeck.contract.errors import ArtifactError, EnvironmentalError, ModelError, RecipeError
from limbeck.contract.recipe import NoCache, Recipe, ServerModel, TopkCache, parse_recipe
from limbeck.runtime.endpoint import find_endpoint
from tests.compress.test_compress import events, tiny
from tests.pico import make_model
from tests.servers.logprob_server import LogprobServer
from tests.servers.server_faults import FAULTS

TOP = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("big") / "big", seed=5)


@pytest.fixture
def server(folder: Path) -> Iterator[LogprobServer]:
    with LogprobServer(folder) as serving:
        yield serving


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.teachers.prompt_logprobs._FIRST_WAIT", 0.001)


def source(server: LogprobServer, folder: Path, **over: Any) -> dict[str, Any]:
    return {
        "kind": "server",
        "url": server.url,
        "model": "big",
        "tokenizer": {"kind": "local", "path": str(folder)},
        "top": TOP,
        "concurrency": 3,
        "retries": 2,
    } | over


def recipe_of(tmp_path: Path, folder: Path, teachers: list[dict[str, Any]], **over: Any) -> Recipe:
    parts: dict[str, Any] = {
        "teachers": teachers,
        "student": {"base": {"kind": "local", "path": str(folder)}, "init": "base"},
        "fusion": {"calibration": {"kind": "none"}},
    }
    return tiny(tmp_path, **parts | over)


def served(tmp_path: Path, server: LogprobServer, folder: Path, **over: Any) -> ServedTeachers:
    model = source(server, folder, **over)
    recipe = recipe_of(tmp_path, folder, [{"name": "big", "model": model}])
    teacher = served_teacher(recipe.teachers[0], recipe)
    return ServedTeachers([teacher], device=torch.device("cpu"))


def local(folder: Path, name: str = "big") -> TeacherFolder:
    return TeacherFolder(name, folder, None, folder, None, folder, "none", "fp32", "digest")


def rows_of(count: int, *, seed: int = 0, length: int = 20) -> list[tuple[torch.Tensor, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = torch.from_numpy(draw.integers(0, 256, length))
        labels = torch.cat([ids[1:], torch.tensor([IGNORED])])
        end = int(draw.integers(4, length))
        labels[end:] = IGNORED  # padding
        labels[: int(draw.integers(0, 3))] = IGNORED  # a question
        rows.append((ids, labels))
    return rows


def test_the_cache_is_the_local_topk_cache(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    rows = rows_of(7)
    ids, labels = (torch.stack(parts) for parts in zip(*rows, strict=True))
    theirs = served(tmp_path, server, folder)
    theirs.prepare(rows)
    ours = CachedTeachers(
        [local(folder)],
        cache=TopkCache(kind="topk", k=TOP),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )
    ours.prepare(rows, None)
    found, expected = theirs.states(0, ids), ours.states(ids)[0][0]
    assert isinstance(expected, SparseStates)
    assert found.vocabulary == expected.vocabulary == 258
    valid = labels != IGNORED
    torch.testing.assert_close(found.share_RLk[valid], expected.share_RLk[valid])
    assert torch.equal(found.ids_RLk[valid], expected.ids_RLk[valid])
    torch.testing.assert_close(found.label_logp_RL[valid], expected.label_logp_RL[valid])
    gap = (found.entropy_RL - expected.entropy_RL)[valid].abs()
    assert 0 < gap.max() < 0.5, gap
    body = server.bodies[-1]
    assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0, TOP)
    assert all(isinstance(token, int) for token in body["prompt"])
    assert server.most_at_once <= 3
    longest = [int((row != IGNORED).nonzero()[-1]) + 2 for row in labels]
    assert sorted(map(len, server.asked[1:])) == sorted(longest)  # padding is not asked for


@given(
    logits=st.lists(st.floats(-12, 12), min_size=3, max_size=40),
    k=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_bounds_hold_the_exact_entropy(logits: list[float], k: int, scale: float) -> None:
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64) * scale, 0).numpy()
    k = min(k, len(p))
    top = np.sort(p)[::-1][:k]
    low, high = entropy_bounds(np.log(top)[None], len(p))
    exact = scipy.stats.entropy(p)
    assert low[0] - 1e-7 <= exact <= high[0] + 1e-7
    if k == len(p):
        assert low[0] == pytest.approx(high[0], abs=1e-6)


def test_bounds_by_hand() -> None:
    # 0.5 and 0.2 are known, 0.3 is left for 6 tokens: at most 0.05 each, at least 0.2 and 0.1.
    low, high = entropy_bounds(np.log([[0.5, 0.2]]), 8)
    assert high[0] == pytest.approx(scipy.stats.entropy([0.5, 0.2] + [0.05] * 6))
    assert low[0] == pytest.approx(scipy.stats.entropy([0.5, 0.2, 0.2, 0.1]))


def test_nothing_is_asked_twice(tmp_path: Path, server: LogprobServer, folder: Path) -> None:
    rows = rows_of(9)

    def dies(number: int, right: dict[str, Any]) -> tuple[int, Any] | None:
        return (200, right) if number < 5 else None

    server.fault = dies
    with pytest.raises(EnvironmentalError, match=r"gave up after 3 tries.*so far are kept"):
        served(tmp_path, server, folder).prepare(rows)
    cache = tmp_path / "cache" / "teachers"
    assert not list(cache.glob("served-*/rows-*"))  # no shard is complete
    assert len(list(cache.glob("served-*/answers/*"))) == 4  # the probe is the fifth
    server.fault = None
    served(tmp_path, server, folder).prepare(rows)
    prompts = [tuple(prompt) for prompt in server.asked]
    probe = prompts[0]
    assert len(set(prompts)) == len([p for p in prompts if p != probe]) + 1 == 10
    assert not list(cache.glob("served-*/answers/*"))

    count = len(server.bodies)
    again = served(tmp_path, server, folder)
    again.prepare(rows)
    again.states(0, torch.stack([ids for ids, _ in rows]))
    assert len(server.bodies) == count  # not even a probe
    again.prepare([*rows_of(2, seed=1), *reversed(rows)])  # another recipe with some new text
    assert len(server.bodies) == count + 3


@pytest.mark.parametrize("change", [lambda d: d[:50], lambda d: d[:-1] + bytes([d[-1] ^ 1])])
def test_a_damaged_answer_is_named(
    tmp_path: Path, server: LogprobServer, folder: Path, change: Callable[[bytes], bytes]
) -> None:
    server.fault = lambda number, right: (200, right) if number < 4 else None
    with pytest.raises(EnvironmentalError):
        served(tmp_path, server, folder).prepare(rows_of(9))
    for path in (tmp_path / "cache").rglob("answers/*"):
        path.write_bytes(change(path.read_bytes()))
    server.fault = None
    with pytest.raises(ArtifactError, match=r"answers/\w+: cannot be read .* delete it and run"):
        served(tmp_path, server, folder).prepare(rows_of(9))


def test_text_that_is_made_while_training_is_asked_for(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    teachers = served(tmp_path, server, folder)
    teachers.prepare(rows_of(2))
    count = len(server.bodies)
    ids = torch.stack([ids for ids, _ in rows_of(3, seed=8)])
    found = teachers.states(0, ids)
    assert len(server.bodies) == count + 3
    with torch.no_grad():
        expected = torch.log_softmax(server.model(ids).logits, -1)
    labels = expected[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.label_logp_RL[:, :-1], labels, rtol=1e-4, atol=1e-4)
    teachers.states(0, ids)
    assert len(server.bodies) == count + 3


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_answers_are_named_and_not_kept(
    name: str, tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    server.fault, error, message = FAULTS[name]
    with pytest.raises(error, match=message):
        served(tmp_path, server, folder).prepare(rows_of(4))
    cache = tmp_path / "cache" / "teachers"
    assert not list(cache.glob("served-*/rows-*"))
    assert not list(cache.glob("served-*/answers/*"))
    server.fault = None
    served(tmp_path, server, folder).prepare(rows_of(4))  # the server is well again


def test_short_troubles_are_tried_again(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    troubles: list[tuple[int, Any] | None] = [
        (503, {"error": {"message": "loading"}}), (429, {}), None, (200, b'{"choices": [')
    ]  # fmt: skip

    def fault(number: int, right: dict[str, Any]) -> tuple[int, Any] | None:
        return troubles.pop() if troubles and number % 2 else (200, right)

    server.fault = fault
    rows = rows_of(6)
    # All of them may meet one request: which one the server counts as odd is chance.
    teachers = served(tmp_path, server, folder, retries=len(troubles))
    teachers.prepare(rows)
    assert not troubles
    found = teachers.states(0, torch.stack([ids for ids, _ in rows]))
    assert bool((found.share_RLk.sum(-1) <= 1.001).all())


def test_a_slow_server_is_given_up(tmp_path: Path, server: LogprobServer, folder: Path) -> None:
    def fault(number: int, right: dict[str, Any]) -> tuple[int, Any] | None:
        time.sleep(0.4)
        return 200, right

    server.fault = fault
    with pytest.raises(EnvironmentalError, match=r"ReadTimeout.*gave up after one try"):
        served(tmp_path, server, folder, timeout=0.1, retries=0).prepare(rows_of(1))


def test_another_tokenizer_is_found_before_the_first_text(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder)
    tree = json.loads(other.backend_tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    letters = [c for c in vocabulary if c.isalpha() and c.isascii()]
    for one, two in zip(letters, [*letters[1:], letters[0]], strict=True):
        tree["model"]["vocab"][one] = other.get_vocab()[two]
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(
        ModelError, match=r"another tokenizer than `tokenizer` names: of \d+ token ids \d+ are"
    ):
        served(tmp_path, server, tmp_path / "other").prepare(rows_of(1))
    assert len(server.bodies) == 1


def test_ids_that_the_server_does_not_know_point_at_the_tokenizer(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    recipe = recipe_of(tmp_path, folder, [{"name": "big", "model": source(server, folder)}])
    model = recipe.teachers[0].model
    assert isinstance(model, ServerModel)
    endpoint = find_endpoint(model.endpoint, model.model, model.key_variable)
    with (
        Server("big", model, endpoint, vocabulary=50_000) as asked,
        pytest.raises(EnvironmentalError, match=r"id 42424 is out .*; is `tokenizer` that of the"),
    ):
        asked.ask([5, 42424])


def test_another_model_of_the_same_name_is_found(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    served(tmp_path, server, folder).prepare(rows_of(2))
    before = server.model
    server.model = type(before)(before.config).eval()
    with pytest.raises(ModelError, match=r"another model answers .* differ by .* nats a token"):
        served(tmp_path, server, folder).prepare(rows_of(3, seed=4))
    server.model = before
    served(tmp_path, server, folder).prepare(rows_of(3, seed=4))


def test_keys_contexts_and_models_are_checked(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LogprobServer(folder, key="secret") as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(EnvironmentalError, match=r"401; is the key in \$OPENAI_API_KEY right"):
            served(tmp_path, server, folder).prepare(rows_of(1))
        monkeypatch.setenv("LIMBECK_TEACHER_KEY", "secret")
        keyed = {"key_variable": "LIMBECK_TEACHER_KEY"}
        served(tmp_path, server, folder, **keyed).prepare(rows_of(1))
        with pytest.raises(EnvironmentalError, match="no model 'other'; it has big"):
            served(tmp_path, server, folder, model="other", **keyed).prepare(rows_of(1))
        server.context = 5
        with pytest.raises(ModelError, match=r"reads 5 tokens at most.*set data.block to 4"):
            served(tmp_path, server, folder, **keyed).prepare(rows_of(2, seed=3))
    with pytest.raises(EnvironmentalError, match="no OpenAI-compatible server answers there"):
        served(tmp_path, server, folder, **keyed).prepare(rows_of(2, seed=3))
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert contents
    assert not any(b"secret" in content for content in contents)


# In a recipe --------------------------------------------------------------------------------------


def small(folder: Path) -> dict[str, Any]:
    return {"name": "here", "model": {"kind": "local", "path": str(folder)}}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other") / "other", seed=6, num_hidden_layers=3)


def test_served_and_local_teachers_stand_in_the_recipes_order(
    tmp_path: Path, server: LogprobServer, folder: Path, other: Path
) -> None:
    rows = rows_of(3)
    ids = torch.stack([ids for ids, _ in rows])
    recipe = recipe_of(tmp_path, folder, [{"name": "big", "model": source(server, folder)}])
    far = served_teacher(recipe.teachers[0], recipe)
    device, dtype = torch.device("cpu"), torch.float32
    alone = Teachers([local(other, "here")], device=device, compute_dtype=dtype)
    for order in ([far, local(other, "here")], [local(other, "here"), far]):
        both = open_teachers(order, cache=NoCache(kind="none"), device=device, compute_dtype=dtype)
        assert isinstance(both, MixedTeachers)
        both.prepare(rows, None)
        mine = next(k for k, name in enumerate(both.names) if name == "here")
        both.temperatures[mine] = 1.5
        layers: list[list[int]] = [[], []]
        layers[mine] = [1, 3]
        last, inner = both.states(ids, layers)
        expected, states = alone.states(ids, [[1, 3]])
        assert isinstance(last[1 - mine], SparseStates)
        assert torch.equal(last[mine].hidden_RLd, expected[0].hidden_RLd)  # type: ignore[union-attr]
        assert last[mine].temperature == 1.5  # type: ignore[union-attr]
        assert [len(found) for found in inner] == [2 if k == mine else 0 for k in range(2)]
        assert all(torch.equal(*pair) for pair in zip(inner[mine], states[0], strict=True))
        assert both.states(ids, only=mine)[0][0].vocabulary == 258
        assert isinstance(both.states(ids, only=1 - mine)[0][0], SparseStates)
        assert (both.depths[mine], both.depths[1 - mine]) == (3, 0)


def test_a_student_learns_from_served_and_local_teachers(
    tmp_path: Path, server: LogprobServer, folder: Path, other: Path
) -> None:
    teachers = [{"name": "big", "model": source(server, folder)}, small(other)]
    made = compress.distill(recipe=recipe_of(tmp_path, folder, teachers), out=tmp_path / "student")
    steps = events(made.path, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(step["features"] > 0 for step in steps)  # of the local teacher
    weights = [weight for step in steps for weight in step["weights"].values()]
    assert {name for one in weights for name in one} == {"big", "here"}
    entries = json.loads((made.path / "teachers.json").read_text())
    assert (entries[0]["server"], entries[0]["model"]) == (f"{server.url}/v1", "big")
    count = len(server.bodies)

    # The same model in this process has the same loss on the same text.
    direct = {"name": "direct", "model": small(folder)["model"]}
    fusion = {"weights": {"kind": "uniform"}, "calibration": {"kind": "none"}}
    changed = recipe_of(
        tmp_path, folder, [*teachers, direct], fusion=fusion,
        training={"teacher_cache": {"kind": "hidden"}, "precision": "fp32"},
    )  # fmt: skip
    found = compress.distill(recipe=changed, out=tmp_path / "again").result["teachers"]
    assert found["big"]["nll"] == made.result["teachers"]["big"]["nll"]
    assert found["direct"]["nll"] == pytest.approx(found["big"]["nll"], rel=1e-2)  # bf16 states
    assert len(server.bodies) == count


def test_served_teachers_alone_need_no_features_and_no_head(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    far = {"name": "big", "model": source(server, folder)}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = {"model_type": "llama", "num_attention_heads": 2, **sizes}
    student = {"kind": "fresh", "config": config}
    fusion, cache = {"calibration": {"kind": "none"}}, {"teacher_cache": {"kind": "topk", "k": 4}}
    tree = tiny(tmp_path, teachers=[far], fusion=fusion, training=cache).resolved()
    recipe = parse_recipe(tree | {"student": student})
    made = compress.distill(recipe=recipe, out=tmp_path / "student")
    assert made.result["teachers"]["big"]["nll"].keys() == {"code", "prose"}
    steps = events(made.path, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_served_teachers_read_the_students_own_text(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    far = {"name": "big", "model": source(server, folder)}
    own = {"share": 0.5, "new_tokens": 8, "prompts": {"tokens": 6}}
    recipe = recipe_of(tmp_path, folder, [far], training={"on_policy": own})
    compress.distill(recipe=recipe, out=tmp_path / "student")
    count = len(server.bodies)
    without = recipe_of(tmp_path, folder, [far])
    compress.distill(recipe=without, out=tmp_path / "without")
    assert len(server.bodies) == count  # the corpus is asked for with and without own text
    texts = len(list((tmp_path / "cache").glob("teachers/served-*/answers/*")))
    assert texts == 6  # one of two rows in each of six steps is the student's own
    compress.distill(recipe=recipe, out=tmp_path / "again")
    assert len(server.bodies) == count + 1  # the same text again: the probe only


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path: Path, server: LogprobServer, folder: Path) -> None:
    """`kill -9` in the middle: no answered text is asked for again."""

    def slow(number: int, right: dict[str, Any]) -> tuple[int, Any] | None:
        time.sleep(0.05)
        return 200, right

    server.fault = slow
    arguments = [str(tmp_path), server.url, str(folder)]
    command = [sys.executable, "-m", "tests.compress.teachers.killed_build", *arguments]
    with subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE) as started:
        while len(server.asked) < 6:
            assert started.poll() is None, started.stderr and started.stderr.read()
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
    answers = tmp_path / "cache" / "teachers"
    kept = len(list(answers.glob("served-*/answers/[0-9a-f]*")))
    assert kept >= 2
    time.sleep(0.3)  # the server ends what it has begun
    before = len(server.bodies)
    server.fault = None
    served(tmp_path, server, folder).prepare(rows_of(20))
    assert len(server.bodies) - before == 20 - kept + 1  # and the probe
    assert not list(answers.glob("served-*/answers/*"))


def test_recipes_that_cannot_be_are_refused(
    tmp_path: Path, server: LogprobServer, folder: Path, other: Path
) -> None:
    far = {"name": "big", "model": source(server, folder)}

    def refused(message: str, teachers: Any = None, **over: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            recipe_of(tmp_path, folder, teachers or [far], **over)

    refused(
        "fusion.calibration: teacher big is behind a server",
        fusion={"calibration": {"kind": "fit"}},
    )
    refused("fusion.temperature: teacher big", fusion={"temperature": 2.0})
    refused(
        "training.minutes: teacher big is behind a server", training={"tokens": None, "minutes": 1}
    )
    refused("teachers.0.quantize: the server loads", [far | {"quantize": "int8"}])
    refused("teachers.0.adapter: the server loads", [far | {"adapter": "somewhere"}])
    refused("gates.min_decode_speedup: a teacher behind", gates={"min_decode_speedup": 2})
    refused("no teachers here to merge", student={"init": "merge"})
    refused("url", [{"name": "big", "model": source(server, folder, url="http://me:key@host")}])
    refused("key_variable", [{"name": "b", "model": source(server, folder, key_variable="HOME")}])
    refused(
        "keeps no hidden states", [far, small(other)], training={"teacher_cache": {"kind": "topk"}}
    )
    fixed = {"kind": "fixed", "values": {"big": 1, "here": 1.3}}
    recipe_of(tmp_path, folder, [far, small(other)], fusion={"calibration": fixed})


def test_how_a_server_is_asked_makes_no_other_recipe(
    tmp_path: Path, server: LogprobServer, folder: Path
) -> None:
    def digest(**over: Any) -> str:
        model = source(server, folder, **over)
        return recipe_of(tmp_path, folder, [{"name": "big", "model": model}]).digest

    same = {"concurrency": 7, "timeout": 1, "retries": 9, "key_variable": "LIMBECK_OTHER"}
    assert digest() == digest(**same) == digest(url=f"{server.url}/v1/")
    assert len({digest(), digest(top=3), digest(model="small"), digest(url="http://other")}) == 4
