"""Environment variables that must be set before a heavy library is loaded, in every process.

`limbeck/__init__.py` calls `prepare`, so it runs before all other imports of Limbeck: in the
command line, in workers, under torchrun and in programs that import a part of Limbeck.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from limbeck.contract.errors import EnvironmentalError

# No library may report its use by itself. onnxruntime 1.32 otherwise looks up a host for events
# and keeps a database under ~/.cache.
_NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
# Folders that libraries would make beside the cache folder, in the user's and temporary folders,
# by the variable that moves them into it.
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "torch", "MPLCONFIGDIR": "matplotlib"}
# Each of these sets how OpenMP threads wait. A user's own setting is kept.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_OURS = "LIMBECK_OMP_WAIT_POLICY"  # is set where the policy is not the user's
_DEFAULT_SPINS = "300000"  # libgomp's own, where nothing is set: about 3 ms


def cache_folder() -> Path:
    """``$LIMBECK_CACHE``, or the platform's user cache folder. Raises `EnvironmentalError`."""
    chosen = os.environ.get("LIMBECK_CACHE")
    if chosen:
        try:
            return Path(chosen).expanduser().resolve()
        except RuntimeError:
            raise EnvironmentalError(
                f"LIMBECK_CACHE={chosen}: there is no such user here; name another folder."
            ) from None
    import platformdirs

    return Path(platformdirs.user_cache_dir("limbeck"))


def prepare() -> None:
    """Set what is missing; a variable that the user has set stays as it is.

    OpenMP threads of torch wait for each other by spinning. On a core that another process uses,
    they spin instead of working, and a step takes 6 to 8 times as long; asleep, they do not.
    """
    for name, value in _NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    # The code that needs the cache reports what is wrong with it.
    with contextlib.suppress(OSError, EnvironmentalError):
        cache = cache_folder()
        found = next(p for p in (cache, *cache.parents) if p.exists())
        if found.is_dir() and os.access(found, os.W_OK):
            for name, folder in _FOLDERS.items():
                os.environ.setdefault(name, str(cache / folder))
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = os.environ[_OURS] = "passive"


def as_by_default(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with OpenMP threads that wait as libgomp's own default has it.

    A process whose speed is measured needs this: asleep, the threads of a small model cost torch
    a third more for the first token, and llama.cpp three times as much for each. A policy that the
    user has chosen stays.
    """
    if _OURS not in environment:
        return dict(environment)
    kept = {n: v for n, v in environment.items() if n not in ("OMP_WAIT_POLICY", _OURS)}
    return kept | {"GOMP_SPINCOUNT": _DEFAULT_SPINS}
