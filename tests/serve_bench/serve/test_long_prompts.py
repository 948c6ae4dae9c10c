"""Where another graph reads long prompts, answers still equal those of a cold run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError
from limbeck.runtime import decoder as decoder_module
from limbeck.runtime.decoder import Decoder
from tests.serve_bench.serve.test_engine import collect, running, start

FORM = "int8-weight"
LONG = list(range(10, 50))


@pytest.fixture(params=["fused", "growing"])
def folder(request: pytest.FixtureRequest, served: Artifact, gpt2: Artifact) -> Path:
    return (served if request.param == "fused" else gpt2).path


@pytest.fixture(autouse=True)
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "sums_overflow", lambda: True)


def cold(folder: Path, ids: list[int], count: int) -> list[int]:
    return list(Decoder(folder, form=FORM, threads=1).generate(ids, count))


def test_the_processor_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(folder, form=FORM, threads=1)
    assert (decoder.is_long(31), decoder.is_long(32)) == (False, True)
    assert Decoder(folder, form=FORM, threads=1, all_logits=True).prompts is None
    assert Decoder(folder, form="fp32", threads=1).prompts is None
    monkeypatch.setattr(decoder_module, "sums_overflow", lambda: False)
    other = Decoder(folder, form=FORM, threads=1)
    assert not other.is_long(400)
    assert np.abs(other.prefill([LONG]) - decoder.prefill([LONG])).max() > 1e-3


def test_a_graph_that_was_replaced_meanwhile_reads_nothing(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "onnx"
    shutil.copytree(folder, mine)
    decoder = Decoder(mine, form=FORM, threads=1)
    assert decoder.prompts is not None
    decoder.prefill([LONG[:20]])  # the first graph is in use
    shutil.copy(decoder.prompts, tmp_path / "other")
    (tmp_path / "other").replace(decoder.prompts)
    with pytest.raises(ArtifactError, match="was replaced since the graph beside it was opened"):
        decoder.prefill([LONG])


def test_a_decoder_that_resumes_takes_over_no_answer_to_a_long_prompt(folder: Path) -> None:
    decoder = Decoder(folder, form=FORM, threads=1)
    answer = list(decoder.generate(LONG, 6))
    turn = [*LONG, *answer, 7, 8, 9]
    assert list(decoder.generate(turn, 4, resume=True)) == cold(folder, turn, 4)
    assert decoder.reused == len(LONG)
    again = [*turn, 5, 6]
    assert list(decoder.generate(again, 4, resume=True)) == cold(folder, again, 4)
    assert decoder.reused == len(turn)
    short = LONG[:20]  # the other graph reads it
    assert list(decoder.generate(short, 6, resume=True)) == cold(folder, short, 6)
    assert decoder.reused == 0
    grown = [*short, 4, 4]
    assert list(decoder.generate(grown, 4, resume=True)) == cold(folder, grown, 4)
    assert decoder.reused == len(short)


def test_the_server_takes_over_what_one_graph_has_read(folder: Path) -> None:
    with running(folder, form=FORM) as engine:

        def ask(ids: list[int], count: int, **options: Any) -> int:
            stream, pieces = start(engine, ids, count, **options)
            assert collect(pieces)[0] == cold(folder, ids, count)
            return stream.reused

        assert ask(LONG, 6) == 0
        turn = [*LONG, *cold(folder, LONG, 6), 7, 8, 9]
        assert ask(turn, 4) == len(LONG)
        assert ask([*turn, 5, 6], 4) == len(turn)
        assert ask(LONG[:20], 3) == 0
        assert ask([*LONG[:20], 4, 4], 3) == 20
        assert ask(LONG, 6, owner="other") == 0


def test_parts_of_a_long_prompt_beside_running_rows_equal_the_whole(folder: Path) -> None:
    with running(folder, form=FORM) as engine:
        blocker = start(engine, [1, 2], 60)[0]  # so that prompts are read in chunks
        for length in (32, 33, 63, 64, 65, 66, 100):
            ids = [(7 * at + length) % 256 for at in range(min(length, engine.longest - 4))]
            for _ in range(2):
                assert collect(start(engine, ids, 3)[1])[0] == cold(folder, ids, 3)
        blocker.cancel()
