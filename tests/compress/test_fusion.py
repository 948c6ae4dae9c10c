"""The tests of the maths: each divergence, weight and fusion against an independent reference, and
the identities.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import head
from compress.aligned import ANY_ROWS, Spans
from compress.chunked import fused_loss
from compress.divergence import divergence
from compress.head import IGNORED, Head
from compress.loss import plain_loss
from compress.states import SparseStates, TeacherStates, teacher_statistics
from limbeck.contract.recipe import (
    EntropySwitch,
    ForwardKl,
    Fusion,
    Jsd,
    ReverseKl,
    SkewKl,
    StaticWeights,
    UniformWeights,
)
from tests.compress.problems import DIVERGENCES, NAMES, WEIGHTS, gradients, problem

# 1. Each divergence against references -----------------------------------------------------------


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = {
        ForwardKl(kind="forward_kl"): 0.5 * math.log(2) + 0.5 * math.log(2 / 3),  # 0.143841
        ReverseKl(kind="reverse_kl"): 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),  # 0.130812
        Jsd(kind="jsd", beta=0.5): 0.03382264,  # m = (0.375, 0.625)
        SkewKl(kind="skew_kl", skew=0.5): 0.5 * math.log(0.5 / 0.375)
        + 0.5 * math.log(0.5 / 0.625),  # 0.032269
    }
    for config, value in expected.items():
        assert float(divergence(config, p, q.log())[0]) == pytest.approx(value, abs=1e-6)
    assert float(divergence(ForwardKl(kind="forward_kl"), p, q.log())[0]) == pytest.approx(
        0.1438410, abs=1e-6
    )


def test_divergences_against_scipy() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(11), size=2)
    tp, tq = (torch.tensor(x, dtype=torch.float32)[None] for x in (p, q))
    assert float(divergence(ForwardKl(kind="forward_kl"), tp, tq.log())[0]) == pytest.approx(
        scipy.special.rel_entr(p, q).sum(), rel=1e-5
    )
    assert float(divergence(ReverseKl(kind="reverse_kl"), tp, tq.log())[0]) == pytest.approx(
        scipy.special.rel_entr(q, p).sum(), rel=1e-5
    )
    distance = scipy.spatial.distance.jensenshannon(p, q)
    assert float(divergence(Jsd(kind="jsd", beta=0.5), tp, tq.log())[0]) == pytest.approx(
        distance**2, rel=1e-5
    )


def test_the_switch_takes_forward_kl_where_the_target_is_uncertain() -> None:
    """Entropies by scipy: 0.69, 0.38 and 1.09 nats, with a threshold between them."""
    rng = np.random.default_rng(3)
    p = np.array([[0.5, 0.5, 0.0], [0.9, 0.08, 0.02], [0.4, 0.3, 0.3]])
    q = rng.dirichlet(np.ones(3), size=3)
    assert [scipy.stats.entropy(row) >= 0.6 for row in p] == [True, False, True]
    tp, tz = (torch.tensor(x, dtype=torch.float32) for x in (p, np.log(q)))
    tz.requires_grad_()
    logq = torch.log_softmax(tz, -1)
    value, slope = divergence(EntropySwitch(kind="entropy_switch", threshold=0.6), tp, logq)
    expected = [scipy.special.rel_entr(p[i], q[i]).sum() for i in (0, 2)]
    assert value[[0, 2]].tolist() == pytest.approx(expected, rel=1e-5)
    forward = torch.nn.functional.kl_div(logq[[0, 2]], tp[[0, 2]], reduction="sum")
    (gradient,) = torch.autograd.grad(forward, tz, retain_graph=True)
    torch.testing.assert_close(slope[[0, 2]].detach(), gradient[[0, 2]], rtol=1e-4, atol=1e-6)
    reverse = (logq[1].exp() * (logq[1] - tp[1].log())).sum()
    (gradient,) = torch.autograd.grad(reverse, tz)
    assert float(value[1].detach()) == pytest.approx(float(reverse.detach()), rel=1e-4)
    torch.testing.assert_close(slope[1].detach(), gradient[1], rtol=1e-3, atol=1e-4)


# 2. Identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", DIVERGENCES, ids=lambda c: c.kind)
def test_divergence_from_itself_is_zero(config: Any) -> None:
    p = torch.softmax(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), dim=-1)
    value, slope = divergence(config, p, p.log())
    torch.testing.assert_close(value, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(slope, torch.zeros(5, 9), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", DIVERGENCES, ids=lambda c: c.kind)
def test_divergence_of_disjoint_certainties_is_finite(config: Any) -> None:
    p = torch.tensor([[1.0, 0.0]])
    value, slope = divergence(config, p, torch.log_softmax(torch.tensor([[-200.0, 200.0]]), -1))
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_all_masked_is_zero_without_nan(weights: Any) -> None:
    parts = problem()
    parts["labels_RL"] = torch.full_like(parts["labels_RL"], IGNORED)
    terms = fused_loss(Fusion(weights=weights), **parts)
    assert float(terms.loss.detach()) == 0
    for gradient in gradients(terms.loss, parts):
        assert gradient.abs().sum() == 0


# 3. Chunked equals plain -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "space"), list(itertools.product(WEIGHTS, ("arithmetic", "geometric"))), ids=repr
)
@pytest.mark.parametrize("config", DIVERGENCES, ids=lambda c: c.kind)
def test_chunked_equals_plain(config: Any, weights: Any, space: Any) -> None:
    parts = problem(softcap=4.0, scale=0.7)
    fusion = Fusion(weights=weights, divergence=config, space=space, temperature=1.7, chunk=5)
    chunked, plain = (
        fused_loss(fusion, progress=0.4, **parts).loss,
        plain_loss(fusion, progress=0.4, **parts),
    )
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    for mine, reference in zip(gradients(chunked, parts), gradients(plain, parts), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    K=st.integers(1, 3),
    R=st.integers(1, 5),
    L=st.integers(1, 9),
    V=st.integers(2, 40),
    masked=st.floats(0, 1),
    chunk=st.integers(1, 50),
    cached=st.sampled_from((1, 60, head.CACHED)),  # a chunk is many blocks, some, or one
    weights=st.sampled_from(WEIGHTS),
    config=st.sampled_from(DIVERGENCES),
)
def test_chunked_equals_plain_on_any_shape(
    seed: int,
    K: int,
    R: int,
    L: int,
    V: int,
    masked: float,
    chunk: int,
    cached: int,
    weights: Any,
    config: Any,
) -> None:
    if isinstance(weights, StaticWeights):
        weights = StaticWeights(kind="static", values=dict.fromkeys(NAMES[:K], 1.0))
    parts = problem(seed=seed, K=K, R=R, L=L, V=V, masked=masked)
    fusion = Fusion(weights=weights, divergence=config, chunk=chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CACHED", cached)
        chunked, plain = fused_loss(fusion, **parts).loss, plain_loss(fusion, **parts)
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)
    for mine, reference in zip(gradients(chunked, parts), gradients(plain, parts), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)


def test_without_teachers_it_is_cross_entropy() -> None:
    parts = problem(K=0)
    terms = fused_loss(Fusion(), **parts)
    torch.testing.assert_close(terms.loss, plain_loss(Fusion(), **parts))
    assert terms.divergence == 0


def test_frozen_head_gets_no_gradient() -> None:
    parts = problem()
    parts["head"] = Head(parts["head"].weight_Vd.detach())
    fused_loss(Fusion(), **parts).loss.backward()
    assert parts["hidden_RLd"].grad is not None
    assert parts["head"].weight_Vd.grad is None


def test_tied_head_gets_the_gradient_of_both_uses() -> None:
    parts = problem()
    embedding = parts["head"].weight_Vd.detach().clone().requires_grad_()
    ids = torch.randint(0, 23, (4, 7), generator=torch.Generator().manual_seed(3))
    both = []
    for loss in (lambda **p: fused_loss(Fusion(), **p).loss, lambda **p: plain_loss(Fusion(), **p)):
        tied = {**parts, "hidden_RLd": embedding[ids], "head": Head(embedding)}
        both.append(torch.autograd.grad(loss(**tied), embedding)[0])
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)


def padded(teacher: TeacherStates, value: float = 9.0) -> TeacherStates:
    """The same teacher with four tokens that the student does not have."""
    head = Head(
        torch.cat([teacher.head.weight_Vd, torch.full((4, 8), value)]),
        torch.cat([teacher.head.bias_V, torch.full((4,), value)]),
    )
    return TeacherStates(teacher.hidden_RLd, head, teacher.temperature)


def test_padded_vocabulary_rows_are_left_out() -> None:
    parts = problem(K=2)
    reference = fused_loss(Fusion(), **parts).loss
    parts["teachers"] = [padded(parts["teachers"][0]), parts["teachers"][1]]
    torch.testing.assert_close(fused_loss(Fusion(), **parts).loss, reference)


def sparse(
    teacher: TeacherStates, labels: Tensor, k: int, generator: torch.Generator | None = None
) -> SparseStates:
    """What a top-k (or, with a generator, a sampled) cache keeps of a teacher."""
    R, L = labels.shape
    ids, share = torch.zeros(R, L, k, dtype=torch.long), torch.zeros(R, L, k)
    entropy, logp = teacher_statistics([teacher], labels)
    row, position = (labels != IGNORED).nonzero(as_tuple=True)
    p, _, _ = teacher.read((row, position), teacher.vocabulary).distribution(
        slice(None), labels[row, position]
    )
    if generator is None:
        share[row, position], ids[row, position] = p.topk(k)
    else:
        ids[row, position] = torch.multinomial(p, k, replacement=True, generator=generator)
        share[row, position] = 1 / k
    return SparseStates(ids, share, entropy[0], logp[0], teacher.vocabulary)


def test_the_tail_is_one_bucket() -> None:
    """KL over the k kept tokens and the rest as one outcome, in value and gradient, from an
    independent formula.
    """
    parts = problem(K=1, masked=0)
    config = Fusion(weights=UniformWeights(kind="uniform"), weight=1, cross_entropy=0)
    kept = sparse(parts["teachers"][0], parts["labels_RL"], 4)
    loss = fused_loss(config, **{**parts, "teachers": [kept]}).loss
    q = torch.softmax(parts["head"].logits(parts["hidden_RLd"]), -1).gather(2, kept.ids_RLk)
    p, tail_p, tail_q = kept.share_RLk, 1 - kept.share_RLk.sum(-1), 1 - q.sum(-1)
    expected = ((p * (p / q).log()).sum(-1) + tail_p * (tail_p / tail_q).log()).sum() / parts[
        "denominator"
    ]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for mine, reference in zip(gradients(loss, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{w.kind}-{getattr(w, 'control', '')}")
def test_kept_tokens_that_the_student_lacks_are_left_out(weights: Any) -> None:
    """With every token kept, loss and gradient are those of the teacher without those tokens."""
    parts, few = problem(K=2), problem(K=2)
    wide = padded(few["teachers"][0], 0.2)
    few["teachers"][0] = sparse(wide, few["labels_RL"], wide.vocabulary)
    config = Fusion(weights=weights)
    found, expected = fused_loss(config, **few), fused_loss(config, **parts)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.entropy_KRL, expected.entropy_KRL, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.label_logp_KRL, expected.label_logp_KRL, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(
        gradients(found.loss, few), gradients(expected.loss, parts), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_projected_tokens_beyond_the_shared_ones_are_lost_mass() -> None:
    """As if the projection had found no token for them: the student's own distribution."""
    parts = problem(K=1, masked=0)
    whole = sparse(parts["teachers"][0], parts["labels_RL"], 5)
    V, none = whole.vocabulary, torch.zeros_like(whole.entropy_RL)
    spans = Spans(none == 0, torch.arange(none.shape[1]).expand_as(none), none == 0)
    kept = replace(whole, vocabulary=ANY_ROWS, spans=spans, lost_RL=none)
    beyond = replace(kept, ids_RLk=whole.ids_RLk.clone())
    beyond.ids_RLk[..., 1] = V + 2
    lost = replace(kept, share_RLk=whole.share_RLk.clone(), lost_RL=whole.share_RLk[..., 1])
    lost.share_RLk[..., 1] = 0.0
    lost.ids_RLk[..., 1] = lost.ids_RLk[..., 0]
    config = Fusion(weights=UniformWeights(kind="uniform"), across="projected")
    one, other = (fused_loss(config, **{**parts, "teachers": [t]}).loss for t in (beyond, lost))
    torch.testing.assert_close(one, other)


