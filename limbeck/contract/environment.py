"""Environment variables that must be set before a heavy library is loaded, in every process.

`limbeck/__init__.py` calls `prepare`, so it runs before all other imports of Limbeck: in the
command line, in workers, under torchrun and in programs that import a part of Limbeck.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType

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
_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "torch",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CACHE_DIR": "wandb",  # logs of its own process
    "HF_XET_CACHE": "hub/xet",  # chunks and logs of the hub's transfers
}
# Each of these sets how OpenMP threads wait. A user's own setting is kept.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_OURS = "LIMBECK_OMP_WAIT_POLICY"  # is set where the policy is not the user's
_DEFAULT_SPINS = "300000"  # libgomp's own, where nothing is set: about 3 ms

# What torchrun and accelerate set for each process of a job: the least and the largest value.
# Accelerate takes -1 for no value.
_LAUNCHED = {
    "WORLD_SIZE": (1, 1 << 20),
    "RANK": (0, 1 << 20),
    "LOCAL_WORLD_SIZE": (1, 1 << 20),
    "LOCAL_RANK": (-1, 1 << 20),
    "MASTER_PORT": (0, (1 << 16) - 1),
}
_LAUNCH = "start the job with torchrun, or unset it"
# Errors of int(), float(), accelerate's flags and Enum about one text.
_MISREAD = re.compile(
    r"(?:invalid literal for int\(\) with base 10: |could not convert string to float: "
    r"|invalid truth value )(?P<value>.*)|(?P<choice>.*) is not a valid \w+"
)
_NEAR = 4  # innermost frames of libraries in a traceback, of which one reads the variable
_OUR_PACKAGES = ("limbeck", "compress", "export", "serve_bench")


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

    Libraries do not find the package ``kernels``, unless a program has imported it already. With
    it bitsandbytes, while it is imported on a processor with bf16, downloads native code from the
    hub and runs it; transformers may do the same. Its advice to install that package is not shown.

    OpenMP threads of torch wait for each other by spinning. On a core that another process uses,
    they spin instead of working, and a step takes 6 to 8 times as long; asleep, they do not.
    """
    for name, value in _NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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


def require_launcher(*, trains: bool = False) -> None:
    """Check the variables by which a process knows its place among several.

    Before it ``trains`` with others, it must have all that torch needs to find them. Raises
    `EnvironmentalError` naming the first variable that is wrong or missing.
    """
    found = {"WORLD_SIZE": 1, "RANK": 0}
    for name, (least, most) in _LAUNCHED.items():
        if (text := os.environ.get(name)) is None:
            continue
        try:
            found[name] = int(text)
        except ValueError:
            found[name] = least - 1
        if not least <= found[name] <= most:
            raise EnvironmentalError(
                f"the environment variable {name} is {text!r}, and should be a whole number from "
                f"{least} to {most}; {_LAUNCH}."
            )
    rank, size = found["RANK"], found["WORLD_SIZE"]
    if rank >= size:
        raise EnvironmentalError(
            f"the environment variable RANK is {rank}, and should be below WORLD_SIZE, which is "
            f"{os.environ.get('WORLD_SIZE', 'not set')}; {_LAUNCH}."
        )
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if trains and size > 1 and missing:
        raise EnvironmentalError(
            f"the environment variable WORLD_SIZE is {size}, but {missing[0]} is not set; start "
            "the job with torchrun, which sets both, or unset WORLD_SIZE."
        )


def misread(error: BaseException | None) -> EnvironmentalError | None:
    """The environment variable that a library could not read, where this is what ``error`` says."""
    while error is not None:
        matched = _MISREAD.fullmatch(str(error)) if isinstance(error, ValueError) else None
        if matched and any(map(_reads_environment, [*_libraries(error)][-_NEAR:])):
            value = (matched["value"] or matched["choice"]).strip("'\"").strip().lower()
            names = [name for name, text in os.environ.items() if text.strip().lower() == value]
            if names:
                return EnvironmentalError(
                    f"a library cannot read the environment variable {' or '.join(names)} "
                    f"({error}); correct or unset it."
                )
        error = error.__cause__ or error.__context__
    return None


def _libraries(error: BaseException) -> Iterator[CodeType]:
    """Code of libraries in the traceback of ``error``."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in _OUR_PACKAGES:
            yield trace.tb_frame.f_code
        trace = trace.tb_next


def _reads_environment(code: CodeType) -> bool:
    return not {"environ", "getenv"}.isdisjoint(code.co_names)
