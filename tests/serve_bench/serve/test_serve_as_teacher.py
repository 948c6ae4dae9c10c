"""A student behind `limbeck serve` is the next one's teacher: the cache made of the server's
answers is the form's own distribution.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from compress.head import IGNORED
from compress.teachers.served import ServedTeachers, served_teacher
from limbeck.contract.recipe import parse_recipe
from limbeck.runtime.decoder import Decoder
from tests.factory import Factory
from tests.pico import pico_recipe
from tests.serve_bench.serve.asking import serving

TOP = 16


@pytest.mark.parametrize("form", ["fp32", "int8-weight"])
def test_the_cache_is_the_forms_own_distribution(
    form: str, tiny: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"max_position_embeddings": 512, "tie_word_embeddings": False}
    exported = tiny.exported(forms=["fp32", "int8-weight"], seed=3, sizes=sizes).path
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 256, (3, 150))  # past a chunk of the scorer
    ends = (150, 97, 12)
    rows = []
    for row, end in zip(torch.from_numpy(ids), ends, strict=True):
        labels = torch.cat([row[1:], torch.tensor([IGNORED])])
        labels[end - 1 :] = IGNORED
        rows.append((row, labels))
    with serving(exported, form=form) as server:
        model = {
            "kind": "server", "url": server.address, "model": "pico", "top": TOP,
            "tokenizer": {"kind": "local", "path": str(exported)},
        }  # fmt: skip
        tree = pico_recipe().resolved() | {
            "teachers": [{"name": "former", "model": model}],
            "fusion": {"calibration": {"kind": "none"}},
        }
        recipe = parse_recipe(tree)
        teacher = served_teacher(recipe.teachers[0], recipe)
        cache = ServedTeachers([teacher], device=torch.device("cpu"))
        cache.prepare(rows)
        found = cache.states(0, torch.from_numpy(ids))
    decoder = Decoder(exported, form=form, threads=1, all_logits=True)
    # Of the int8 form, a prompt in chunks is rounded otherwise than one in a piece.
    tolerance = {"rtol": 1e-3, "atol": 1e-4 if form == "fp32" else 0.02}
    for row, end in enumerate(ends):
        logits = decoder.prefill([ids[row, :end].tolist()])[0]
        logp = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
        best = -np.sort(-logp[:-1])[:, :TOP]
        here = slice(end - 1)
        share = found.share_RLk[row, here].numpy()
        np.testing.assert_allclose(share, np.exp(best), **tolerance)
        of_label = logp[np.arange(end - 1), ids[row, 1:end]]
        np.testing.assert_allclose(found.label_logp_RL[row, here].numpy(), of_label, **tolerance)
        exact = scipy.stats.entropy(np.exp(logp[:-1]), axis=1)
        assert np.abs(found.entropy_RL[row, here].numpy() - exact).max() < 0.5