def test_sampling_is_unbiased_where_topk_is_not() -> None:
    """The mean gradient over many draws is the exact one (arXiv 2503.16870)."""
    parts = problem(K=1, R=1, L=3, masked=0)
    config = Fusion(weights=UniformWeights(kind="uniform"), weight=1, cross_entropy=0)

    def gradient(teacher: Any) -> Tensor:
        return gradients(fused_loss(config, **{**parts, "teachers": [teacher]}).loss, parts)[0]

    exact, generator = gradient(parts["teachers"][0]), torch.Generator().manual_seed(0)
    drawn = [
        gradient(sparse(parts["teachers"][0], parts["labels_RL"], 4, generator)) for _ in range(600)
    ]
    spread = torch.stack(drawn).std(0) / math.sqrt(len(drawn))
    assert ((torch.stack(drawn).mean(0) - exact).abs() < 4.5 * spread + 1e-6).all()
    assert (
        gradient(sparse(parts["teachers"][0], parts["labels_RL"], 1)) - exact
    ).abs().max() > 10 * spread.max()


# 4. K copies of one teacher ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [w for w in WEIGHTS if not isinstance(w, StaticWeights)], ids=repr
)
@pytest.mark.parametrize("space", ["arithmetic", "geometric"])
def test_copies_of_one_teacher_are_that_teacher(weights: Any, space: Any) -> None:
    parts = problem(K=1)
    alone = fused_loss(Fusion(weights=weights, space=space), **parts).loss
    parts["teachers"], parts["names"] = parts["teachers"] * 3, NAMES
    torch.testing.assert_close(
        fused_loss(Fusion(weights=weights, space=space), **parts).loss, alone, rtol=1e-5, atol=1e-6
    )


