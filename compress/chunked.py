"""The loss of `compress.loss`, with its gradient, in chunks: what training computes.

No tensor ``[T, V]`` outlives its chunk, and a chunk is worked through in blocks that fit in a CPU's
cache.

Shapes: K teachers, R rows (sequences), L positions of a row, T label positions of a batch, C of a
chunk, B of a block of a chunk, V vocabulary, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.aligned import AlignedReading, chunk_terms, ranked_loss, student_logp
from compress.divergence import divergence, safe_log, softmax_and_norm
from compress.head import IGNORED, Head, Place, blocks_of, chunks_of_labels
from compress.loss import is_fused
from compress.states import AnyStates, Reading, statistics_of, teacher_statistics
from compress.weights import Reach, span_of, weigh
from limbeck.contract.recipe import Fusion


@dataclass(frozen=True)
class FusionTerms:
    """Raw terms of one batch, each summed over its label positions; statistics per position."""

    loss: Tensor  # scalar with gradient: (alpha CE + beta tau^2 D) / denominator
    cross_entropy: float  # nats
    divergence: float  # tau^2 D, nats
    weights_KRL: Tensor
    entropy_KRL: Tensor  # nats, of the calibrated teachers at tau = 1
    label_logp_KRL: Tensor  # nats
    own_logp_RL: Tensor  # of the label under the student, nats
    reach: Reach | None = None  # of teachers with other tokenizers


def fused_loss(
    config: Fusion,
    *,
    hidden_RLd: Tensor,
    head: Head,
    teachers: Sequence[AnyStates],
    labels_RL: Tensor,
    denominator: int,
    names: Sequence[str] = (),
    progress: float = 1.0,
    global_means_2K: Tensor | None = None,
    prior_KR: Tensor | None = None,
    uncovered: float = 1.0,
) -> FusionTerms:
    """Compute `compress.loss.plain_loss` in chunks, with its gradient at hidden states and head.

    ``denominator`` is the number of label positions of the *global* batch, so that the losses of
    micro-batches and processes add up. Without teachers the loss is the cross-entropy. ``names``
    are those of the teachers, ``progress`` is the share of the training that is done, and
    ``global_means_2K`` and ``prior_KR`` are explained at `compress.weights.weigh`. ``uncovered`` is
    alpha at labels without a teacher: 0 on text that the student wrote itself.

    Extra memory: K + 2 products ``[C, V]`` in the heads' number type (one belongs to the chunk
    before) and a few fp32 blocks of them; on a GPU a block is the chunk. The vocabulary is the rows
    that student and teachers share; padded rows are left out.
    """
    vocabulary = min([len(head.weight_Vd), *(t.vocabulary for t in teachers)])
    batch = _Batch(
        config, head, teachers, labels_RL, denominator, vocabulary, names, progress, prior_KR,
        uncovered,
    )  # fmt: skip
    if batch.weighs == "ahead":
        batch.weigh_ahead(global_means_2K)
        if batch.matched:
            own_RL = student_logp(hidden_RLd, head, labels_RL, rows=vocabulary, chunk=config.chunk)
            batch.match_chunks(slice(None), own_RL)
    loss: Tensor = _ChunkedLoss.apply(hidden_RLd, head.weight_Vd, head.bias_V, batch)  # type: ignore[no-untyped-call]
    return FusionTerms(
        loss,
        batch.cross_entropy,
        batch.divergence,
        batch.weights_KRL,
        batch.entropy_KRL,
        batch.label_logp_KRL,
        batch.own_logp_RL,
        batch.reach,
    )


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradient in one pass over the chunks; no ``[T, V]`` tensor outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RLd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, batch: _Batch
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = batch.vocabulary
        grad_hidden = torch.zeros_like(hidden_RLd) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_Vd, dtype=torch.float32) if wants_weight else None
        grad_bias = None
        if wants_bias and bias_V is not None:
            grad_bias = torch.zeros_like(bias_V, dtype=torch.float32)
        # Autograd gives this function detached tensors of the same head.
        head = Head(weight_Vd, bias_V, batch.head.scale, batch.head.softcap)
        loss = torch.zeros((), dtype=torch.float64)
        for place in chunks_of_labels(
            batch.labels_RL, batch.config.chunk, whole_rows=batch.weighs == "rows"
        ):
            hidden_Cd = hidden_RLd[place]
            value, slope_CV = batch.chunk(head, hidden_Cd, place)
            loss += value
            # Logits are h W^T + b, so their gradient G gives G W, G^T h and the sum of G.
            if wants_hidden or wants_weight:
                slope_CV = slope_CV.to(hidden_Cd.dtype)
            if grad_hidden is not None:
                grad_hidden[place] = slope_CV @ weight_Vd[:rows].to(slope_CV.dtype)
            if grad_weight is not None:
                grad_weight[:rows] += slope_CV.T @ hidden_Cd
            if grad_bias is not None:
                grad_bias[:rows] += slope_CV.sum(0)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight_Vd.dtype, bias_V.dtype if bias_V is not None else None
        loss += batch.chunks / batch.denominator
        return loss.float().to(hidden_RLd.device)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias = (
            g.mul_(grad_loss.to(g.dtype)) if g is not None else None for g in ctx.gradients
        )
        weight_type, bias_type = ctx.dtypes
        return (
            hidden,
            weight.to(weight_type) if weight is not None else None,
            bias.to(bias_type) if bias is not None and bias_type is not None else None,
            None,
        )


@dataclass
class _Batch:
    """One batch: what the chunks read, and the terms that they add to."""

    config: Fusion
    head: Head
    teachers: Sequence[AnyStates]
    labels_RL: Tensor
    denominator: int
    vocabulary: int
    names: Sequence[str]
    progress: float
    prior_KR: Tensor | None = None
    uncovered: float = 1.0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    chunks: float = 0.0  # beta times the terms of chunks
    weights_KRL: Tensor = field(init=False)
    entropy_KRL: Tensor = field(init=False)
    label_logp_KRL: Tensor = field(init=False)
    own_logp_RL: Tensor = field(init=False)
    reach: Reach | None = field(init=False)
    mixed: list[int] = field(init=False)  # teachers in the fused target
    across: list[int] = field(init=False)  # the others, which have a loss of their own
    matched: list[int] = field(init=False)  # those of them whose chunks are compared
    chunk_slope_RL: Tensor | None = None  # at the label's log-likelihood, times beta
    covered_RL: Tensor | None = None  # labels in such a chunk

    def __post_init__(self) -> None:
        shape = len(self.teachers), *self.labels_RL.shape
        self.weights_KRL = torch.zeros(shape, device=self.labels_RL.device)
        self.entropy_KRL = torch.zeros_like(self.weights_KRL)
        self.label_logp_KRL = torch.zeros_like(self.weights_KRL)
        self.own_logp_RL = self.weights_KRL.new_zeros(self.labels_RL.shape)
        # When weights are computed: with each block, with each chunk of whole rows where a weight
        # depends on its row, or ahead of the chunks where it depends on more than a chunk holds.
        self.reach = Reach.of([t.spans for t in self.teachers], self.labels_RL)
        K = len(self.teachers)
        self.mixed = [k for k in range(K) if is_fused(self.config, self.teachers[k])]
        self.across = [k for k in range(K) if k not in self.mixed]
        self.matched = self.across if self.config.across != "uld" else []
        span = span_of(self.config.weights, aligned=self.reach is not None)
        # A chunk of text needs the labels of its whole row, as a weight of a row does.
        by_row = span != "token" or bool(self.matched)
        self.weighs = "rows" if by_row and self.teachers else "block"
        if self.weighs == "rows" and (
            span == "batch" or self.config.chunk < self.labels_RL.shape[1]
        ):
            self.weighs = "ahead"
        if self.matched:
            spans = [self.teachers[k].spans for k in self.matched]
            self.covered_RL = torch.stack([s.start_RL >= 0 for s in spans if s is not None]).any(0)
            self.chunk_slope_RL = torch.zeros_like(self.weights_KRL[0])

    def weigh_ahead(self, global_means_2K: Tensor | None) -> None:
        """Compute the statistics and the weights of the whole batch, in a pass of its own."""
        self.entropy_KRL, self.label_logp_KRL = teacher_statistics(
            self.teachers, self.labels_RL, vocabulary=self.vocabulary, chunk=self.config.chunk
        )
        self._weigh((slice(None), slice(None)), global_means_2K)

    @torch.no_grad()
    def match_chunks(self, rows: Tensor | slice, own_RL: Tensor) -> None:
        """Compare the likelihoods of the chunks in ``rows``, once the weights there are known.

        ``own_RL`` are the student's label log-likelihoods in these rows.
        """
        spans = [self.teachers[k].spans for k in self.matched]
        value, slope_RL = chunk_terms(
            [s.rows(rows) for s in spans if s is not None],
            [self.weights_KRL[k][rows] for k in self.matched],
            [self.label_logp_KRL[k][rows] for k in self.matched],
            own_RL,
            self.labels_RL[rows] != IGNORED,
            self.config.temperature,
        )
        assert self.chunk_slope_RL is not None
        self.chunk_slope_RL[rows] = self.config.weight * slope_RL
        self.divergence += value
        self.chunks += self.config.weight * value

    def chunk(self, head: Head, hidden_Cd: Tensor, place: Place) -> tuple[float, Tensor]:
        """Return the loss of one chunk and its gradient ``[C, V]`` at the product h W^T + b."""
        labels_C = self.labels_RL[place]
        product_CV = head.product(hidden_Cd, self.vocabulary)
        # Weighing has read all of a teacher that matching chunks needs.
        known = self.matched if self.weighs == "ahead" else ()
        readings = [
            None if k in known else teacher.read(place, self.vocabulary)
            for k, teacher in enumerate(self.teachers)
        ]
        if self.weighs == "rows":
            # The blocks compute these softmaxes again: cheaper than to keep K of them.
            for k, reading in enumerate(readings):
                assert reading is not None, "weighed ahead"
                self.entropy_KRL[k][place], self.label_logp_KRL[k][place] = statistics_of(
                    reading, labels_C, self.vocabulary
                )
            rows = place[0].unique()
            self._weigh((rows,))
            if self.matched:
                own_RL = torch.zeros_like(self.weights_KRL[0])
                own_RL[place] = head.label_logp(product_CV, labels_C)
                self.match_chunks(rows, own_RL[rows])
                readings = [None if k in self.matched else r for k, r in enumerate(readings)]
        loss = 0.0
        for block in blocks_of(labels_C, self.vocabulary):
            value, slope_BV = self._block(head, product_CV, readings, place, block)
            product_CV[block] = slope_BV  # the gradient takes the place of the product
            loss += value
        return loss, product_CV

    def _block(
        self,
        head: Head,
        product_CV: Tensor,
        readings: Sequence[Reading | None],
        place: Place,
        block: slice,
    ) -> tuple[float, Tensor]:
        """As `chunk`, for one block of it.

        The gradient at the logits z is alpha (softmax(z) - y) + beta tau G: y is the one-hot label
        and G is the gradient of D at z / tau, so that tau^2 / tau leaves one tau.
        """
        config, labels_B1 = self.config, self.labels_RL[place][block, None]
        z_BV = head.finish(product_CV[block])
        q_BV, norm_B1 = softmax_and_norm(z_BV)
        logq_BV = z_BV.sub_(norm_B1)  # in place: the logits are not read again
        logq_B = logq_BV.gather(1, labels_B1)[:, 0]
        self.own_logp_RL[place[0][block], place[1][block]] = logq_B.float()
        cross_entropy = -float(logq_B.double().sum())
        self.cross_entropy += cross_entropy
        alpha, beta, fusion, slope_BV = 1.0, 0.0, 0.0, q_BV
        if readings and self.reach is not None:
            return self._block_within_reach(head, readings, place, block, logq_BV, norm_B1, q_BV)
        if readings:
            alpha, beta, tau = config.cross_entropy, config.weight, config.temperature
            target_BV = self._target(readings, place, block, logq_BV)
            assert target_BV is not None, "every teacher is in it"
            value_B, slope_BV = self._divergence(target_BV, logq_BV, q_BV)
            fusion = float(value_B.double().sum()) * tau**2
            slope_BV.mul_(beta * tau).add_(q_BV, alpha=alpha)
            self.divergence += fusion
        slope_BV.scatter_add_(1, labels_B1, torch.full_like(slope_BV[:, :1], -alpha))
        self._to_product(head, slope_BV, logq_BV, norm_B1)
        return (alpha * cross_entropy + beta * fusion) / self.denominator, slope_BV

    def _to_product(self, head: Head, slope_BV: Tensor, logq_BV: Tensor, norm_B1: Tensor) -> None:
        """Turn a gradient at the logits into one at the product h W^T + b, in place."""
        if head.softcap is not None:
            # z = c tanh(x / c), so dz/dx = 1 - (z / c)^2; the logits are logq + norm.
            slope_BV.mul_(1 - ((logq_BV + norm_B1) / head.softcap) ** 2)
        slope_BV.mul_(head.scale / self.denominator)

    def _block_within_reach(
        self,
        head: Head,
        readings: Sequence[Reading | None],
        place: Place,
        block: slice,
        logq_BV: Tensor,
        norm_B1: Tensor,
        q_BV: Tensor,
    ) -> tuple[float, Tensor]:
        """As `_block`, where teachers may miss a label: alpha and beta depend on the label."""
        config, labels_B1 = self.config, self.labels_RL[place][block, None]
        at = place[0][block], place[1][block]
        target_BV, tau = self._target(readings, place, block, logq_BV), config.temperature
        weights_KB1 = self.weights_KRL[:, at[0], at[1], None]
        if target_BV is None:
            fusion_B, slope_BV = torch.zeros_like(norm_B1[:, 0]), torch.zeros_like(q_BV)
        else:
            share_B1 = weights_KB1[self.mixed].sum(0)
            value_B, slope_BV = self._divergence(target_BV, logq_BV, q_BV)
            fusion_B = torch.where(share_B1[:, 0] > 0, value_B * tau**2 * share_B1[:, 0], 0.0)
            slope_BV.mul_(config.weight * tau * share_B1)
        if config.across == "uld":
            for k in self.across:
                reading = readings[k]
                assert isinstance(reading, AlignedReading), "the recipe's check refuses a cache"
                value_B, ranked_BV = ranked_loss(reading.ranked(block), q_BV)
                fusion_B = fusion_B + weights_KB1[k, :, 0] * value_B
                slope_BV.addcmul_(ranked_BV, config.weight * weights_KB1[k])
        has_B1 = weights_KB1.sum(0) > 0
        if self.covered_RL is not None:
            has_B1 = has_B1 | self.covered_RL[at][:, None]
        alpha_B1 = torch.where(has_B1, config.cross_entropy, self.uncovered)
        logp_B1 = logq_BV.gather(1, labels_B1)
        loss = float((config.weight * fusion_B - (alpha_B1 * logp_B1)[:, 0]).double().sum())
        if self.chunk_slope_RL is not None:  # d log q(label) / dz is y - q
            alpha_B1 = alpha_B1 - self.chunk_slope_RL[at][:, None]
        slope_BV.addcmul_(q_BV, alpha_B1).scatter_add_(1, labels_B1, -alpha_B1)
        self.divergence += float(fusion_B.double().sum())
        self._to_product(head, slope_BV, logq_BV, norm_B1)
        return loss / self.denominator, slope_BV

    def _divergence(
        self, target_BV: Tensor, logq_BV: Tensor, q_BV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """D ``[B]`` at tau, and its gradient at z / tau; ``q_BV`` is the student at tau = 1."""
        kind, tau = self.config.divergence, self.config.temperature
        if tau == 1.0:
            return divergence(kind, target_BV, logq_BV, q_BV)
        return divergence(kind, target_BV, torch.log_softmax(logq_BV / tau, dim=-1))

    def _target(
        self, readings: Sequence[Reading | None], place: Place, block: slice, logq_BV: Tensor
    ) -> Tensor | None:
        """Return the fused teacher distribution ``[B, V]`` at tau; keep the statistics.

        None: no teacher is in it.
        """
        row_B, position_B = place[0][block], place[1][block]
        teachers = []
        for k, reading in enumerate(readings):
            if k in self.across:  # its statistics are known, or asked for without a distribution
                entropy_B, logp_B = self._statistics_across(k, reading, place, block)
                p_BV = logq_BV[:0]
            else:
                assert reading is not None, "not in the target"
                p_BV, entropy_B, logp_B = reading.distribution(
                    block, self.labels_RL[place], tau=self.config.temperature, logq_BV=logq_BV
                )
            teachers.append(p_BV)
            self.entropy_KRL[k, row_B, position_B] = entropy_B
            self.label_logp_KRL[k, row_B, position_B] = logp_B
        if self.weighs == "block":
            self._weigh((row_B[:, None], position_B[:, None]))
        weights_KB1 = self.weights_KRL[:, row_B, position_B, None]
        if self.across:
            weights_KB1 = weights_KB1[self.mixed]
            weights_KB1 = weights_KB1 / weights_KB1.sum(0).clamp(min=1e-30)
            teachers = [teachers[k] for k in self.mixed]
        if not teachers:
            return None
        if self.config.space == "arithmetic":
            target_BV = teachers[0].mul_(weights_KB1[0])
            for p_BV, weight_B1 in zip(teachers[1:], weights_KB1[1:], strict=True):
                target_BV.addcmul_(p_BV, weight_B1)
            return target_BV
        log_BV = safe_log(teachers[0]).mul_(weights_KB1[0])
        for p_BV, weight_B1 in zip(teachers[1:], weights_KB1[1:], strict=True):
            log_BV.addcmul_(safe_log(p_BV), weight_B1)
        return torch.softmax(log_BV, dim=-1)

    def _statistics_across(
        self, k: int, reading: Reading | None, place: Place, block: slice
    ) -> tuple[Tensor, Tensor]:
        """Entropy and evidence ``[B]`` of a teacher that is not in the fused target."""
        if self.weighs != "block":
            at = place[0][block], place[1][block]
            return self.entropy_KRL[k][at], self.label_logp_KRL[k][at]
        assert reading is not None, "blocks weigh no matched chunks"
        entropy_C, logp_C = statistics_of(reading, self.labels_RL[place], self.vocabulary)
        return entropy_C[block], logp_C[block]

    def _weigh(self, where: tuple[Any, ...], global_means_2K: Tensor | None = None) -> None:
        """Set the weights at ``where``, an index of ``[R, L]``, from the statistics there."""
        at = (slice(None), *where)
        self.weights_KRL[at] = weigh(
            self.config.weights,
            self.entropy_KRL[at],
            self.label_logp_KRL[at],
            self.labels_RL[where],
            names=self.names,
            progress=self.progress,
            global_means_2K=global_means_2K,
            prior_KR=None if self.prior_KR is None else self.prior_KR[:, where[0]],
            reach=self.reach.at(where) if self.reach is not None else None,
        )
