"""Which parameter a matrix is, what rounding it alone costs, and which get more bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export import export_student
from export.build.backend import build_graphs
from export.build.genai import build_genai
from export.graphs import Graphs
from export.heldout import heldout_nll, relative_rise
from export.round.blocks import Blockwise, pack_nibbles, quantize_blocks
from export.round.matrices import matrices_of
from export.round.origin import matrix_values, origins, rounding_of
from export.round.scheme import Scheme, scheme_for, stored_bytes
from export.round.sensitivity import Cost, measure_costs, rounded, within_bytes, within_loss
from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.heldout import HELDOUT, load_heldout
from limbeck.contract.errors import ModelError, RecipeError
from limbeck.contract.recipe import Int4WeightForm, Int8DynamicForm
from tests.architectures import SIZES
from tests.factory import Factory
from tests.pico import make_model, pico_recipe

FEW, MORE = Blockwise(4, 16, zero_points=True), Blockwise(8, 32)


def all_few(graphs: Graphs, width: int) -> Scheme:
    return Scheme(body=FEW, attention=FEW, narrow=FEW, head=Blockwise(8, width))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(
            {"tie_word_embeddings": True, "model_type": "qwen3"},
            id="qwen3, tied, q, k and v joined",
        ),
        pytest.param({"model_type": "gpt2", **SIZES["gpt2"]}, id="gpt2, stored turned"),
    ],
)
def test_every_matrix_is_traced_to_its_parameters(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = make_model(tmp_path / "model", **sizes)
    graphs = build_graphs(model, tmp_path, {}, backend="auto").graphs
    matrices = matrices_of(graphs, all_few(graphs, 32))
    parts, weights = origins(matrices, graphs, model), load_file(model / "model.safetensors")
    traced = {part.parameter for name in parts for part in parts[name]}
    assert traced == {name for name, values in weights.items() if values.ndim == 2}
    for name, matrix in matrices.items():
        joined = [weights[p.parameter].T if p.turned else weights[p.parameter] for p in parts[name]]
        np.testing.assert_array_equal(matrix_values(matrix, graphs), np.concatenate(joined))
    assert any(p.turned for ps in parts.values() for p in ps) == ("gpt2" in str(sizes))


def test_a_matrix_that_was_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    graphs, _ = build_genai(model, tmp_path, {})
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"row 0 of the graph's matrix .*up_proj.* is in no weight of the model"
    ):
        origins(matrices_of(graphs, all_few(graphs, 32)), graphs, model)


def test_costs_are_the_divergence_of_the_model_with_one_matrix_rounded(tmp_path: Path) -> None:
    """8 bits change little, so that little is left beyond the second order. Drawn tokens leave
    noise.
    """
    import torch
    from transformers import AutoModelForCausalLM

    small = Blockwise(8, 16)
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    graphs, _ = build_genai(model, tmp_path, {})
    scheme = Scheme(body=small, attention=small, narrow=small, head=Blockwise(8, 32))
    matrices = {n: m for n, m in matrices_of(graphs, scheme).items() if m.how == small}
    texts = [np.random.default_rng(n).integers(0, 256, 20) for n in range(2)]
    costs = measure_costs(
        model,
        graphs,
        matrices,
        origins(matrices, graphs, model),
        texts * 100,
        more=MORE,
        moments={},
    )
    assert len(costs) == 3 * 5
    assert [cost.worth for cost in costs] == sorted((cost.worth for cost in costs), reverse=True)
    ids, ratios = torch.from_numpy(np.stack(texts)), []
    for cost in costs:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        with torch.inference_mode():
            exact = loaded(ids).logits.log_softmax(-1)
            for name in cost.parameters:  # rows are rounded by themselves, also in a joined matrix
                weights = loaded.get_parameter(name)
                weights.copy_(torch.from_numpy(rounded(weights.float().numpy(), small)))
            changed = loaded(ids).logits.log_softmax(-1)
        kl = float((exact.exp() * (exact - changed)).sum(-1).mean())
        assert cost.kl == pytest.approx(kl, rel=0.4)
        ratios.append(cost.kl / kl)
        matrix = matrices[cost.matrix]
        sizes = [stored_bytes(matrix.channels, matrix.width, how) for how in (small, MORE)]
        assert [cost.bytes, cost.bytes + cost.extra_bytes] == sizes
    assert np.mean(ratios) == pytest.approx(1, rel=0.1)


def test_a_code_that_rounds_past_the_grid_is_its_last() -> None:
    """Weight and zero point both lie half-way: 8 + 8 is one more than four bits hold."""
    codes, scales, zeros = quantize_blocks(
        np.array([[-7.5, 7.5]], np.float32), Blockwise(4, 2, True)
    )
    assert (codes.tolist(), zeros.tolist()) == ([[[0, 15]]], [[8]])
    assert scales[0, 0] == 1


@pytest.mark.parametrize(
    "how", [Blockwise(4, 64, zero_points=True), Blockwise(4, 32), Blockwise(8, 16)]
)
def test_counted_bytes_are_those_of_the_arrays(how: Blockwise) -> None:
    weights = (
        np.random.default_rng(0).normal(size=(7, 576)).astype(np.float32)
    )  # nine blocks of 64: half a byte is left over
    codes, scales, zeros = quantize_blocks(weights, how)
    pack = pack_nibbles if how.bits == 4 else np.asarray
    arrays = [pack(codes), scales, *([pack(zeros)] if how.zero_points else [])]
    assert stored_bytes(7, 576, how) == sum(array.nbytes for array in arrays)


COSTS = [
    Cost(name, (name,), kl, 10, extra)
    for name, kl, extra in (("a", 8, 2), ("b", 9, 3), ("c", 4, 2), ("d", 1, 1))
]


def test_bytes_go_to_the_greatest_worth_first() -> None:
    assert within_bytes(COSTS, 4) == ["a", "c"]  # b no longer fits behind a
    assert within_bytes(COSTS, 5) == ["a", "b"]
    assert within_bytes(COSTS, 0) == within_bytes(COSTS, -5) == []
    assert within_bytes(COSTS, 100) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("bound", [22, 14, 13.9, 5, 4, 1.5, 0.5])
@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_shortest_head_within_the_loss_is_found_whatever_the_curve(
    bound: float, power: float
) -> None:
    asked: list[int] = []

    def loss(names: list[str]) -> float:
        asked.append(len(names))
        return float(22 * (sum(c.kl for c in COSTS if c.matrix not in names) / 22) ** power)

    chosen, reached = within_loss(COSTS, bound, loss)
    assert loss(chosen) == reached <= bound
    assert not chosen or loss(chosen[:-1]) > bound
    assert within_loss(COSTS, -1.0, loss) == (
        ["a", "b", "c", "d"],
        0.0,
    )  # nothing does: as good as it gets


@pytest.mark.parametrize("bound", [0.9, 0.5, 0.1, 0.001])
@pytest.mark.parametrize("power", [0.2, 1, 5])
def test_the_head_is_the_shortest_of_a_whole_models_matrices_too(
    bound: float, power: float
) -> None:
    costs = [Cost(str(at), (str(at),), 150 - at, 10, 1) for at in range(150)]
    whole = sum(cost.kl for cost in costs)
    asked: list[int] = []

    def loss(names: list[str]) -> float:
        asked.append(len(names))
        return float((sum(cost.kl for cost in costs[len(names) :]) / whole) ** power)

    chosen, reached = within_loss(costs, bound, loss)
    assert len(asked) <= 10
    assert loss(chosen) == reached <= bound < loss(chosen[:-1])


def test_a_size_and_a_loss_are_kept_to(tiny: Factory, tmp_path: Path) -> None:
    student = tiny.student(scale=0.05).path

    def export(name: str, mixed: Any, **gates: float) -> dict[str, Any]:
        forms = ["fp32", {"kind": "int4-weight", "block_size": 16}]
        recipe = pico_recipe(export={"forms": forms, "mixed": mixed}, gates=gates)
        return export_student(student=student, out=tmp_path / name, recipe=recipe).result["forms"][
            "int4-weight"
        ]

    rule, least = export("rule", "rule"), export("least", {"kind": "size", "mb": 0.001})
    assert rule["mixed"] is None
    assert {cost["bits"] for cost in least["mixed"]["sensitivity"]} == {4}
    # All of them may get 8 bits; that is what was asked for, and no form that stayed unrounded.
    every = export("every", {"kind": "size", "mb": 1000})
    assert {cost["bits"] for cost in every["mixed"]["sensitivity"]} == {8}
    # No size asked for: that of the rule, with the bits where they save more.
    equal = export("equal", "size")
    assert equal["bytes"] <= rule["bytes"] + 4000
    assert {cost["bits"] for cost in equal["mixed"]["sensitivity"]} == {4, 8}
    half = export("half", "size", max_size_mb=(least["bytes"] + 4000) / 1e6)
    assert least["bytes"] < half["bytes"] <= least["bytes"] + 4000
    assert {cost["bits"] for cost in half["mixed"]["sensitivity"]} == {4, 8}
    names = {cost["matrix"] for cost in half["mixed"]["sensitivity"] if cost["bits"] == 8}
    assert half["rounding"]["exceptions"].keys() == names
    assert half["census"]["operators"]["MatMulNBits 8-bit block 32"] == 1 + len(names)

    heldout = load_heldout(student / HELDOUT)

    def rise(name: str) -> float:
        forms = open_artifact(tmp_path / name).result["forms"]
        nll = [
            heldout_nll(tmp_path / name / forms[f]["all_logits_graph"], heldout)
            for f in ("int4-weight", "fp32")
        ]
        return relative_rise(*nll)

    worst = rise("least")
    bound = export("bound", "loss", max_quantization_loss=abs(worst) / 2)
    assert bound["mixed"]["rise"] == pytest.approx(rise("bound"), abs=1e-6)
    assert bound["mixed"]["rise"] <= abs(worst) / 2


def test_rounding_is_told_as_data(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    graphs, _ = build_genai(model, tmp_path, {})
    found = {}
    for form in (
        Int4WeightForm(kind="int4-weight", block_size=16),
        Int8DynamicForm(kind="int8-dynamic", reduce_range=False),
    ):
        scheme = scheme_for(form, 32)
        assert scheme is not None
        matrices = matrices_of(graphs, scheme)
        found[form.kind] = rounding_of(matrices, origins(matrices, graphs, model))
    up = "model.layers.0.mlp.up_proj.weight"
    assert found["int4-weight"][up] == {
        "turned": False,
        "bits": 4,
        "block": 16,
        "zero_points": True,
    }
    assert found["int8-dynamic"][up] == {"turned": False, "most": 127}
    assert found["int4-weight"].keys() == found["int8-dynamic"].keys() == {
        name for name, values in load_file(model / "model.safetensors").items() if values.ndim == 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"export": {"mixed": "size"}}, r"export.mixed: found 'size'.*add int4-weight"),
        (
            {"export": {"forms": ["fp32", "int4-weight"], "mixed": "loss"}},
            r"set `rise` there, or gates.max_quant",
        ),
        (
            {"export": {"recover": {"tokens": 64}}},
            r"export.recover: nothing says when .* gates.max_quantization_loss",
        ),
        (
            {
                "export": {
                    "forms": ["fp32", {"kind": "int8-weight", "smooth": 0.5}],
                    "recover": {"tokens": 64},
                },
                "gates": {"max_quantization_loss": 0.1},
            },
            r"export.recover: the training rounds unsmoothed weights; leave smooth out",
        ),
        (
            {
                "export": {
                    "forms": ["fp32", {"kind": "int8-dynamic", "smooth": 0.5}],
                    "adapters": "separate",
                }
            },
            r"export.adapters: smoothing fits the base to one student; leave smooth out",
        ),
        (
            {
                "export": {"forms": ["fp32"], "recover": {"tokens": 64}},
                "gates": {"max_quantization_loss": 0.1},
            },
            r"export.recover: found 'fp32' as the form to ship",
        ),
    ],
)
def test_choices_that_contradict_each_other_are_refused(over: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        pico_recipe(**over)
