"""A slope of memory is told from noise."""

from __future__ import annotations

import numpy as np

from tests.faults.growth import slope

_MB = 1 << 20


def test_what_grows_beyond_the_noise_is_seen() -> None:
    draw = np.random.default_rng(0)
    flat = 300 * _MB + draw.normal(0, _MB, 1200)
    warming = np.concatenate([np.linspace(0, 300 * _MB, 400), np.full(800, 300 * _MB)])
    assert not slope(flat).grows
    assert not slope(warming).grows
    leak = flat + np.linspace(0, 6 * _MB, 1200)  # 4 MB over the judged part
    assert slope(leak).grows
    assert abs(slope(leak).growth / _MB - 4) < 0.5
