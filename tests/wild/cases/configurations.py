"""Random configurations and LoRA adapters, and the loss that we and that transformers and peft
compute for each.

A case is drawn from its number alone. Our loss is that of training: teachers in memory, hidden
states, head, no attention mask. Theirs is the model's own forward pass with a mask, then
`torch.nn.functional.cross_entropy`. Shapes: R rows, L positions.
"""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.head import IGNORED, label_nll
from compress.models.language import random_model
from compress.teachers.live import TeacherFolder, Teachers
from limbeck.contract.errors import LimbeckError
from tests.architectures import SIZES
from tests.pico import make_tokenizer
from tests.wild.cases.adapters import load, make_adapter, peft_model, teacher

CASES = 200
TOLERANCE = 1e-4  # nats a token, of losses up to 100; fp32 rounds larger ones by more
# Not in docs/architectures.md, but loaded all the same: each has something of its own in its head.
OTHERS = (
    "gemma2", "cohere", "phi", "starcoder2", "olmo2", "bloom", "stablelm", "glm4", "cohere2",
    "ernie4_5", "nemotron", "lfm2", "falcon_h1",
)  # fmt: skip
_LENGTH = 24  # longer than every window and every original context below
_LENGTHS = (24, 17, 9)  # the rows are padded on the right
_Draw = random.Random
_STARTS = ("orthogonal", "olora", "pissa", "mica", "pissa_niter_2")  # of LoRA, with extra terms
_ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@dataclass(frozen=True)
class Case:
    """A model, and the adapters that sit on it."""

    number: int
    config: dict[str, Any]
    adapters: tuple[dict[str, Any], ...]  # what `_adapter_config` takes


@dataclass(frozen=True)
class Outcome:
    """The loss of one teacher of a case, in nats a token of its worst row, or why there is none."""

    case: Case
    what: str
    ours: float | str
    theirs: float | str

    @property
    def verdict(self) -> str:
        """equal, refused, impossible (transformers or peft cannot make it), or what went wrong."""
        if isinstance(self.ours, float) and isinstance(self.theirs, float):
            allowed = TOLERANCE * max(1.0, abs(self.theirs) / 100)
            return "equal" if abs(self.ours - self.theirs) <= allowed else "DIFFERENT"
        if isinstance(self.ours, str) and self.ours.startswith("CRASH"):
            return "CRASH"
        if isinstance(self.ours, str):
            return "refused" if isinstance(self.theirs, float) else "impossible"
        return "ACCEPTED"  # transformers or peft refuse it


def draw_case(number: int) -> Case:
    """The case of this number: the model types take turns, the rest is random."""
    draw = random.Random(number)
    kinds = (*SIZES, *OTHERS)
    config = _config(draw, kinds[number % len(kinds)])
    adapters = tuple(_adapter(draw) for _ in range(draw.choice((0, 1, 1, 2))))
    return Case(number, config, adapters)


# Configurations -----------------------------------------------------------------------------------


