"""Does the graph compute what the student computes? Cases, torch's answers, and the differences by
form.

The cases are the ways a client feeds a decoder: a prompt, token by token, in chunks, in ragged
batches padded on either side. Torch's answers to some positions of each travel with the artifact,
so that a machine without torch can measure again.

Shape letters: B rows, L length with padding, P positions compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from export.check.verdict import TOLERANCES, judge, summary
from export.graphs import Graphs
from limbeck.contract.data.arrays import Floats, Ids
from limbeck.contract.errors import ParityError
from limbeck.contract.models.adapters import attach
from limbeck.contract.models.loading import load_pretrained
from limbeck.contract.progress import task
from limbeck.contract.recipe import Provider
from limbeck.runtime.decoder import GraphDecoder
from limbeck.runtime.session import providers

Floats64 = npt.NDArray[np.float64]

PARITY = "parity.safetensors"
PARITY_BASE = "parity_base.safetensors"  # of the base alone, where the adapter is kept apart
_KEPT_BYTES = 8_000_000  # of reference logits in the artifact
_LONG = 128  # tokens of the rows of the long case
_LONGEST = 512  # of the longest case, or the context where that is less
_COMPARED = 128  # positions of the longest case, its end among them; their logits stay in memory
_AT_ONCE = 64  # positions compared at a time, which bounds the memory
_TEXTS = 3  # rows of the long case, one a domain


@dataclass(frozen=True)
class Case:
    """One way to feed a decoder, and torch's answers to it."""

    ids: Ids  # [B, L]
    mask: Ids  # [B, L], 1 for tokens
    splits: Ids  # columns fed at a time; they sum to L
    rows: Ids  # [P]
    columns: Ids  # [P]
    logits: Floats  # [P, V]