def test_one_weight_of_one_is_plain_distillation() -> None:
    parts = problem()
    config = Fusion(
        weights=StaticWeights(kind="static", values={"a": 0, "b": 1, "c": 0}),
        weight=1,
        cross_entropy=0,
    )
    teacher = parts["teachers"][1]
    valid = parts["labels_RL"] != IGNORED
    logp = torch.log_softmax(
        teacher.head.logits(teacher.hidden_RLd[valid]) / teacher.temperature, -1
    )
    logq = torch.log_softmax(parts["head"].logits(parts["hidden_RLd"][valid]), -1)
    expected = (
        torch.nn.functional.kl_div(logq, logp, reduction="sum", log_target=True)
        / parts["denominator"]
    )
    torch.testing.assert_close(fused_loss(config, **parts).loss, expected)


# 5. Sum of divergences and divergence from the mixture -------------------------------------------


@pytest.mark.parametrize(
    ("config", "space"),
    [(DIVERGENCES[0], "arithmetic"), (DIVERGENCES[1], "geometric")],
    ids=["forward", "reverse"],
)
def test_weighted_sum_has_the_gradient_of_the_mixture(config: Any, space: Any) -> None:
    parts = problem()
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    options = {"divergence": config, "weight": 1, "cross_entropy": 0}
    whole = Fusion(weights=StaticWeights(kind="static", values=weights), space=space, **options)
    mixture = gradients(fused_loss(whole, **parts).loss, parts)
    single = Fusion(weights=UniformWeights(kind="uniform"), **options)
    each = [
        gradients(fused_loss(single, **{**parts, "teachers": [t], "names": [n]}).loss, parts)
        for n, t in zip(NAMES, parts["teachers"], strict=True)
    ]
    for index, gradient in enumerate(mixture):
        summed = sum(weights[n] * g[index] for n, g in zip(NAMES, each, strict=True))
        torch.testing.assert_close(gradient, summed, rtol=1e-4, atol=1e-6)


