"""In training and in the bench, adapters compute what peft computes, or are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from compress.models.students import with_lora
from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.models.adapters import attach, merged
from limbeck.contract.models.loading import require_finite
from limbeck.contract.recipe import LoraStudent, RandomModel
from serve_bench.worker.runtimes import TorchEager
from tests.pico import make_model, make_tokenizer
from tests.wild.cases.adapters import (
    IDS,
    LAYERS,
    LORA,
    OTHERS,
    Q,
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    peft_model,
    teacher,
)

pytestmark = [
    # Of peft 0.21.2 with transformers 5.23, and of torch for SHiRA.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """One base whose head is its embedding, and one whose is not."""
    root = tmp_path_factory.mktemp("bases")
    return {tied: make_base(root / f"tied-{tied}", tied=tied) for tied in (True, False)}


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [*LORA, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
)
def test_training_and_bench_compute_what_peft_computes(
    bases: dict[bool, Path], tmp_path: Path, kind: str, tied: bool
) -> None:
    base = bases[tied]
    adapter = make_adapter(base, tmp_path / "adapter", (LORA | OTHERS)[kind])
    right = peft_logits(base, adapter)
    assert not torch.allclose(right, load(base)(input_ids=IDS).logits, rtol=0.01, atol=0.01)
    torch.testing.assert_close(our_logits([teacher("one", base, adapter)])[0], right, **CLOSE)
    arm = TorchEager(model=str(base), adapter=str(adapter), threads=1)
    torch.testing.assert_close(torch.from_numpy(arm.score(IDS[0].numpy())), right[0], **CLOSE)
    prompt = IDS[:, :6].numpy()
    assert arm.begin(prompt, 1).tolist() == right[:, 5].argmax(-1).tolist()


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_bias_of_a_head_is_computed_in_the_type_of_its_weights(
    bases: dict[bool, Path], tmp_path: Path, dtype: str, adapted: bool
) -> None:
    """Phi's head has one, and so has one with a LoRA of ``lora_bias``."""
    base, adapter = bases[False], None
    if adapted:
        adapter = make_adapter(base, tmp_path / "adapter", LORA["head, lora_bias"])
    else:
        sizes = {"vocab_size": 258, "max_position_embeddings": 64}
        base = make_model(tmp_path / "phi", model_type="phi", **sizes)
        weights = load_file(base / "model.safetensors")
        weights["lm_head.bias"] += torch.arange(258) / 50  # new models have zeros
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    right = peft_logits(base, adapter) if adapter else load(base)(input_ids=IDS).logits.detach()
    (ours,) = our_logits([teacher("one", base, adapter, dtype=dtype)])
    share = 0.05 if dtype == "bf16" else 0.01
    assert float((ours - right).abs().max()) < share * float(right.abs().max())


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "pair",
    [
        ("saved head", "saved head"),
        ("saved head", "plain"),
        ("head", "plain"),
        ("head, dora", "head"),
        ("tokens", "plain"),
        ("tokens", "tokens"),
        ("saved head and embedding", "tokens"),
        ("embedding", "saved head"),
        ("bias", "patterns"),
        ("parameters", "head"),
    ],
)
def test_adapters_of_one_base_do_not_change_each_other(
    bases: dict[bool, Path], tmp_path: Path, pair: tuple[str, str], tied: bool
) -> None:
    base = bases[tied]
    adapters = [
        make_adapter(base, tmp_path / f"{i}", LORA[kind], seed=i) for i, kind in enumerate(pair)
    ]
    right = [peft_logits(base, adapter) for adapter in adapters]
    for order in ((0, 1), (1, 0)):
        folders = [teacher(f"t.{i}", base, adapters[i]) for i in order]
        folders.insert(1, teacher("base", base, None))
        ours = our_logits(folders)
        torch.testing.assert_close(ours[0], right[order[0]], **CLOSE)
        torch.testing.assert_close(ours[1], load(base)(input_ids=IDS).logits, **CLOSE)
        torch.testing.assert_close(ours[2], right[order[1]], **CLOSE)


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("plain", "dora", "loha") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in LORA | OTHERS
    ],
)
def test_adapters_on_a_quantised_base_compute_what_peft_computes(
    bases: dict[bool, Path], tmp_path: Path, kind: str, form: str
) -> None:
    """Or peft cannot run them. int8 rounds activations by what the whole batch holds."""
    base = bases[False]
    adapter = make_adapter(base, tmp_path / "adapter", (LORA | OTHERS)[kind])
    rounding = BitsAndBytesConfig(
        load_in_8bit=form == "int8",
        load_in_4bit=form == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    try:
        model = peft_model(base, adapter, device_map={"": "cpu"}, quantization_config=rounding)
        for module in model.modules():  # with AVX512-BF16 bitsandbytes stops at such widths
            if hasattr(module, "support_avx512bf16_for_cpu") and module.in_features % 64:
                module.support_avx512bf16_for_cpu = False
        right = [model(input_ids=IDS).logits for _ in range(2)][1]  # DoRA stops at the second
    except (RuntimeError, AttributeError, ValueError, TypeError):
        with pytest.raises(ModelError, match=r"peft cannot run this \w+ adapter on the quantised"):
            our_logits([teacher("one", base, adapter, quantize=form)])
        return
    (ours,) = our_logits([teacher("one", base, adapter, quantize=form)])
    torch.testing.assert_close(ours, right.float(), **CLOSE)


def test_a_saved_embedding_stays_with_its_adapter(bases: dict[bool, Path], tmp_path: Path) -> None:
    """peft stores the base's embedding in some adapters, and loads it over the base's own."""
    from peft import get_peft_model

    base = bases[True]
    model = load(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=Q, task_type="CAUSAL_LM"))
    model.get_input_embeddings().weight.data *= 1.5
    adapted.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    plain = make_adapter(base, tmp_path / "plain", LORA["tokens"])
    saved = tmp_path / "saved"
    ours = our_logits([teacher("saved", base, saved), teacher("plain", base, plain)])
    torch.testing.assert_close(ours[0], peft_logits(base, saved), **CLOSE)
    torch.testing.assert_close(ours[1], peft_logits(base, plain), **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_work_with_the_tokenizer_beside_them(
    bases: dict[bool, Path], tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoTokenizer

    base, adapter = bases[tied], tmp_path / "adapter"
    config = LoraConfig(target_modules=Q, base_model_name_or_path=str(base))
    make_adapter(base, adapter, config, rows=260)
    assert any("embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
    right = peft_logits(base, adapter, rows=260)
    with pytest.raises(
        ModelError, match=r"260 rows, those of its base 258.*no tokenizer.json beside"
    ):
        our_logits([teacher("one", base, adapter)])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ModelError, match=r"260 rows.*the tokenizer beside it has 258 tokens"):
        our_logits([teacher("one", base, adapter)])
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    plain = make_adapter(base, tmp_path / "plain", LORA["plain"])
    ours = our_logits([teacher("plain", base, plain), teacher("one", base, adapter)])
    torch.testing.assert_close(ours[0], peft_logits(base, plain), **CLOSE)
    torch.testing.assert_close(ours[1], right, **CLOSE)
    arm = TorchEager(model=str(base), adapter=str(adapter), threads=1)
    torch.testing.assert_close(torch.from_numpy(arm.score(IDS[0].numpy())), right[0], **CLOSE)


def test_embeddings_that_are_only_filled_up_need_no_other_tokenizer(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """``resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)``."""
    base, adapter = bases[False], tmp_path / "adapter"
    config = LoraConfig(target_modules=Q, base_model_name_or_path=str(base))
    make_adapter(base, adapter, config, rows=320)
    make_tokenizer().save_pretrained(adapter)
    (ours,) = our_logits([teacher("one", base, adapter)])
    torch.testing.assert_close(ours, peft_logits(base, adapter, rows=320), **CLOSE)


def test_new_tokens_with_a_saved_head_and_embedding(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """peft then writes every saved module twice, and the base's own beside it."""
    base, adapter = bases[False], tmp_path / "adapter"
    config = LoraConfig(
        target_modules=Q,
        modules_to_save=["lm_head", "embed_tokens"],
        base_model_name_or_path=str(base),
    )
    make_adapter(base, adapter, config, rows=260)
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert {
        "base_model.model.lm_head.weight",
        "base_model.model.lm_head.modules_to_save.weight",
    } <= names
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    (ours,) = our_logits([teacher("one", base, adapter)])
    torch.testing.assert_close(ours, peft_logits(base, adapter, rows=260), **CLOSE)


def test_new_tokens_without_rows_are_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    """peft writes no embedding unless it is targeted, and would load random rows of it."""
    base = bases[False]
    adapter = make_adapter(base, tmp_path / "adapter", LORA["plain"])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ModelError, match=r"260 tokens, but the embeddings have 258 rows"):
        our_logits([teacher("one", base, adapter)])


def test_an_adapter_that_each_load_changes_is_refused_by_name(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """peft itself gives two answers."""
    config = LoraConfig(target_modules=LAYERS, r=2, init_lora_weights="pissa_niter_2")
    adapter = make_adapter(bases[False], tmp_path / "adapter", config)
    with pytest.raises(ModelError, match="init_lora_weights: pissa_niter_2 are not supported"):
        our_logits([teacher("one", bases[False], adapter)])
    for start in ("corda", "loftq"):  # peft itself stops
        changed(adapter, init_lora_weights=start)
        with pytest.raises((ValueError, AssertionError)):
            peft_logits(bases[False], adapter)
        with pytest.raises(ModelError, match=f"init_lora_weights: {start} are not supported"):
            our_logits([teacher("one", bases[False], adapter)])


def test_new_rows_are_never_made_up(bases: dict[bool, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = make_adapter(
        bases[False],
        tmp_path / "adapter",
        LoraConfig(target_modules=Q, base_model_name_or_path=str(bases[False])),
        rows=260,
    )
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.lm_head.weight"]
    save_file(weights, adapter / "adapter_model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(bases[False])
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ModelError, match="new rows of lm_head are not in it"):
        attach(load(bases[False]), adapter)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PROMPT_TUNING", PromptTuningConfig(num_virtual_tokens=4)),
        ("PREFIX_TUNING", PrefixTuningConfig(num_virtual_tokens=4)),
    ],
)
def test_adapters_that_are_no_layers_are_refused_by_name(
    bases: dict[bool, Path], tmp_path: Path, kind: str, config: Any
) -> None:
    adapter = make_adapter(bases[True], tmp_path / "adapter", config)
    with pytest.raises(ModelError, match=f"adapters of the kind {kind} are not supported"):
        our_logits([teacher("one", bases[True], adapter)])


def changed(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_options_that_would_be_dropped_are_refused_by_name(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(bases[True], tmp_path / "adapter", LORA["plain"])
    changed(adapter, use_future=True)
    with pytest.raises(ModelError, match="does not know use_future; install a newer peft"):
        attach(load(bases[True]), adapter)
    changed(adapter, use_future=False, alora_invocation_tokens=[1, 2])
    with pytest.raises(ModelError, match="adapters with alora_invocation_tokens are not supported"):
        attach(load(bases[True]), adapter)


def test_a_wrong_shape_is_one_line(bases: dict[bool, Path], tmp_path: Path) -> None:
    """torch lists every tensor on a line of its own."""
    adapter = make_adapter(bases[True], tmp_path / "adapter", LORA["plain"])
    changed(adapter, r=4)
    with pytest.raises(
        ModelError, match=r"12 of its tensors have another shape \(.*q_proj"
    ) as told:
        attach(load(bases[True]), adapter)
    assert "\n" not in str(told.value)
    changed(adapter, r=8, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"KeyError: .*lm_head.* Name the base .* compare"):
        attach(load(bases[True]), adapter)
    with pytest.raises(ModelError, match=f"{adapter} is one: name that folder"):
        adapter_facts(tmp_path)


def renamed(adapter: Path, old: str, new: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    save_file(
        {name.replace(old, new): tensor for name, tensor in load_file(weights).items()}, weights
    )


def test_every_tensor_of_an_adapter_finds_its_place(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """peft only warns, or says nothing, and the base answers without its adapter."""
    for old, new, problem in (
        (
            "base_model.model.model.",
            "base_model.model.language_model.",
            "have no place in the model",
        ),
        ("layers.1.", "layers.7.", "have no place in the model"),
    ):
        adapter = make_adapter(bases[True], tmp_path / new.replace(".", ""), LORA["plain"])
        renamed(adapter, old, new)
        with pytest.raises(ModelError, match=f"does not fit .*{problem}.*Name the base"):
            our_logits([teacher("one", bases[True], adapter)])
    adapter = make_adapter(bases[True], tmp_path / "less", LORA["plain"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="1 of its tensors are not in it"):
        our_logits([teacher("one", bases[True], adapter)])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "kind", ["plain", "saved head", "tokens", pytest.param("vera", marks=pytest.mark.slow)]
)
def test_a_state_dict_loads_as_the_adapter_it_was_taken_from(
    bases: dict[bool, Path], tmp_path: Path, kind: str, whole: bool
) -> None:
    """Its tensors have the adapter's name inside, and the base's own may lie beside them."""
    base, right = bases[False], tmp_path / "right"
    make_adapter(base, right, (LORA | OTHERS)[kind])
    shutil.copytree(right, adapter := tmp_path / "adapter")
    weights = peft_model(base, right).state_dict()
    kept = {n: w.clone() for n, w in weights.items() if whole or ".default" in n}
    assert not kept.keys() <= load_file(right / "adapter_model.safetensors").keys()
    save_file(kept, adapter / "adapter_model.safetensors")
    folders = [teacher("base", base, None), *(teacher(f"t.{i}", base, adapter) for i in range(2))]
    for ours in our_logits(folders)[1:]:
        torch.testing.assert_close(ours, peft_logits(base, right), **CLOSE)
    arm = TorchEager(model=str(base), adapter=str(adapter), threads=1)
    scores = torch.from_numpy(arm.score(IDS[0].numpy()))
    torch.testing.assert_close(scores, peft_logits(base, right)[0], **CLOSE)


def test_one_weight_under_two_names_is_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases[True], tmp_path / "adapter", LORA["plain"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights |= {n.replace("_A.", "_A.default."): 2 * w for n, w in weights.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"holds both .*lora_A\.default\.weight and .*one weight"):
        adapter_facts(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named_by_file_and_tensor(
    bases: dict[bool, Path], tmp_path: Path, value: float
) -> None:
    """Rounding to int8 would hide it, and so would a score that reads few tokens."""
    adapter = make_adapter(bases[False], tmp_path / "adapter", LORA["plain"])
    shutil.copytree(bases[False], base := tmp_path / "base")
    for folder, file, tensor, given in (
        (adapter, "adapter_model.safetensors", r"layers\.0\.mlp\.down_proj\.lora_A\.weight",
         (bases[False], adapter)),
        (base, "model.safetensors", r"lm_head\.weight", (base, None)),
    ):  # fmt: skip
        weights = load_file(folder / file)
        next(w for name, w in weights.items() if re.search(tensor, name))[1, 1] = value
        save_file(weights, folder / file, metadata={"format": "pt"})
        problem = rf"{folder / file}: 1 of the \d+ numbers of \S*{tensor} are NaN or infinite"
        for quantize in ("none", "int8"):
            with pytest.raises(ModelError, match=problem):
                our_logits([teacher("one", *given, quantize=quantize)])
        with pytest.raises(ModelError, match=problem):
            TorchEager(model=str(given[0]), adapter=given[1] and str(given[1]), threads=1)


def test_large_finite_numbers_are_no_error() -> None:
    """Their sum overflows fp32."""
    require_finite("it", [("one", torch.full((4,), 3e38)), ("two", torch.arange(3))])


def test_pickled_and_missing_adapters_are_named(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases[True], tmp_path / "adapter", LORA["plain"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.bin is a pickle.*writes safetensors"):
        attach(load(bases[True]), adapter)
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match="no such folder"):
        attach(load(bases[True]), adapter)


def test_merging_is_checked(
    bases: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head that stays tied, the adapter of the head changes the embedding as well."""
    adapter = make_adapter(bases[True], tmp_path / "adapter", LORA["head"])
    model = attach(load(bases[True]), adapter)
    monkeypatch.setattr("limbeck.contract.models.adapters._untie", lambda _: False)
    with pytest.raises(ModelError, match="gives other logits than the model's own forward pass"):
        merged(model, where="it")


def test_a_student_takes_no_adapter_on_its_head(bases: dict[bool, Path]) -> None:
    for target in ("lm_head", "embed_tokens"):
        config = LoraStudent(
            kind="lora",
            base=RandomModel(kind="random", config={}),
            rank=4,
            targets=("q_proj", target),
        )
        with pytest.raises(
            ModelError, match=r"student\.targets: the embedding and the head take no"
        ):
            with_lora(load(bases[True]), config, 0)
