"""Text that the student writes during its training: which rows, their prompts, and the sampling.

Every choice is a function of the seed, the step and the row. So neither an interruption nor the
number of processes changes what is drawn; the student's rounding alone can.

Shapes: R rows of the global batch, G rows written at once, L positions of a block, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from compress.data.chat import chat_template, turn_end
from compress.data.prompts import first_tokens
from compress.head import IGNORED
from compress.models.body import causal_lm
from limbeck.contract.data.generated import repetition
from limbeck.contract.recipe import ChatRows, OnPolicy, Recipe

# Last numbers of seeds of four: no stream equals another one, or that of the order of training.
_WINDOW, _SAMPLING, _PROMPTS = 1, 2, 3

Batch = tuple[npt.NDArray[np.int64], Tensor, Tensor]  # domains [R], ids and labels [R, L]
Seed = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Beginning of a row."""

    row: int  # in the global batch
    place: int  # in `OwnText.places`
    seed: Seed
    ids: list[int]


@dataclass(frozen=True)
class OwnRow:
    """A row as the student has written it."""

    prompt: Prompt
    new: list[int]  # tokens after the prompt, the end-of-text token included

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.new)

    @property
    def repetition(self) -> float:
        """Share of 4-grams of the new tokens that were there before."""
        return repetition(self.new)


@dataclass(frozen=True)
class Written:
    """A global batch in which this process has replaced its own rows."""

    rows: Sequence[OwnRow]  # of this process
    is_own_R: Tensor  # of all processes
    ids_RL: Tensor
    labels_RL: Tensor  # of own rows: the new tokens
    prompt_labels_RL: Tensor  # of own rows: the tokens of the prompt
    seconds: float


