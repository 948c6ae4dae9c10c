"""Adapters of every kind of peft on tiny bases with trained weights, and peft's own outputs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.teachers.live import TeacherFolder, Teachers
from tests.pico import make_model

SIZES = {"vocab_size": 258, "max_position_embeddings": 64}
IDS = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(5))
LAYERS = ["q_proj", "v_proj", "down_proj"]
Q = ["q_proj", "v_proj"]
LORA: dict[str, Any] = {
    "plain": LoraConfig(target_modules=LAYERS),
    "head": LoraConfig(target_modules=[*Q, "lm_head"]),
    "head, rslora": LoraConfig(target_modules=[*Q, "lm_head"], use_rslora=True),
    "head, dora": LoraConfig(target_modules=[*Q, "lm_head"], use_dora=True),
    "head, lora_bias": LoraConfig(target_modules=[*Q, "lm_head"], lora_bias=True),
    "embedding": LoraConfig(target_modules=[*Q, "embed_tokens"]),
    "embedding and head, tied": LoraConfig(
        target_modules=[*Q, "embed_tokens"], ensure_weight_tying=True),
    "dora": LoraConfig(target_modules=LAYERS, use_dora=True),
    "bias": LoraConfig(target_modules=LAYERS, bias="all"),
    "one layer": LoraConfig(target_modules=LAYERS, layers_to_transform=[1]),
    "patterns": LoraConfig(
        target_modules=LAYERS, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "saved head": LoraConfig(target_modules=Q, modules_to_save=["lm_head"]),
    "saved head and embedding": LoraConfig(
        target_modules=Q, modules_to_save=["lm_head", "embed_tokens"]),
    "saved norm": LoraConfig(target_modules=Q, modules_to_save=["norm"]),
    "tokens": LoraConfig(target_modules=Q, trainable_token_indices=[3, 5, 250]),
    "parameters": LoraConfig(target_modules=Q, target_parameters=["lm_head.weight"]),
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "beft": BeftConfig(target_modules=Q),
    "deft": DeftConfig(target_modules=Q),
    "frod": FrodConfig(target_modules=Q),
    "glora": GloraConfig(target_modules=Q),
    "hira": HiraConfig(target_modules=Q),
    "osf": OSFConfig(target_modules=Q),
    "peanut": PeanutConfig(target_modules=Q),
    "psoft": PsoftConfig(target_modules=Q),
    "pvera": PveraConfig(target_modules=Q),
    "supertuning": SupertuningConfig(target_modules=Q),
    "tinylora": TinyLoraConfig(target_modules=Q),
    "unilora": UniLoraConfig(target_modules=Q),
    "adalora": AdaLoraConfig(target_modules=Q, total_step=10),
    "boft": BOFTConfig(target_modules=Q, boft_block_size=4),
    "c3a": C3AConfig(target_modules=Q, block_size=8),
    "delora": DeloraConfig(target_modules=Q),
    "fourierft": FourierFTConfig(target_modules=Q, n_frequency=20),
    "gralora": GraloraConfig(target_modules=Q),
    "hra": HRAConfig(target_modules=Q),
    "ia3": IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "ln_tuning": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "loha": LoHaConfig(target_modules=Q),
    "lokr": LoKrConfig(target_modules=Q),
    "miss": MissConfig(target_modules=Q, r=8),
    "oft": OFTConfig(target_modules=Q, oft_block_size=8, r=0),
    "randlora": RandLoraConfig(target_modules=Q),
    "road": RoadConfig(target_modules=Q, group_size=16),
    "shira": ShiraConfig(target_modules=Q, r=2),
    "trainable tokens": TrainableTokensConfig(token_indices=IDS[0, :3].tolist()),
    "vblora": VBLoRAConfig(target_modules=Q, vector_length=16, num_vectors=8, topk=2),
    "vera": VeraConfig(target_modules=["q_proj", "o_proj"]),
    "waveft": WaveFTConfig(target_modules=Q, n_frequency=20),
}


def make_base(folder: Path, *, tied: bool, **over: Any) -> Path:
    """A tiny llama."""
    return make_model(folder, seed=3, tie_word_embeddings=tied, **SIZES | over)


def load(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def make_adapter(base: Path, folder: Path, config: Any, *, seed: int = 0, rows: int = 0) -> Path:
    """Save an adapter of ``config`` with weights far from zero; ``rows`` resizes the embedding."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft says much that is no concern of these tests
        warnings.simplefilter("ignore")
        config = copy.deepcopy(config)
        config.task_type = "CAUSAL_LM"
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = get_peft_model(model, config)
        draw = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
        adapted.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path, *, rows: int = 0, **options: Any) -> Any:
    """This one adapter on this base, as peft loads it. ``rows`` resizes the embedding before.

    ``options`` are transformers', for the base.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base, **options)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def peft_logits(base: Path, adapter: Path, ids: Tensor = IDS, *, rows: int = 0) -> Tensor:
    """What peft computes with this one adapter on this base: the right value of every test."""
    with torch.no_grad():
        found: Tensor = peft_model(base, adapter, rows=rows)(input_ids=ids).logits
    return found


def teacher(name: str, base: Path, adapter: Path | None, **over: Any) -> TeacherFolder:
    """A teacher as a recipe would find it."""
    fields: dict[str, Any] = {
        "quantize": "none",
        "dtype": "fp32",
        "digest": name,
        "tokenizer": base,
    } | over
    return TeacherFolder(
        name=name, base=base, adapter=adapter, whole=base, whole_adapter=adapter, **fields
    )


def our_logits(folders: list[TeacherFolder], ids: Tensor = IDS) -> list[Tensor]:
    """What each teacher says, by the path that training takes: hidden states, then the head."""
    loaded = Teachers(folders, device=torch.device("cpu"), compute_dtype=torch.float32)
    states, _ = loaded.states(ids)
    return [state.head.logits(state.hidden_RLd) for state in states]
