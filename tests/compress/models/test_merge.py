"""Merging without training: peft's values for adapters, `ties` by hand, and the choice on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from compress.models.language import load_model
from compress.models.merge import (
    BASE,
    Merge,
    best_merge,
    can_be_merged,
    candidates,
    load_merged,
    merged,
    parameters_of,
)
from limbeck.contract.errors import ModelError
from tests.pico import make_model


def make_adapter(base: Path, out: Path, *, seed: int, rank: int) -> Path:
    """A LoRA adapter with weights that change the model."""
    torch.manual_seed(seed)
    options = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(base), options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("adapters")
    base = make_model(root / "base")
    return base, {
        "one": make_adapter(base, root / "one", seed=1, rank=2),
        "two": make_adapter(base, root / "two", seed=2, rank=4),
    }


def whole(base: Path, adapter: Path) -> dict[str, Tensor]:
    return parameters_of(
        PeftModel.from_pretrained(load_model(base), str(adapter)).merge_and_unload()
    )


def by_peft(
    base: Path, adapters: dict[str, Path], weights: list[float], kind: str
) -> dict[str, Tensor]:
    """peft's own merge of this kind, put into the base."""
    model = PeftModel.from_pretrained(load_model(base), str(adapters["one"]), adapter_name="one")
    model.load_adapter(str(adapters["two"]), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type=kind)
    model.set_adapter("both")
    return parameters_of(model.merge_and_unload(adapter_names=["both"]))


@pytest.mark.parametrize(("method", "kind"), [("average", "cat"), ("svd", "svd")])
def test_a_merge_of_adapters_is_pefts(
    adapters: tuple[Path, dict[str, Path]], method: Any, kind: str
) -> None:
    base, paths = adapters
    model = load_model(base)
    teachers = {name: whole(base, path) for name, path in paths.items()}
    # The adapters have rank 2 and 4; peft's svd keeps the larger one.
    merge = Merge(method, {"one": 0.5, "two": 0.75}, rank=4)
    load_merged(model, merged(merge, parameters_of(load_model(base)), teachers))
    expected = by_peft(base, paths, [0.5, 0.75], kind)
    found = parameters_of(model)
    assert found.keys() == expected.keys()
    changed = [
        n for n, t in parameters_of(load_model(base)).items() if not torch.equal(t, found[n])
    ]
    assert len(changed) == 14  # seven matrices in each of two layers
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_ties_by_hand() -> None:
    base = {"w": torch.zeros(4)}
    teachers = {
        "a": {"w": torch.tensor([4.0, -3.0, 0.1, 0.2])},
        "b": {"w": torch.tensor([2.0, 5.0, 0.3, 0.1])},
    }
    # The larger half of each difference is kept: the first two values.
    # Signs: + (4 + 2), + (-3 + 5). Values that agree with the sign are averaged.
    found = dict(merged(Merge("ties", {"a": 1.0, "b": 1.0}, density=0.5), base, teachers))
    assert found["w"].tolist() == [3.0, 5.0, 0.0, 0.0]


def test_dare_ties_repeats_with_its_seed_and_keeps_the_mean() -> None:
    base, merge = {"w": torch.zeros(20_000)}, Merge("dare_ties", {"a": 1.0}, density=0.25)
    teachers = {"a": {"w": torch.ones(20_000)}}
    found, again, other = (dict(merged(merge, base, teachers, seed=s))["w"] for s in (1, 1, 2))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    assert set(found.tolist()) == {0.0, 4.0}


def test_models_of_other_shapes_cannot_be_merged(tmp_path: Path) -> None:
    one = parameters_of(load_model(make_model(tmp_path / "one")))
    deep = parameters_of(load_model(make_model(tmp_path / "deep", num_hidden_layers=3)))
    wide = parameters_of(load_model(make_model(tmp_path / "wide", intermediate_size=64)))
    assert can_be_merged(one, one)
    assert not can_be_merged(one, deep)
    assert not can_be_merged(one, wide)


def test_candidates_leave_out_each_teacher_once_and_hold_the_base() -> None:
    found = candidates(["a", "b", "c"])
    for method in ("average", "ties"):
        sets = [set(merge.weights) for merge in found if merge.method == method]
        assert all({"a", "b", "c"} - {left} in sets for left in "abc")
    assert BASE in found
    assert candidates(["a"]) == [Merge("average", {"a": 1.0}), BASE]


def test_the_merge_that_reads_the_text_best_is_taken_and_a_bad_teacher_left_out() -> None:
    """Two good teachers lie on either side of the best weights, the third far away."""
    best = torch.tensor([1.0, 2.0])
    base = {"w": torch.zeros(2)}
    teachers = {
        "left": {"w": best + torch.tensor([0.3, -0.3])},
        "right": {"w": best - torch.tensor([0.3, -0.3])},
        "bad": {"w": torch.tensor([-50.0, 40.0])},
    }

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

    def score(model: Any) -> float:
        return float((model.w.detach() - best).square().sum())

    model = Model()
    choice = best_merge(model, base, teachers, score)
    assert choice.merge == Merge("average", {"left": 0.5, "right": 0.5})
    assert torch.allclose(model.w.detach(), best)
    assert min(choice.scores.values()) == choice.scores[str(choice.merge)]
    assert choice.scores["the base"] == pytest.approx(5.0)


def test_merged_weights_go_to_the_device_of_the_model(
    adapters: tuple[Path, dict[str, Path]],
) -> None:
    """A student on a GPU stays there, although teachers are merged on the CPU."""
    base, _ = adapters
    model = load_model(base).to("meta")
    load_merged(model, merged(BASE, parameters_of(load_model(base)), {}))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_scores_that_are_no_number_choose_nothing() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    states = {"a": {"weight": torch.ones(1, 1)}}
    with pytest.raises(ModelError, match="none of 2 merges of a has a finite loss"):
        best_merge(model, {"weight": torch.zeros(1, 1)}, states, lambda _: float("nan"))