def _config(draw: _Draw, kind: str) -> dict[str, Any]:
    heads, layers = draw.choice((2, 4)), draw.choice((2, 3))
    tied, rows = draw.random() < 0.5, draw.choice((258, 258, 264, 320))
    common = {
        "model_type": kind,
        "tie_word_embeddings": tied,
        "vocab_size": rows,
        "pad_token_id": 257,
    }
    wide = {
        "hidden_size": draw.choice((32, 48, 64)),
        "intermediate_size": draw.choice((40, 48, 96)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": draw.choice((_LENGTH, 64)),
    }  # fmt: skip
    grouped = wide | {"num_key_value_heads": draw.choice((1, heads // 2, heads))}
    head = {"head_dim": draw.choice((8, 16, 24))}
    biases = {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    window = draw.choice((4, 8))
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    sliding = draw.choice(({}, sliding))
    match kind:
        case "llama":
            own = grouped | head | biases | _rope(draw, head["head_dim"])
            own["hidden_act"] = draw.choice(("silu", "gelu"))
        case "qwen2":
            own = grouped | sliding | _rope(draw, grouped["hidden_size"] // heads)
        case "qwen3":
            own = grouped | head | sliding | _rope(draw, head["head_dim"])
            own["attention_bias"] = biases["attention_bias"]
        case "mistral" | "starcoder2":
            own = grouped | {"sliding_window": draw.choice((None, window))}
            own |= head if kind == "mistral" else {"use_bias": draw.random() < 0.5}
            own |= _rope(draw, own.get("head_dim") or own["hidden_size"] // heads)
        case "granite":
            own = grouped | biases | _rope(draw, grouped["hidden_size"] // heads)
            own |= {
                "logits_scaling": draw.choice((1.0, 4.0)),
                "embedding_multiplier": draw.choice((1.0, 6.0)),
                "attention_multiplier": draw.choice((0.25, 1.0)),
                "residual_multiplier": draw.choice((0.3, 1.0)),
            }
        case "phi3":
            share = draw.choice((0.5, 1.0))
            own = grouped | {"sliding_window": draw.choice((None, window))}
            kinds = ("default", "longrope")  # transformers takes no other of phi3
            size = int(grouped["hidden_size"] // heads * share)
            own |= _rope(draw, size, share=share, kinds=kinds)
        case "smollm3":
            own = grouped | biases | sliding | _rope(draw, grouped["hidden_size"] // heads)
            own["no_rope_layers"] = [draw.randint(0, 1) for _ in range(layers)]
        case "gemma2" | "gemma3_text":
            own = (
                grouped
                | head
                | _gemma(draw, kind, layers, head["head_dim"])
                | {"sliding_window": window}
            )
        case "cohere" | "cohere2":
            own = grouped | {"logit_scale": draw.choice((0.0625, 0.5, 1.0))}
            if kind == "cohere":
                own["use_qk_norm"] = draw.random() < 0.5
            else:
                own |= {"layer_types": _layer_types(draw, layers), "sliding_window": window}
        case "stablelm":
            share = draw.choice((0.5, 1.0))
            own = grouped | _rope(draw, int(grouped["hidden_size"] // heads * share), share=share)
            for name in ("use_qkv_bias", "use_parallel_residual", "qk_layernorm"):
                own[name] = draw.random() < 0.5
        case "glm4" | "ernie4_5" | "nemotron":
            # Of Ernie transformers turns all numbers of a head, whatever share is named.
            share = 1.0 if kind == "ernie4_5" else draw.choice((0.5, 1.0))
            own = grouped | head | _rope(draw, int(head["head_dim"] * share), share=share)
            own |= {"use_bias": biases["attention_bias"]} if kind == "ernie4_5" else biases
        case "lfm2":
            own = grouped | _rope(draw, grouped["hidden_size"] // heads)
            types = draw.choices(("conv", "full_attention"), k=layers - 1)
            own |= {"layer_types": [*types, "full_attention"], "block_auto_adjust_ff_dim": False}
            own |= {"conv_L_cache": draw.choice((2, 3)), "conv_bias": draw.random() < 0.5}
        case "falcon_h1":
            own = grouped | head | _rope(draw, head["head_dim"])
            own |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
            own |= {"lm_head_multiplier": draw.choice((1.0, 0.25))}
            own |= {"embedding_multiplier": draw.choice((1.0, 4.0)), "mamba_n_groups": 1}
        case "phi":
            share = draw.choice((0.5, 1.0))
            own = grouped | _rope(draw, int(grouped["hidden_size"] // heads * share), share=share)
            own["qk_layernorm"] = draw.random() < 0.5
        case "olmo2":
            own = grouped | {"attention_bias": biases["attention_bias"]}
            own |= _rope(draw, grouped["hidden_size"] // heads)
        case "gpt_neox":
            share = draw.choice((0.5, 1.0))
            own = wide | _rope(draw, int(wide["hidden_size"] // heads * share), share=share)
            own |= {
                "use_parallel_residual": draw.random() < 0.5,
                "attention_bias": biases["attention_bias"],
            }
        case "gpt2":
            own = {
                "n_embd": wide["hidden_size"], "n_head": heads, "n_layer": layers,
                "n_positions": 64,
                "n_inner": draw.choice((None, 48)),
                "activation_function": draw.choice(("gelu_new", "relu")),
                "scale_attn_by_inverse_layer_idx": draw.random() < 0.3,
                "reorder_and_upcast_attn": draw.random() < 0.3,
            }  # fmt: skip
        case "opt":
            own = wide | {
                "ffn_dim": wide["intermediate_size"],
                "word_embed_proj_dim": draw.choice((wide["hidden_size"], 32)),
                "do_layer_norm_before": draw.random() < 0.7,
                "enable_bias": draw.random() < 0.7,
                "layer_norm_elementwise_affine": draw.random() < 0.7,
            }
        case "bloom":
            own = {"hidden_size": wide["hidden_size"], "n_head": heads, "n_layer": layers}
            own["apply_residual_connection_post_layernorm"] = draw.random() < 0.5
    return common | own


def _rope(
    draw: _Draw, size: int, *, share: float = 1.0, kinds: Sequence[str] = tuple(_ROPES)
) -> dict[str, Any]:
    """``rope_parameters`` of one of ``kinds``, for heads of which ``size`` numbers are rotated."""
    kind = draw.choice(kinds)
    rope = {"rope_type": kind, "rope_theta": draw.choice((1e4, 5e5)), **_ROPES[kind]}
    if kind == "longrope":
        rope["short_factor"] = [1.0 + at / 4 for at in range(size // 2)]
        rope["long_factor"] = [2.0 + at for at in range(size // 2)]
    return {"rope_parameters": rope | {"partial_rotary_factor": share}}


def _layer_types(draw: _Draw, layers: int) -> list[str]:
    return [draw.choice(("sliding_attention", "full_attention")) for _ in range(layers)]


def _gemma(draw: _Draw, kind: str, layers: int, size: int) -> dict[str, Any]:
    own = {
        "layer_types": _layer_types(draw, layers),
        "final_logit_softcapping": draw.choice((None, 3.0)),
        "attn_logit_softcapping": draw.choice((None, 2.0)),
        "query_pre_attn_scalar": draw.choice((8, 64)),
    }
    if kind == "gemma2":
        return own
    ropes = {
        name: _rope(draw, size)["rope_parameters"]
        for name in ("sliding_attention", "full_attention")
    }
    both_ways = draw.random() < 0.15  # every token sees later ones: no language model
    return own | {"rope_parameters": ropes, "use_bidirectional_attention": both_ways}


# Adapters -----------------------------------------------------------------------------------------


def _adapter(draw: _Draw) -> dict[str, Any]:
    """Options of peft's LoRA; what depends on the names of the model's modules is a share."""
    embedding = draw.random()
    start: Any = draw.choice((True, True, True, False, "gaussian", *_STARTS))
    plain = start not in _STARTS  # peft makes no other combination of these three
    return {
        "seed": draw.randrange(1000),
        "targets": draw.choice(("some", "some", "all-linear", "pattern")),
        "beside": draw.choice(("", "", "", "head", "embedding", "both")),
        "saved": draw.choice(("", "", "", "norm", "head", "embedding", "both")),
        "rows": 4 if embedding < 0.2 else 0,  # added tokens
        "options": {
            "r": draw.choice((2, 4, 8)),
            "lora_alpha": draw.choice((1, 8, 32)),
            "lora_dropout": draw.choice((0.0, 0.1)),
            "use_rslora": draw.random() < 0.2,
            "use_dora": plain and draw.random() < 0.2,
            "lora_bias": plain and draw.random() < 0.1,
            "bias": draw.choice(("none", "none", "none", "all", "lora_only")),
            "init_lora_weights": start,
            "layers_to_transform": draw.choice((None, None, None, [0])),
            "rank_pattern": draw.choice(({}, {}, {".*0.*": 2})),
            "alpha_pattern": draw.choice(({}, {}, {".*1.*": 3})),
            "ensure_weight_tying": draw.random() < 0.1,
            "trainable_token_indices": [3, 5, 250] if 0.2 <= embedding < 0.3 else None,
            "layer_replication": [[0, 2], [0, 2]] if draw.random() < 0.03 else None,
            "alora_invocation_tokens": [1, 2] if draw.random() < 0.03 else None,
        },
    }


def _adapter_config(model: Any, drawn: dict[str, Any]) -> LoraConfig:
    """peft's configuration for the modules of ``model``."""
    draw = random.Random(drawn["seed"])
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (
        names[id(part)].rpartition(".")[2]
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    norms = [name for name in names.values() if "norm" in name or "ln_f" in name]
    places = {"head": [head], "embedding": [embedding], "both": [head, embedding], "": []}
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and not name.endswith(head)
        }
    )
    some = draw.sample(linear, draw.randint(1, len(linear)))
    targets: Any = some + places[drawn["beside"]]
    if drawn["targets"] == "all-linear":
        targets = "all-linear"
    elif drawn["targets"] == "pattern":
        targets = rf".*\.({'|'.join(targets)})"
    saved = [norms[-1].rpartition(".")[2]] if drawn["saved"] == "norm" else places[drawn["saved"]]
    options = dict(drawn["options"])
    if options["layers_to_transform"] and not isinstance(targets, list):
        options["layers_to_transform"] = None  # peft takes it with a list of names only
    return LoraConfig(target_modules=targets, modules_to_save=saved or None, **options)


# Losses -------------------------------------------------------------------------------------------


def outcomes(case: Case, folder: Path) -> Iterator[Outcome]:
    """Make ``case`` below ``folder``; the loss of its model, then that of each adapter on it."""
    base = folder / "model"
    try:
        make_case_model(case, base)
    except LimbeckError as error:
        yield Outcome(case, describe(case.config), str(error), "transformers cannot build it")
        return
    expected: list[tuple[str, TeacherFolder, float | str]] = []
    alone = teacher("base", base, None)
    expected.append((describe(case.config), alone, _their_loss(base, None)))
    for index, drawn in enumerate(case.adapters):
        adapter, what = folder / f"adapter{index}", describe_adapter(drawn)
        rows = case.config["vocab_size"] + drawn["rows"] if drawn["rows"] else 0
        try:
            config = _adapter_config(load(base), drawn)
            make_adapter(base, adapter, config, seed=drawn["seed"], rows=rows)
            theirs = _their_loss(base, adapter, rows=rows)
        except Exception as error:  # peft cannot make or load it: nobody can have such a folder
            shutil.rmtree(adapter, ignore_errors=True)
            yield Outcome(case, what, "not tried", f"peft: {_line(error)}")
            continue
        if rows:
            tokenizer = make_tokenizer()
            tokenizer.add_tokens([f"<{n}>" for n in range(rows - len(tokenizer))])
            tokenizer.save_pretrained(adapter)
        expected.append((what, teacher(f"adapter{index}", base, adapter), theirs))
    ours = _our_losses([entry[1] for entry in expected])
    for (what, _, theirs), found in zip(expected, ours, strict=True):
        yield Outcome(case, what, found, theirs)


def make_case_model(case: Case, folder: Path) -> None:
    """Save a model whose every weight, norms and biases included, is far from its start."""
    model: Any = random_model(case.config, vocab_size=258, seed=case.number, where=f"{case.number}")
    draw = torch.Generator().manual_seed(case.number)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def _batch(seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels, each [R, L]; the rows are ragged."""
    shape = (len(_LENGTHS), _LENGTH)
    ids = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(_LENGTH) < torch.tensor(_LENGTHS)[:, None]).long()
    ids = ids * mask
    labels = torch.full(shape, IGNORED)
    labels[:, :-1] = torch.where(mask[:, 1:].bool(), ids[:, 1:], IGNORED)
    return ids, mask, labels


def _their_loss(base: Path, adapter: Path | None, *, rows: int = 0) -> float:
    ids, mask, labels = _batch()
    model = load(base) if adapter is None else peft_model(base, adapter, rows=rows)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    loss = nn.functional.cross_entropy
    return _worst(
        torch.stack([loss(z, y, ignore_index=IGNORED) for z, y in zip(logits, labels, strict=True)])
    )


def _our_losses(folders: list[TeacherFolder]) -> list[float | str]:
    """The loss of each teacher, all in memory together; if one is refused, those of the others."""
    ids, _, labels = _batch()
    try:
        teachers = Teachers(folders, device=torch.device("cpu"), compute_dtype=torch.float32)
        states, _ = teachers.states(ids)
    except Exception as error:  # what is not ours is a crash, and the test says so
        if len(folders) > 1:
            return [_our_losses([folder])[0] for folder in folders]
        if isinstance(error, LimbeckError):
            return [str(error)]
        return [f"CRASH: {''.join(traceback.format_exception(error))}"]
    counts = (labels != IGNORED).sum(1)
    return [_worst(label_nll(s.hidden_RLd, s.head, labels) / counts) for s in states]


def _worst(loss_R: Tensor) -> float:
    """The largest loss of a row: every row is likely to differ where one does."""
    return float(loss_R.max())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def describe(config: dict[str, Any]) -> str:
    """The model type and its fields in one line."""
    fields = {
        name: value for name, value in config.items() if name not in ("model_type", "pad_token_id")
    }
    return f"{config['model_type']} " + " ".join(f"{n}={_short(v)}" for n, v in fields.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        kind = value.get("rope_type")
        return str(kind) if kind else "/".join(_short(inner) for inner in value.values())
    return str(value).replace(" ", "")


def describe_adapter(drawn: dict[str, Any]) -> str:
    """The options of an adapter that are not peft's own, in one line."""
    plain = LoraConfig()
    parts = {
        name: value for name, value in drawn.items() if name not in ("seed", "options") and value
    }
    parts |= {n: v for n, v in drawn["options"].items() if v != getattr(plain, n)}
    return "+ lora " + " ".join(f"{n}={str(v).replace(' ', '')}" for n, v in parts.items())
