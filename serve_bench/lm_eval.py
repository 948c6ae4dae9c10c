"""Tasks of lm-evaluation-harness on the artifact that is deployed: an adapter from its API to our
decoder, and nothing else.

The form's all-logits graph answers, as it does when quality is scored. Task files and data are
local; nothing is fetched. lm-eval is the extra `[eval]`; it is imported when it is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import DataError, EnvironmentalError, UserError
from limbeck.contract.machine import versions
from limbeck.contract.progress import task as progress_of
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.sampling import Sampling
from limbeck.runtime.text import Text, load_text

_MOST_NEW = 256  # tokens of an answer when the task names no limit; lm-eval's own default


def evaluate(
    artifact: Path,
    *,
    tasks: Sequence[str],
    include_path: Path | None = None,
    form: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval on a form of the ``onnx`` artifact (the shipped one unless ``form``
    names another).

    ``include_path`` is a folder of task files; ``limit`` the most samples a task; ``shots``
    examples before each question. Raises `EnvironmentalError` without lm-eval, `UserError` for an
    unknown task, `DataError` for data that is not local.
    """
    if include_path is not None and not include_path.is_dir():
        raise DataError(
            f"--include-path {include_path}: no such folder; expected one with lm-eval task files "
            "(*.yaml)."
        )
    lm_eval = _lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=str(include_path) if include_path else None)
    _require_known(tasks, manager, include_path)
    opened = open_artifact(artifact, kind="onnx")
    model = _adapter(artifact, form=form, threads=threads)
    try:
        with redirect_stdout(sys.stderr):  # it prints what it does, and ours is the result alone
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                log_samples=False,
                bootstrap_iters=1000,
                verbosity="ERROR",
            )
    except (OSError, ConnectionError, ValueError) as error:
        # datasets raises these for files that are not there and for sets that it would have to
        # fetch.
        raise DataError(
            f"the data of {', '.join(tasks)} cannot be read ({error}). Nothing is fetched: name "
            "local files in the task's dataset_path and dataset_kwargs, as docs/artifacts.md shows."
        ) from error
    shipped = form or str(opened.result["shipped"])
    return {
        "artifact": opened.digest,
        "form": shipped,
        "results": {name: _figures(figures) for name, figures in found["results"].items()},
        "samples": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "shots": found["n-shot"],
        "task_versions": found["versions"],
        "versions": versions() | {"lm-eval": lm_eval.__version__},
    }


def _require_known(tasks: Sequence[str], manager: Any, include_path: Path | None) -> None:
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        where = f"in {include_path} nor " if include_path else ""
        raise UserError(
            f"--tasks: found {', '.join(unknown)}, which is neither {where}among the tasks of "
            "lm-eval."
        )


def markdown(result: dict[str, Any]) -> str:
    """A table: task, metric, value, standard error, samples."""
    lines = ["| task | metric | value | standard error | n |", "|---|---|---:|---:|---:|"]
    for name, figures in result["results"].items():
        for metric, figure in figures.items():
            error = "" if figure["stderr"] is None else f"{figure['stderr']:.4f}"
            lines.append(
                f"| {name} | {metric} | {figure['value']:.4f} | {error} | "
                f"{result['samples'].get(name, '')} |"
            )
    return "\n".join(lines)


def _lm_eval() -> Any:
    """The library, with `datasets` kept from the network and its copies in our cache folder."""
    from limbeck.contract.sources.places import cache_folder

    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache_folder() / "datasets"))
    os.environ.setdefault("HF_MODULES_CACHE", str(cache_folder() / "datasets" / "modules"))
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise EnvironmentalError(
            f"lm-eval cannot be imported ({error}); run: pip install 'limbeck[eval]', best in an "
            "environment of its own."
        ) from None
    return lm_eval


def _figures(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's flat `metric,filter` and `metric_stderr,filter` as pairs."""
    result = {}
    for key, value in found.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{kept}")
        name = metric if kept == "none" else f"{metric} ({kept})"
        result[name] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return result


def _adapter(artifact: Path, *, form: str | None, threads: int | None) -> Any:
    """Our decoder as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    decoder = Decoder(artifact, form=form, threads=threads, all_logits=True)
    text = load_text(artifact)
    context = decoder.context or 2048
    start = start_token(text)

    class Adapter(TemplateLM):  # type: ignore[misc]
        """Scores and generates with one decoder, a request at a time."""

        @property
        def eot_token_id(self) -> int:
            """Token before a text that has no context."""
            return start

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            """Token ids, with the tokenizer's special tokens if they are asked for."""
            return list(
                text.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids
            )

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return _answers("scoring", requests, lambda r: score(decoder, r[1], r[2], context))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-probability of whole texts, in windows of the model's context."""

            def total(request: Any) -> float:
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]),
                    prefix_token=start,
                    max_seq_len=context - 1,
                    context_len=1,
                )
                pieces = [make_disjoint_window(window) for window in windows]
                return sum(score(decoder, before, wanted, context)[0] for before, wanted in pieces)

            return _answers("scoring whole texts", requests, total)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Text up to the first stop text, the end token or the limit."""

            def one(request: Any) -> str:
                prompt, options = request.args
                return answer(decoder, text, self.tok_encode(prompt) or [start], options, context)

            return _answers("generating", requests, one)

    return Adapter()


def _answers(what: str, requests: Any, one: Callable[[Any], Any]) -> list[Any]:
    """The answers of ``one`` to all requests, with a bar that says how far it is."""
    found = []
    with progress_of(what, len(requests)) as progress:
        for request in requests:
            found.append(one(request))
            progress.advance()
    return found


def answer(
    decoder: Decoder, text: Text, prompt: Sequence[int], options: Mapping[str, Any], context: int
) -> str:
    """Text after ``prompt`` up to the first stop text, the end token or the limit of ``options``.

    What does not fit into ``context`` is cut off the prompt on the left.
    """
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    most = min(int(options.get("max_gen_toks", _MOST_NEW)), context - 1)
    temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
    tokens = decoder.generate(
        prompt[-(context - most) :],
        most,
        stop_ids=text.stop_ids,
        sampling=Sampling(temperature=temperature),
    )
    found = ""
    for piece in text.stream(tokens):
        found += piece
        if places := [place for stop in stops if (place := found.find(stop)) >= 0]:
            return found[: min(places)]
    return found


def start_token(text: Text) -> int:
    """The token before a text without context: BOS, else the tokenizer's end token.

    lm-eval's own model of transformers takes the same, so figures can be compared.
    """
    named = (text.special.get(name, "") for name in ("bos_token", "eos_token"))
    found = (text.tokenizer.token_to_id(token) for token in named)
    return next((i for i in found if i is not None), min(text.stop_ids, default=0))


def score(
    decoder: Decoder, before: Sequence[int], wanted: Sequence[int], context: int
) -> tuple[float, bool]:
    """Log-probability in nats of ``wanted`` after ``before``, and whether each of its tokens is the
    greedy choice.

    What does not fit into ``context`` is cut off on the left.
    """
    ids = [*before, *wanted][-(context + 1) :]
    logits = decoder.score([ids[:-1]])[0][-len(wanted) :].astype(np.float64)
    labels = np.asarray(wanted[-len(logits) :])
    peak = logits.max(1)
    log_p = (
        logits[np.arange(len(labels)), labels]
        - peak
        - np.log(np.exp(logits - peak[:, None]).sum(1))
    )
    return float(log_p.sum()), bool((logits.argmax(1) == labels).all())