def make_cases(
    texts: Sequence[Ids], *, context: int, more: Sequence[Ids] = (), first: Sequence[int] = ()
) -> dict[str, Case]:
    """Cases without answers from token rows ``texts``, each within ``context`` tokens.

    Every row begins with ``first``, the tokens that the model's tokenizer puts before any text (a
    BOS): without them a short row is nothing that the model has ever read. The longest case joins
    ``texts``, then ``more``, up to the context's end or 512 tokens; shorter text is repeated. It is
    fed in two halves, which bounds the memory of the graph's logits.
    """
    start = np.asarray(first, np.int64)
    texts, more = ([_without(start, row) for row in rows] for rows in (texts, more))
    # a short text is read twice rather than making a case shorter
    pool = np.concatenate([*texts, *texts])
    room = min(context, 24)
    step = max(room // 4, 1)  # tokens decoded one at a time at the end of a case

    def begin(text: Ids, length: int) -> Ids:
        return np.concatenate([start, text])[:length]

    def take(length: int, at: int = 0) -> Ids:
        return begin(np.resize(np.roll(pool, -at), length), length)

    def case(
        tokens: Sequence[Ids], splits: Sequence[int], *, left: bool = True, tail: int = 0
    ) -> Case:
        width = int(sum(splits))
        ids = np.zeros((len(tokens), width), np.int64)
        mask = np.zeros((len(tokens), width), np.int64)
        for row, text in enumerate(tokens):
            head = len(text) - tail  # of the padded part; the tail is decoded without padding
            start = width - len(text) if left else 0
            mask[row, start : start + head] = 1
            mask[row, width - tail :] = 1
            ids[row, mask[row] == 1] = text
        rows, columns = np.nonzero(mask)
        return Case(
            ids, mask, np.asarray(splits, np.int64), rows, columns, np.zeros((0, 0), np.float32)
        )

    head = room - step
    ragged = [take(length + step, 7 * n) for n, length in enumerate((head, max(head // 2, 1), 1))]
    steps = [1] * step
    long = [begin(text, min(context, _LONG)) for text in texts[:_TEXTS]]
    length = min(context, _LONGEST)
    longest = begin(np.resize(np.concatenate([*texts, *more]), length), length)
    kept = np.unique(np.linspace(0, len(longest) - 1, _COMPARED).astype(np.int64))
    halves = [part for part in (len(longest) - len(longest) // 2, len(longest) // 2) if part]
    return {
        "prompt": case([take(room)], [room]),
        "one_token": case([take(1, 3)], [1]),
        "decode": case([take(room, 5)], [head, *steps]),
        "decode_from_one": case([take(1 + step, 9)], [1, *steps]),
        "chunks": case([take(room, 11)], [head, step]),
        "left_padded": case(ragged, [head, *steps], tail=step),
        "right_padded": case(ragged, [head, *steps], left=False, tail=step),
        "long": case(long, [max(len(text) for text in long)]),
        "longest": replace(case([longest], halves), rows=np.zeros_like(kept), columns=kept),
    }


def _without(start: Ids, row: Ids) -> Ids:
    """``row`` without ``start`` at its head, where it has that already."""
    return row[len(start) :] if np.array_equal(row[: len(start)], start) else row


def answer(
    cases: Mapping[str, Case], model: Path, *, adapter: Path | None = None
) -> dict[str, Case]:
    """Fill in the logits of the transformers folder ``model`` in eager fp32, at the positions of
    every case.

    ``adapter`` is a peft folder that sits on it.

    Each row is run by itself without its padding, which is what a padded row must be equal to.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded = load_pretrained(transformers.AutoModelForCausalLM, model, **options)
    if adapter is not None:
        loaded = attach(loaded, adapter)
    loaded.eval()
    answered = {}
    with torch.inference_mode(), task("reference answers of torch", len(cases)) as progress:
        for name, case in cases.items():
            logits = []
            for row, (ids, mask) in enumerate(zip(case.ids, case.mask, strict=True)):
                tokens, kept = ids[mask == 1], np.cumsum(mask)[case.columns[case.rows == row]] - 1
                asked = {
                    "input_ids": torch.from_numpy(tokens[None]),
                    "logits_to_keep": torch.from_numpy(kept),
                }
                logits.append(loaded(**asked, use_cache=False).logits[0].numpy())
            answered[name] = replace(case, logits=np.concatenate(logits))
            progress.advance()
    return answered


def thin(cases: Mapping[str, Case]) -> dict[str, Case]:
    """Keep few enough positions of each case to travel with the artifact: where a prompt ends
    first, then spread evenly."""
    vocabulary = next(iter(cases.values())).logits.shape[1]
    each = max(_KEPT_BYTES // (4 * vocabulary * len(cases)), 2)
    kept = {}
    for name, case in cases.items():
        ends = np.flatnonzero(_after_prompt(case))
        order = np.unique(
            np.concatenate(
                [ends[-each // 2 :], np.linspace(0, len(case.rows) - 1, each).astype(np.int64)]
            )
        )
        if len(order) > each:
            order = order[np.linspace(0, len(order) - 1, each).astype(np.int64)]
        kept[name] = replace(
            case, rows=case.rows[order], columns=case.columns[order], logits=case.logits[order]
        )
    return kept


def save_cases(path: Path, cases: Mapping[str, Case]) -> None:
    """Write cases to one safetensors file."""
    save_arrays(path, {name: vars(case) for name, case in cases.items()})


def load_cases(path: Path) -> dict[str, Case]:
    """Read what `save_cases` wrote."""
    return {name: Case(**arrays) for name, arrays in load_arrays(path).items()}


def save_arrays(path: Path, cases: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> None:
    """Write the named arrays of each case to one safetensors file."""
    save_file(
        {
            f"{c}/{n}": np.ascontiguousarray(v)
            for c, arrays in cases.items()
            for n, v in arrays.items()
        },
        path,
    )


def load_arrays(path: Path) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Read what `save_arrays` wrote, the cases in the order of their names."""
    cases: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for name, values in sorted(load_file(path).items()):
        case, _, array = name.partition("/")
        cases.setdefault(case, {})[array] = values
    return cases


def measure_parity(
    form: str,
    graphs: Graphs,
    cases: Mapping[str, Case],
    *,
    provider: Provider = "cpu",
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Differences between the graphs of ``form`` and the cases' answers, by case and over all
    positions.

    Both graphs are fed: that of all logits is compared at every position, the other where it has an
    answer. Where there is a graph for prompts, it reads the long ones, and the graph of the last
    logits goes on: cases that are judged, but not in the figures of the form.
    The result names the tolerance and the ``failures``, empty when the form is good enough.
    """
    lead = TOLERANCES[form].lead
    by_case: dict[str, Floats64] = {}
    nll: dict[str, float] = {}
    largest = max(float(np.abs(case.logits).max()) for case in cases.values())
    with task(f"parity of {form}", (2 + bool(graphs.prompt)) * len(cases)) as progress:
        for path in (graphs.all, graphs.last):
            decoder = GraphDecoder(path, provider=provider, adapter=adapter)
            found, losses = compare(decoder, cases, progress.advance)
            by_case |= found
            nll |= losses
            del decoder  # its weights, before the next graph's are loaded
        after_prompts: dict[str, Floats64] = {}
        if graphs.prompt:
            decoder = GraphDecoder(
                graphs.last, provider=provider, adapter=adapter, prompts=graphs.prompt
            )
            after_prompts, _ = compare(decoder, cases, progress.advance)
            del decoder
    verdict = judge(form, by_case | after_prompts, largest=largest)
    return {
        **summary(np.concatenate(list(by_case.values()), axis=1), lead),
        **nll,
        "provider": provider,
        "tolerance": verdict.limits,
        "lead": lead,
        "cases": {name: summary(found, lead) for name, found in (by_case | after_prompts).items()},
        "failures": verdict.failures,
    }


def compare(
    decoder: GraphDecoder, cases: Mapping[str, Case], advance: Callable[[], None] = lambda: None
) -> tuple[dict[str, Floats64], dict[str, float]]:
    """`differences` of each case from a graph's answers, and the losses of the long case.

    A graph of the last logits alone is compared where it answers, under the name ``case/last``;
    with a graph for prompts, which reads long ones alone, under the name ``case/prompt``.
    """
    by_case: dict[str, Floats64] = {}
    nll: dict[str, float] = {}
    for name, case in cases.items():
        if decoder.prompts and not decoder.is_long(int(case.splits[0])):
            advance()
            continue
        every = decoder.all_logits
        kind = "prompt" if decoder.prompts else "last"
        chosen = np.arange(len(case.rows)) if every else np.flatnonzero(_after_prompt(case))
        if len(chosen):
            found = feed(decoder, case)
            by_case[name if every else f"{name}/{kind}"] = differences(case, chosen, found)
            if name == "long" and len(chosen) == case.mask.sum():
                nll = _nll(case, found)
            del found  # before the next case's are made
        advance()
    return by_case, nll


def provider_here(provider: Provider) -> Provider:
    """Where parity is measured: the provider that a form is made for where this machine has it,
    else the CPU.

    The CPU computes every form: what it has no kernel for, it casts. The arithmetic then differs
    from the target's.
    """
    return provider if provider in providers() else "cpu"


def require_parity(form: str, parity: Mapping[str, Any]) -> None:
    """Raise `ParityError` naming the cases past tolerance, if there are any."""
    if parity["failures"]:
        listed = "\n".join(f"  {failure}" for failure in parity["failures"])
        raise ParityError(
            f"the {form} graph does not compute what the student computes:\n{listed}\n"
            "Choose another form or a smaller block_size in the recipe, or report the model."
        )


def feed(decoder: GraphDecoder, case: Case) -> Floats:
    """Logits ``[P, V]`` at the positions of a case that is fed in its splits; NaN where a
    last-logits graph does not answer.

    A graph of fixed shape gets the rows as many at a time as it takes.
    """
    width, most = case.ids.shape[1], decoder.fixed[0] if decoder.fixed else len(case.ids)
    out = np.full((len(case.rows), decoder.vocabulary), np.nan, np.float32)
    for first in range(0, len(case.ids), most):
        part = slice(first, first + most)
        all_ids, all_mask = case.ids[part], case.mask[part]
        mine = (case.rows >= first) & (case.rows < first + most)
        start = 0
        for count in case.splits.tolist():
            ids, mask = all_ids[:, start : start + count], all_mask[:, start : start + count]
            found = (
                decoder.extend(ids, mask)
                if start
                else decoder.prefill(ids, mask, room=width - count)
            )
            at = np.flatnonzero(mine & (case.columns >= start) & (case.columns < start + count))
            rows, columns = case.rows[at] - first, case.columns[at] - start
            if decoder.all_logits:
                out[at] = found[rows, columns]
            else:
                ends = columns == (count - 1 - np.argmax(mask[:, ::-1], axis=1))[rows]
                out[at[ends]] = found[rows[ends]]
            start += count
    return out


def _after_prompt(case: Case) -> npt.NDArray[np.bool_]:
    """Which answers ``[P]`` follow a run's last token: those a last-logits graph gives."""
    given = np.zeros(case.mask.shape, bool)
    start = 0
    for count in case.splits.tolist():
        part = case.mask[:, start : start + count]
        given[np.arange(len(part)), start + count - 1 - np.argmax(part[:, ::-1], axis=1)] = True
        start += count
    return np.asarray(given[case.rows, case.columns])


def differences(case: Case, chosen: Ids, found_PV: Floats) -> Floats64:
    """Five numbers a ``chosen`` position ``[5, P]``: largest and mean logit difference, KL(torch ||
    found), same choice, lead."""
    out = np.empty((5, len(chosen)))
    for start in range(0, len(chosen), _AT_ONCE):
        piece, at = slice(start, start + _AT_ONCE), chosen[start : start + _AT_ONCE]
        reference, found = case.logits[at], found_PV[at]
        p, q = _log_softmax(reference), _log_softmax(found)
        gap = np.abs(reference - found)
        first = reference.argmax(axis=1)
        out[0, piece], out[1, piece] = gap.max(axis=1), gap.mean(axis=1)
        out[2, piece] = (np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64)
        out[3, piece] = first == found.argmax(axis=1)
        out[4, piece] = margins(reference)
    return out


def margins(logits_PV: Floats) -> Floats:
    """How far the first choice of each position leads the second, ``[P]``."""
    two = np.partition(logits_PV, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0], np.float32)


def _nll(case: Case, found_PV: Floats) -> dict[str, float]:
    """Nats a token of torch and the graph on the text of ``case``, where the next is known."""
    known = np.flatnonzero(case.columns + 1 < case.ids.shape[1])
    known = known[case.mask[case.rows[known], case.columns[known] + 1] == 1]
    sums = {"nll_torch": 0.0, "nll": 0.0}
    for start in range(0, len(known), _AT_ONCE):
        at = known[start : start + _AT_ONCE]
        rows, columns = case.rows[at], case.columns[at]
        labels = case.ids[rows, columns + 1]
        for name, logits in (("nll_torch", case.logits[at]), ("nll", found_PV[at])):
            sums[name] -= float(
                _log_softmax(logits)[np.arange(len(at)), labels].sum(dtype=np.float64)
            )
    return {name: total / len(known) for name, total in sums.items()}


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(
        np.float32
    )
    return shifted
