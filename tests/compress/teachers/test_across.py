"""Teachers of other tokenizers in the loss: the formula, its chunks, and the identities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from compress.aligned import AlignedStates, Alignment, Pair, chunk_loss, ranked_loss
from compress.chunked import fused_loss
from compress.head import IGNORED, Head
from compress.loss import plain_loss
from compress.states import TeacherStates, teacher_statistics
from compress.tasks.own_terms import log_ratio_to_mixture
from compress.weights import Reach, weigh
from limbeck.contract.models.alignment import Aligner, projection
from limbeck.contract.recipe import (
    CaMkdWeights,
    Fusion,
    Jsd,
    LabelWeights,
    PosteriorWeights,
    ReverseKl,
)
from tests.compress.problems import WEIGHTS, gradients
from tests.tokenizers import byte_level, permute, piece_level, pieces

TEXTS = [
    "the cat sat on the mat, 1234 🙂 naïve café years",
    "and the dog sat on  the log; 語言模型 of 2024",
]
OWN = pieces(byte_level(), "student")
ACROSS = ("projected", "chunk", "uld")


def rows(texts: list[str] = TEXTS) -> tuple[Tensor, Tensor]:
    """Token ids and labels [R, L] of texts, with a hole in the labels and padding behind."""
    ids = [OWN.tokenizer.encode(text).ids for text in texts]
    width = max(map(len, ids)) + 2
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    labels = torch.full_like(padded, IGNORED)
    for r, row in enumerate(ids):
        labels[r, : len(row) - 1] = padded[r, 1 : len(row)]
    labels[0, 5] = IGNORED
    return padded, labels


def pair_of(tokenizer: Any) -> Pair:
    other = pieces(tokenizer)
    return Pair(Aligner(OWN, other), torch.from_numpy(projection(OWN, other)))


PAIRS = {
    "gemma": pair_of(piece_level(420)),
    "smaller": pair_of(byte_level(280)),
    "permuted": pair_of(permute(byte_level(), 5)),
}


def problem(*names: str, same: int = 1, seed: int = 0) -> dict[str, Any]:
    """Student and teachers with random states: ``same`` of its tokens, and of the pairs."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    ids, labels = rows()
    R, L = ids.shape
    V = len(OWN)
    teachers: list[Any] = [TeacherStates(draw(R, L, 6), Head(draw(V, 6)), 1.1) for _ in range(same)]
    for name in names:
        pair = PAIRS[name]
        a = pair.align(ids, labels)
        head = Head(draw(len(pair.aligner.other), 5), draw(len(pair.aligner.other)), 1.0, 4.0)
        states = 2 * draw(R, a.ids_RM.shape[1], 5)
        teachers.append(AlignedStates(states, head, a, pair.target_V, 0.9, pair.renames))
    return {
        "hidden_RLd": draw(R, L, 8).requires_grad_(),
        "head": Head(draw(V, 8).requires_grad_(), draw(V).requires_grad_(), 0.7, 6.0),
        "teachers": teachers,
        "labels_RL": labels,
        "denominator": int((labels != IGNORED).sum()),
        "names": ("a", "b", "c")[: len(teachers)],
    }


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{w.kind}-{getattr(w, 'control', '')}")
@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "row-by-row"])
def test_the_chunked_loss_is_the_plain_one(across: str, weights: Any, whole: bool) -> None:
    parts = problem("gemma", "smaller")
    fusion = Fusion(
        weights=weights, across=across, chunk=parts["labels_RL"].shape[1] if whole else 7
    )
    chunked = fused_loss(fusion, progress=0.4, **parts).loss
    plain = plain_loss(fusion, progress=0.4, **parts)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(chunked, parts), gradients(plain, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "chosen"), [("gemma", "chunk"), ("smaller", "chunk"), ("permuted", "projected")]
)
def test_auto_projects_only_teachers_that_have_the_students_tokens(name: str, chosen: str) -> None:
    parts = problem(name)
    found, by_name = (fused_loss(Fusion(across=a), **parts).loss for a in ("auto", chosen))
    assert torch.equal(found, by_name)
    both = problem(name, "permuted")  # beside a teacher that is projected
    chunked, plain = fused_loss(Fusion(chunk=7), **both).loss, plain_loss(Fusion(), **both)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("across", ACROSS)