class OwnText:
    """The writing of one recipe, `training.on_policy`."""

    def __init__(
        self,
        recipe: Recipe,
        config: OnPolicy,
        tokenizer: PreTrainedTokenizerFast,
        *,
        vocabulary: int,
        plain: bool = False,
    ) -> None:
        """``vocabulary`` is the number of token ids that student and teachers share.

        ``plain`` allows no added tokens but the end-of-text token: a teacher with another
        tokenizer may not have them.
        Raises `DataError` for a text of prompts that is missing or empty.
        """
        self.config, self.block, self._seed = config, recipe.data.block, recipe.seed
        self._tokenizer, self._vocabulary = tokenizer, min(vocabulary, len(tokenizer))
        added = tokenizer.added_tokens_decoder if plain else {}
        self._forbidden = sorted(set(added) - {tokenizer.eos_token_id})
        self._chat = [isinstance(d.text.format, ChatRows) for d in recipe.data.domains]
        end = turn_end(tokenizer, chat_template(tokenizer)) if any(self._chat) else None
        self._end_of_turn = tokenizer.convert_tokens_to_ids(end.strip()) if end else None
        self.places = [d.name for d in recipe.data.domains]
        self._prompts: list[list[int]] = []
        if config.prompts.text is not None:
            self.places = ["prompts"]
            self._prompts = first_tokens(
                config.prompts.text, tokenizer, folder=recipe.folder,
                tokens=config.prompts.tokens, most=self.block - 1,
            )  # fmt: skip

    # Which rows, and how they begin --------------------------------------------------------------

    def rows(self, step: int, count: int) -> list[int]:
        """Rows of a step's batch of ``count`` that the student writes, over the steps its share.

        They are neighbours, with the first row after the last: processes, which take every n-th
        row, and domains, which take turns, all get their part.
        """
        if step % self.config.every:
            return []
        turn, share = step // self.config.every, self.config.share * count
        own = int((turn + 1) * share + 1e-9) - int(turn * share + 1e-9)
        first = int(self._draw(step, 0, _WINDOW).integers(count))
        return sorted((first + offset) % count for offset in range(own))

    def prompts(self, step: int, batch: Batch) -> list[Prompt]:
        """Prompts of all own rows of a step, by row."""
        domains, ids_RL, labels_RL = batch
        found = []
        for row in self.rows(step, len(ids_RL)):
            seed = (self._seed, step, row)
            if self._prompts:
                drawn = self._draw(step, row, _PROMPTS).integers(len(self._prompts))
                found.append(Prompt(row, 0, seed, self._prompts[int(drawn)]))
                continue
            domain = int(domains[row])
            labels = (labels_RL[row] != IGNORED).nonzero()[:, 0]
            first, last = int(labels[0]) + 1, int(labels[-1]) + 1  # tokens that are labels
            end = first if self._chat[domain] else min(self.config.prompts.tokens, last)
            found.append(Prompt(row, domain, seed, ids_RL[row, :end].tolist()))
        return found

    def _draw(self, step: int, row: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, step, row, purpose))

    # Writing -------------------------------------------------------------------------------------

    def write(self, model: Any, step: int, batch: Batch, *, rank: int, processes: int) -> Written:
        """Replace the own rows of a batch. This process writes every ``processes``-th row.

        Call it under autocast, with the model on its device; its mode is kept.
        """
        _, ids_RL, labels_RL = batch
        begun = now(causal_lm(model))
        prompts = self.prompts(step, batch)
        is_own_R = torch.zeros(len(ids_RL), dtype=torch.bool)
        is_own_R[[p.row for p in prompts]] = True
        rows = self.continuations(model, [p for p in prompts if p.row % processes == rank])
        ids_RL, labels_RL = ids_RL.clone(), labels_RL.clone()
        prompt_labels_RL = torch.full_like(labels_RL, IGNORED)
        if rows:
            mine = torch.tensor([own.prompt.row for own in rows])
            own_RL = laid_out(rows, ids_RL.shape[1])
            ids_RL[mine], labels_RL[mine], prompt_labels_RL[mine] = own_RL
        seconds = now(causal_lm(model)) - begun
        return Written(rows, is_own_R, ids_RL, labels_RL, prompt_labels_RL, seconds)

    def continuations(self, model: Any, prompts: Sequence[Prompt]) -> list[OwnRow]:
        """Continue prompts with samples of the student as it is now."""
        size = self.config.batch
        groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [row for group in groups for row in self._continue(model, group)]

    @torch.no_grad()
    def _continue(self, model: Any, prompts: Sequence[Prompt]) -> list[OwnRow]:
        room = [min(self.config.new_tokens, self.block - len(p.ids)) for p in prompts]
        longest, most = max(len(p.ids) for p in prompts), max(room)
        lm = causal_lm(model)
        ids_GL = torch.zeros(len(prompts), longest, dtype=torch.long, device=lm.device)
        mask_GL = torch.zeros_like(ids_GL)
        for g, prompt in enumerate(prompts):  # padded on the left, as `generate` wants it
            ids_GL[g, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_GL[g, longest - len(prompt.ids) :] = 1
        draws = [np.random.default_rng((*p.seed, _SAMPLING)).random(most) for p in prompts]
        sampler = Sampler(
            torch.from_numpy(np.stack(draws)).to(lm.device),
            vocabulary=self._vocabulary,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            forbidden=self._forbidden,
        )
        ends = self._ends(lm)
        with _plain_generation(model, ends):
            made = lm.generate(
                input_ids=ids_GL,
                attention_mask=mask_GL,
                logits_processor=LogitsProcessorList([sampler]),
                max_new_tokens=most,
            )
        rows = made[:, longest:].tolist()
        return [
            OwnRow(prompt, _until(row[:space], ends))
            for prompt, row, space in zip(prompts, rows, room, strict=True)
        ]

    def _ends(self, lm: Any) -> list[int]:
        """Ids that end a text: the tokenizer's, the generation config's and the chat template's."""
        ends = lm.generation_config.eos_token_id
        several = ends if isinstance(ends, list) else [ends]
        found = {self._tokenizer.eos_token_id, self._end_of_turn, *several} - {None}
        return sorted(end for end in found if 0 <= end < self._vocabulary)

    # Telling -------------------------------------------------------------------------------------

    def sample(self, step: int, row: OwnRow) -> dict[str, Any]:
        """One line of the file of samples."""
        return {
            "step": step,
            "row": row.prompt.row,
            "from": self.places[row.prompt.place],
            "seed": list(row.prompt.seed),
            "prompt": self._tokenizer.decode(row.prompt.ids),
            "text": self._tokenizer.decode(row.new),
            "tokens": len(row.new),
            "repetition": round(row.repetition, 4),
        }


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Choose each next token by a number in [0, 1) that was drawn beforehand.

    The token is the first whose cumulative probability exceeds the number (inverse transform
    sampling), so that a row's text depends on its own numbers only, not on the rows beside it.
    """

    def __init__(
        self, draws_Gn: Tensor, *, vocabulary: int, temperature: float = 1.0, top_p: float = 1.0,
        forbidden: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._forbidden = [token for token in forbidden if token < vocabulary]
        self._draws, self._vocabulary, self._step = draws_Gn, vocabulary, 0
        self._warpers = LogitsProcessorList()
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_p != 1.0:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[G, V]`` that are finite for the chosen token only."""
        z_GV = scores[:, : self._vocabulary].float()
        if self._forbidden:
            z_GV = z_GV.clone()
            z_GV[:, self._forbidden] = -torch.inf
        z_GV = self._warpers(input_ids, z_GV)
        cumulative_GV = torch.softmax(z_GV.double(), dim=-1).cumsum(-1)
        draw_G1 = self._draws[:, self._step, None] * cumulative_GV[:, -1:]
        self._step += 1
        chosen_G1 = torch.searchsorted(cumulative_GV, draw_G1, right=True)
        chosen_G1.clamp_(max=self._vocabulary - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_G1, 0.0)


@contextlib.contextmanager
def _plain_generation(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """Without dropout, and without what a model's generation configuration would do to scores."""
    lm, was_training = causal_lm(model), model.training
    given = lm.generation_config
    lm.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=list(ends) or None, pad_token_id=0
    )
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        lm.generation_config = given


def laid_out(rows: Sequence[OwnRow], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, labels of the new tokens and labels of the prompts, ``[R, length]`` each."""
    ids_RL = torch.zeros(len(rows), length, dtype=torch.long)
    labels_RL = torch.full_like(ids_RL, IGNORED)
    prompt_labels_RL = labels_RL.clone()
    for index, own in enumerate(rows):
        whole, before = torch.tensor([*own.prompt.ids, *own.new]), len(own.prompt.ids)
        ids_RL[index, : len(whole)] = whole
        labels_RL[index, before - 1 : len(whole) - 1] = whole[before:]
        prompt_labels_RL[index, : before - 1] = whole[1:before]
    return ids_RL, labels_RL, prompt_labels_RL


def _until(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first of ``ends``, which is included."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[: stop + 1])


def now(*where: Any) -> float:
    """Seconds of a clock, once the device of these models or tensors has finished its work."""
    if any(torch.device(thing.device).type == "cuda" for thing in where):
        torch.cuda.synchronize()
    return time.monotonic()
