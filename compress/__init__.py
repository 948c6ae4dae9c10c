"""Stage 1: teachers and text to a student.

The loss is in `compress.loss`, the loop in `compress.loop`; tasks differ in `compress.tasks`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, work_folder
from limbeck.contract.recipe import AnyRecipe, Recipe, fingerprint
from limbeck.contract.sources.digests import input_digests

_VERSION = 2  # of the stage: raise it when the same input would give another student
_RECOVERY = 2  # the same for `recover`

__all__ = ["cache_teachers", "distill", "fill_cache", "heal", "recover"]


def distill(
    *, recipe: AnyRecipe, out: Path, products: Mapping[str, Path] | None = None
) -> Artifact:
    """Train the recipe's student from all its teachers and write the student artifact to ``out``.

    ``products`` maps the name of each teacher of kind `recipe` to the student artifact of that
    recipe. Returns the artifact that is already there when it was made from the same input. Goes on
    where an interrupted run stopped.
    Raises `ModelError`, `DataError`, `EnvironmentalError` or `DivergenceError`.
    """
    products = products or {}
    parents = input_digests(recipe, products=products)
    key = fingerprint(
        {
            "stage": "compress",
            "version": _VERSION,
            "recipe": recipe.distillation(),
            "parents": parents,
        }
    )
    if found := _made_before(out, key):
        return found
    with _libraries():
        from compress.loop import train

        return train(recipe=recipe, out=out, products=products, key=key, parents=parents)


def recover(
    *,
    student: Path,
    onnx: Path,
    out: Path,
    recipe: Recipe,
    products: Mapping[str, Path] | None = None,
) -> Artifact:
    """Distil a student again through the rounding of the form that was exported from it.

    ``onnx`` was made from ``student`` and holds held-out losses and the rounding of every
    parameter; the recipe asks for this with `export.recover`. Returns the student artifact at
    ``out`` when it was made from the same input. Raises as `distill`.
    """
    trained = open_artifact(student, kind="student")
    exported = open_artifact(onnx, kind="onnx", verify=False)
    asked = recipe.export.recover
    assert asked is not None
    given = {"recover": asked.model_dump(mode="json"), "rounding": exported.result["parameters"]}
    key = fingerprint(
        {"stage": "recover", "version": _RECOVERY, "student": trained.digest, **given}
    )
    if found := _made_before(out, key):
        return found
    with _libraries():
        from compress.recovery import train_through

        return train_through(
            student=trained, onnx=exported, recipe=recipe, out=out, products=products or {}, key=key
        )


def heal(
    *,
    recipe: Recipe,
    products: Mapping[str, Path],
    work: Path,
    rounds: Sequence[int],
    goes_on: Callable[[int, float], bool],
) -> None:
    """Distil the student to ``rounds[-1]`` tokens, and ask after each round whether to go on.

    ``rounds`` are rising multiples of `training.batch_tokens`. ``goes_on`` gets the index of a
    round and the mean held-out NLL after it, in nats a token. Inner layers are not aligned, and
    teachers answer from a `hidden` cache that all students share. ``work``
    holds checkpoint and log: an interrupted distillation goes on from them and reports the rounds
    again. Raises as `distill`.
    """
    with _libraries():
        from compress.healing import heal as run

        run(recipe=recipe, products=products, work=work, rounds=rounds, goes_on=goes_on)


def cache_teachers(
    *, recipe: Recipe, products: Mapping[str, Path], work: Path, rounds: Sequence[int]
) -> None:
    """Let every teacher read once what `heal` will ask it for. Raises as `distill`."""
    with _libraries():
        from compress.healing import prepare

        prepare(recipe, products, work, rounds)


def fill_cache(
    *, recipe: Recipe, products: Mapping[str, Path], ray: str | None = None, workers: int = 1
) -> dict[str, str]:
    """Let every teacher read what the recipe's training will ask it for; digests of the shards.

    ``ray`` is the address of a Ray cluster whose ``workers`` do it, or `local`. Shards that are
    there are kept. Raises as `distill`, `RecipeError` for a training that keeps no cache, and
    `EnvironmentalError` if the workers write to another cache folder.
    """
    with _libraries():
        from compress.caching.filling import TeacherCache

        cache = TeacherCache(recipe, products)
        if ray is not None:
            from compress.caching.ray_pool import actors_of, make_shards

            with actors_of(recipe, products, address=ray, workers=workers) as actors:
                make_shards(actors, cache.missing())
            cache.require_all()
        return cache.complete()


def _made_before(out: Path, key: str) -> Artifact | None:
    found = find_artifact(out, kind="student", key=key)
    if found is not None:
        shutil.rmtree(work_folder(out), ignore_errors=True)  # a kill can leave it
    return found


@contextmanager
def _libraries() -> Iterator[None]:
    """Quiet the libraries, and give the memory back in the end."""
    quiet_libraries()
    from compress.host import give_memory_back

    try:
        yield
    finally:
        give_memory_back()


def quiet_libraries() -> None:
    """Hide progress bars and advice of other libraries; their errors still come through."""
    import warnings

    # peft still asks transformers for the old name of this attribute.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