def test_the_divergence_that_is_shown_is_that_of_all_chunks(across: str) -> None:
    """The loss is linear in `weight`, so the plain one gives the divergence by a difference."""
    parts = problem("gemma", "smaller")
    found = fused_loss(Fusion(across=across, chunk=7), **parts).divergence
    two, one = (plain_loss(Fusion(across=across, weight=w), **parts).item() for w in (2.0, 1.0))
    assert found == pytest.approx((two - one) * parts["denominator"], rel=1e-4)


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": ReverseKl(kind="reverse_kl")},
        {"divergence": Jsd(kind="jsd", beta=0.3), "space": "geometric"},
        {"temperature": 2.0, "chunk": 1000},
    ],
    ids=["reverse", "geometric", "tau"],
)
@pytest.mark.parametrize("same", [0, 1])
def test_divergences_spaces_and_temperatures(across: str, options: Any, same: int) -> None:
    parts = problem("gemma", same=same)
    fusion = Fusion(across=across, **options)
    chunked, plain = fused_loss(fusion, **parts).loss, plain_loss(fusion, **parts)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(chunked, parts), gradients(plain, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{w.kind}-{getattr(w, 'control', '')}")
def test_a_permuted_vocabulary_changes_nothing(weights: Any) -> None:
    """The same teacher under other ids: loss, gradient and statistics are those of the present."""
    parts = problem(same=2)
    teacher: TeacherStates = parts["teachers"][1]
    pair = PAIRS["permuted"]
    inverse = torch.argsort(pair.target_V)  # the other id of each of our tokens
    head = Head(teacher.head.weight_Vd[pair.target_V])
    ids, labels = rows()
    a = pair.align(ids, labels)
    content, width = labels != IGNORED, a.ids_RM.shape[1]
    shown = content[:, : width - 1]
    assert torch.equal(a.ids_RM[:, 1:][shown], inverse[labels[:, : width - 1][shown]])
    states = teacher.hidden_RLd[:, : a.ids_RM.shape[1]]
    permuted = AlignedStates(states, head, a, pair.target_V, teacher.temperature, pair.renames)
    fusion = Fusion(weights=weights.model_copy(update={"values": {"a": 1, "b": 2}})
                    if weights.kind == "static" else weights)  # fmt: skip
    given, moved = parts, {**parts, "teachers": [parts["teachers"][0], permuted]}
    expected, found = fused_loss(fusion, **given), fused_loss(fusion, **moved)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    ratio, count = log_ratio_to_mixture(found, content)
    assert (ratio, count) == (pytest.approx(log_ratio_to_mixture(expected, content)[0], rel=1e-5),
                              int(content.sum()))  # fmt: skip
    torch.testing.assert_close(found.weights_KRL[:, content], expected.weights_KRL[:, content])
    torch.testing.assert_close(found.entropy_KRL, expected.entropy_KRL, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.label_logp_KRL, expected.label_logp_KRL, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        gradients(found.loss, moved), gradients(expected.loss, given), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma", "smaller"])
def test_evidence_sums_to_the_teacher_s_own_likelihood(name: str) -> None:
    """Against torch's cross-entropy on the teacher's tokens: no position is read late or twice."""
    parts = problem(name, same=0)
    teacher: AlignedStates = parts["teachers"][0]
    ids, labels = rows()
    labels = torch.where((labels == IGNORED) & (ids != 0), ids.roll(-1, 1), labels)
    labels[:, -1] = IGNORED
    lengths = [len(OWN.tokenizer.encode(text).ids) for text in TEXTS]
    for r, length in enumerate(lengths):
        labels[r, length - 1 :] = IGNORED
    pair = PAIRS[name]
    a = pair.align(ids, labels)
    states = AlignedStates(teacher.hidden_RMd, teacher.head, a, pair.target_V, teacher.temperature)
    _, evidence = teacher_statistics([states], labels, vocabulary=len(OWN), chunk=5)
    z = teacher.head.logits(teacher.hidden_RMd) / teacher.temperature
    for r, text in enumerate(TEXTS):
        own = (
            pair.aligner.other.prefix
            + pair.aligner.other.tokenizer.encode(text, add_special_tokens=False).ids
        )
        first = int(a.first_RL[r][a.spans.ends_RL[r]].min())  # the student has no first label
        expected = -torch.nn.functional.cross_entropy(
            z[r, first : len(own) - 1], torch.tensor(own[first + 1 :]), reduction="sum"
        )
        torch.testing.assert_close(evidence[0, r].sum(), expected, rtol=1e-5, atol=1e-4)


def test_a_label_without_a_teacher_has_cross_entropy_alone() -> None:
    parts = problem("gemma", same=0)
    labels = parts["labels_RL"]
    nowhere = Alignment(
        torch.zeros(2, 1, dtype=torch.long), torch.ones(2),
        *(torch.full_like(labels, -1) for _ in range(2)),
        torch.zeros_like(labels), torch.zeros_like(labels), torch.ones(2),
    )  # fmt: skip
    teacher = parts["teachers"][0]
    absent = AlignedStates(teacher.hidden_RMd[:, :1], teacher.head, nowhere, teacher.target_V)
    loss = fused_loss(Fusion(), **{**parts, "teachers": [absent]}).loss
    alone = fused_loss(Fusion(), **{**parts, "teachers": []}).loss
    torch.testing.assert_close(loss, alone)


def test_mass_without_a_token_is_reported_and_not_scaled_up() -> None:
    parts = problem("smaller", same=0)
    teacher: AlignedStates = parts["teachers"][0]
    target = teacher.target_V.clone()
    target[::3] = -1
    cut = AlignedStates(teacher.hidden_RMd, teacher.head, teacher.alignment, target, 1.0)
    place = (torch.tensor([0, 0]), torch.tensor([2, 3]))
    reading = cut.read(place, len(OWN))
    own = teacher.alignment.at_RL[place]
    p = torch.softmax(teacher.head.logits(teacher.hidden_RMd[0, own]), -1)
    torch.testing.assert_close(reading.lost(), p[:, target < 0].sum(-1))
    whole, _, _ = reading.distribution(slice(None), parts["labels_RL"][place])
    torch.testing.assert_close(whole.sum(-1), p[:, target >= 0].sum(-1))
    q = torch.log_softmax(torch.randn(2, len(OWN)), -1)
    spread, _, _ = reading.distribution(slice(None), parts["labels_RL"][place], logq_BV=q)
    torch.testing.assert_close(spread.sum(-1), torch.ones(2))


def test_weights_are_shared_by_the_teachers_that_are_there() -> None:
    _, labels = rows()
    valid = labels != IGNORED
    spans = [None, PAIRS["gemma"].align(*rows()).spans, PAIRS["smaller"].align(*rows()).spans]
    reach = Reach.of(spans, labels)
    assert reach is not None
    g = torch.Generator().manual_seed(0)
    entropy = torch.rand(3, *labels.shape, generator=g) * reach.target_KRL
    logp = -60 * torch.rand(3, *labels.shape, generator=g) * reach.ends_KRL
    for config in WEIGHTS:
        w = weigh(config, entropy, logp, labels, names=("a", "b", "c"), progress=0.5, reach=reach)
        assert (w >= 0).all()
        assert (w[~reach.target_KRL] == 0).all()
        torch.testing.assert_close(w.sum(0)[valid], torch.ones(int(valid.sum())))


def test_the_posterior_compares_the_same_bytes() -> None:
    """A teacher that gives chunks the likelihood that another gives their tokens is its equal."""
    ids, labels = rows()
    a = PAIRS["gemma"].align(ids, labels)
    reach = Reach.of([None, a.spans], labels)
    g = torch.Generator().manual_seed(0)
    own = -torch.rand(labels.shape, generator=g) * (labels != IGNORED)
    chunks = torch.zeros_like(own)
    for r, end in a.spans.ends_RL.nonzero().tolist():
        chunks[r, end] = own[r, int(a.spans.start_RL[r, end]) : end + 1].sum()
    zero = torch.zeros(2, *labels.shape)
    configs = [
        PosteriorWeights(kind="posterior"),
        LabelWeights(kind="label"),
        LabelWeights(kind="label", granularity="token"),
        CaMkdWeights(kind="ca_mkd"),
    ]
    for config in configs:
        w = weigh(config, zero, torch.stack([own, chunks]), labels, reach=reach)
        both = reach.target_KRL.all(0) & (labels != IGNORED)  # type: ignore[union-attr]
        torch.testing.assert_close(w[0][both], w[1][both])


# The other losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_alm_is_binary_cross_entropy_and_least_at_equality(tau: float) -> None:
    teacher = torch.tensor([-0.3, -2.0, -7.0], dtype=torch.float64)
    student = torch.tensor([-0.9, -1.0, -9.0], dtype=torch.float64, requires_grad=True)
    value, slope = chunk_loss(teacher, student.detach(), tau)
    expected = torch.nn.functional.binary_cross_entropy(
        (student / tau).exp(), (teacher / tau).exp(), reduction="none"
    )
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), student)[0])
    for target in teacher.tolist():
        found = scipy.optimize.minimize_scalar(
            lambda x, t=target: float(
                chunk_loss(torch.tensor([t]).double(), torch.tensor([x]).double(), tau)[0]
            ),
            bounds=(-20, -1e-3),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert found.x == pytest.approx(target, abs=1e-4)
    assert chunk_loss(teacher, teacher, tau)[1].tolist() == [0, 0, 0]


def test_uld_is_the_distance_of_sorted_probabilities() -> None:
    z = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = torch.softmax(torch.randn(3, 12, generator=torch.Generator().manual_seed(1)), -1)
    ranked = p.sort(-1, descending=True).values
    value, slope = ranked_loss(ranked, torch.softmax(z, -1).detach())
    q = np.zeros((3, 12))
    q[:, :9] = torch.softmax(z, -1).detach().numpy()
    np.testing.assert_allclose(
        value, np.abs(-np.sort(-q, 1) - -np.sort(-p.numpy(), 1)).sum(1), rtol=1e-5
    )
    mine = torch.nn.functional.pad(torch.softmax(z, -1).sort(-1, descending=True).values, (0, 3))
    expected = torch.autograd.grad((ranked - mine).abs().sum(), z)[0]
    torch.testing.assert_close(slope, expected)


def test_entropy_counts_by_bytes() -> None:
    """Twice as many tokens for the same text, each with half the surprise, are the same teacher."""
    parts = problem("smaller", same=0)
    teacher: AlignedStates = parts["teachers"][0]
    entropy, _ = teacher_statistics([teacher], parts["labels_RL"], vocabulary=len(OWN))
    a = teacher.alignment
    z = teacher.head.logits(teacher.hidden_RMd) / teacher.temperature
    own = torch.distributions.Categorical(logits=z).entropy()
    for r, i in (parts["labels_RL"] != IGNORED).nonzero().tolist():
        m = int(a.at_RL[r, i])
        expected = own[r, m] * a.rate_R[r] if m >= 0 else torch.tensor(0.0)
        torch.testing.assert_close(entropy[0, r, i], expected)
    theirs, ours = (len(side) for side in (PAIRS["smaller"].aligner.row(
        OWN.tokenizer.encode(TEXTS[0]).ids).ids, OWN.tokenizer.encode(TEXTS[0]).ids))  # fmt: skip
    assert float(a.rate_R[0]) == pytest.approx(theirs / ours, rel=0.05)


@pytest.mark.parametrize("names", [["gemma"], ["gemma", "smaller"]], ids=str)
def test_the_reverse_kl_of_a_sample_is_that_of_the_text(names: list[str]) -> None:
    """Chunk by chunk, with the likelihoods of whole chunks and the weights where they begin."""
    parts = problem(*names, same=1)
    labels = parts["labels_RL"]
    valid = labels != IGNORED
    valid[:, :4] = False  # a prompt
    terms = fused_loss(Fusion(), **parts)
    logits_RLV = parts["head"].logits(parts["hidden_RLd"]).detach()
    logq_RL = torch.log_softmax(logits_RLV, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    spans = [teacher.spans for teacher in parts["teachers"][1:]]
    total = count = 0.0
    for r, row in enumerate(valid):
        first = 0
        for t in range(len(row)):
            if not all(s.ends_RL[r, t] or s.start_RL[r, t] < 0 for s in spans):
                continue
            chunk = slice(first, t + 1)
            if row[first]:
                logp_K = terms.label_logp_KRL[:, r, chunk].sum(-1)
                mixture = torch.logsumexp(terms.weights_KRL[:, r, first].log() + logp_K, 0)
                total += float(logq_RL[r, chunk].sum() - mixture)
                count += t + 1 - first
            first = t + 1
    found = log_ratio_to_mixture(terms, valid)
    assert found == (pytest.approx(total, rel=1e-4), count)
    assert 0 < count < int((labels != IGNORED).sum())


@pytest.mark.parametrize("rises", [-1.0, 0.0, 1.0])
def test_own_text_that_is_no_utf_8_is_left_out_of_the_reverse_kl(rises: float) -> None:
    """Every next token of a student of bytes, weighed by its probability, with a teacher of the
    same bytes under other ids: KL given that the text is UTF-8, plus log Q / P."""
    own, other = pieces(byte_level(257), "student"), pieces(permute(byte_level(257), 9))
    pair = Pair(Aligner(own, other), torch.from_numpy(projection(own, other)))
    prompt, V, g = own.tokenizer.encode("the cat").ids, len(own), torch.Generator().manual_seed(0)
    ids = torch.tensor([[*prompt, token] for token in range(V)])
    labels = torch.full_like(ids, IGNORED)
    at = len(prompt) - 1
    labels[:, at] = ids[:, -1]
    a = pair.align(ids)
    states = torch.randn(1, a.ids_RM.shape[1], 8, generator=g)
    text = torch.tensor([not (len(piece) == 1 and piece[0] > 127) for piece in own.of])
    head = Head(torch.randn(V, 8, generator=g), rises * ~text)
    theirs = AlignedStates(
        states.expand(V, -1, -1), Head(torch.randn(V, 8, generator=g)), a, pair.target_V
    )
    hidden = torch.randn(1, ids.shape[1], 8, generator=g)
    terms = fused_loss(
        Fusion(), hidden_RLd=hidden.expand(V, -1, -1), head=head, teachers=[theirs],
        labels_RL=labels, denominator=1,
    )  # fmt: skip
    logq_V, logp_V = (
        torch.log_softmax(head.logits(h[0, at]).double(), -1)
        for head, h in ((head, hidden), (theirs.head, states))
    )
    logp_V = logp_V[torch.argsort(pair.target_V)]
    rows = torch.eye(V, dtype=torch.bool)[..., None] & (labels != IGNORED)
    found = [log_ratio_to_mixture(terms, valid) for valid in rows]
    value, judged = (torch.tensor(part, dtype=torch.float64) for part in zip(*found, strict=True))
    assert torch.equal(judged > 0, text)
    estimate = float((logq_V.exp() * value).sum() / (logq_V.exp() * judged).sum())
    q, p = (torch.distributions.Categorical(logits=x[text]) for x in (logq_V, logp_V))
    ratio = torch.logsumexp(logq_V[text], 0) - torch.logsumexp(logp_V[text], 0)
    expected = torch.distributions.kl_divergence(q, p) + ratio
    assert estimate == pytest.approx(float(expected), rel=1e-4)