# 6. Splits and order -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_any_split_gives_the_same_loss_and_gradient(weights: Any) -> None:
    parts = problem(R=6)
    fusion = Fusion(weights=weights)
    statistics = teacher_statistics(parts["teachers"], parts["labels_RL"])
    means = torch.stack([s.sum((1, 2)) / parts["denominator"] for s in statistics])
    whole = fused_loss(fusion, **parts, global_means_2K=means).loss
    expected = gradients(whole, parts)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    total, summed = torch.zeros(()), [torch.zeros_like(g) for g in expected]
    for rows in (order[:1], order[1:4], order[4:]):
        part = {
            **parts,
            "labels_RL": parts["labels_RL"][rows],
            "teachers": [
                TeacherStates(t.hidden_RLd[rows], t.head, t.temperature) for t in parts["teachers"]
            ],
        }
        loss = fused_loss(
            fusion, **{**part, "hidden_RLd": parts["hidden_RLd"][rows]}, global_means_2K=means
        ).loss
        total = total + loss.detach()
        summed = [a + b for a, b in zip(summed, gradients(loss, parts), strict=True)]
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=1e-6)
    for mine, reference in zip(summed, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


# 7. Permutations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_permuting_teachers_or_vocabulary_changes_nothing(weights: Any) -> None:
    parts, fusion = problem(), Fusion(weights=weights)
    expected = fused_loss(fusion, **parts).loss
    turned = {**parts, "teachers": parts["teachers"][::-1], "names": parts["names"][::-1]}
    torch.testing.assert_close(fused_loss(fusion, **turned).loss, expected, rtol=1e-5, atol=1e-6)
    if getattr(weights, "control", "") == "shuffled":
        return  # its random order is seeded by the label ids
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    where = torch.argsort(order)
    labels = torch.where(
        parts["labels_RL"] == IGNORED, IGNORED, where[parts["labels_RL"].clamp(min=0)]
    )

    def permuted(head: Head) -> Head:
        return Head(
            head.weight_Vd[order],
            head.bias_V[order] if head.bias_V is not None else None,
            head.scale,
            head.softcap,
        )

    teachers = [
        TeacherStates(t.hidden_RLd, permuted(t.head), t.temperature) for t in parts["teachers"]
    ]
    moved = {**parts, "labels_RL": labels, "head": permuted(parts["head"]), "teachers": teachers}
    torch.testing.assert_close(fused_loss(fusion, **moved).loss, expected, rtol=1e-5, atol=1e-6)
