"""Sentence encoders and classifiers whose files say how their answers are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import compress
import export
from compress.models.encoders import load_body, load_classifier, pooled
from compress.models.language import random_config
from limbeck.contract.data.examples import EXAMPLES, load_examples
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import AnyRecipe
from limbeck.contract.sources.encoders import require_pooling
from limbeck.contract.sources.preflight import preflight
from limbeck.runtime.encoder import Encoder
from tests.encoders import CONFIGS, QUICK, classifier_recipe, embedding_recipe, source
from tests.pico import make_tokenizer

MODES = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")


def encoder(folder: Path, auto: Any = AutoModel, **fields: Any) -> Path:
    config = random_config(
        {"model_type": "bert", "max_position_embeddings": 64} | CONFIGS["bert"] | fields,
        vocab_size=258,
        where="t",
    )
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sentences(folder: Path, *modes: str, then: tuple[str, ...] = ("Normalize",)) -> Path:
    """As sentence-transformers saves it; the vectors are pooled by ``modes``."""
    encoder(folder)
    kinds = ("Transformer", "Pooling", *then)
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{kind}" if at else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {f"pooling_mode_{mode}": mode in modes for mode in MODES}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, **pooling, "include_prompt": True})
    )
    return folder


def recipe_of(folder: Path, **teacher: Any) -> AnyRecipe:
    model = {"kind": "local", "path": str(folder)}
    other = {"name": "b", "model": source("distilbert", seed=2)}
    return embedding_recipe(teachers=[{"name": "a", "model": model, **teacher}, other])


def test_the_pooling_of_the_folder_is_asked_for(tmp_path: Path) -> None:
    cls, mean = sentences(tmp_path / "cls", "cls_token"), sentences(tmp_path / "m", "mean_tokens")
    (mistake,) = preflight(recipe_of(cls))
    assert f"teachers.0: {cls}: it pools token states by cls (1_Pooling)" in mistake
    assert preflight(recipe_of(cls, pooling="cls")) == []
    assert preflight(recipe_of(mean)) == []
    recipe = recipe_of(cls)
    with pytest.raises(ModelError, match="set pooling: cls for this teacher"):
        require_pooling(cls, recipe.teachers[0])
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    states = AutoModel.from_pretrained(cls)(input_ids=ids, attention_mask=mask).last_hidden_state
    right = torch.nn.functional.normalize(states[:, 0], dim=-1)
    torch.testing.assert_close(pooled(load_body(cls), ids, mask, pooling="cls"), right)


@pytest.mark.parametrize(
    ("modes", "then", "mistake"),
    [
        (("max_tokens",), (), "it pools token states by max_tokens; Limbeck knows mean and cls"),
        (("lasttoken",), (), "it pools token states by lasttoken"),
        (("mean_tokens", "max_tokens"), (), "by mean_tokens and max_tokens"),
        (("mean_tokens",), ("Dense", "Normalize"), "modules.json has a module Dense"),
    ],
)
def test_vectors_that_are_made_otherwise_are_refused(
    tmp_path: Path, modes: tuple[str, ...], then: tuple[str, ...], mistake: str
) -> None:
    (found,) = preflight(recipe_of(sentences(tmp_path / "model", *modes, then=then)))
    assert mistake in found


def test_text_that_sentence_transformers_would_lower_is_refused(tmp_path: Path) -> None:
    folder = sentences(tmp_path / "model", "mean_tokens")
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 32, "do_lower_case": True}))
    (found,) = preflight(recipe_of(folder))
    assert "sentence_bert_config.json has do_lower_case, and its tokenizer keeps capitals" in found
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert preflight(recipe_of(folder)) == []
    # Without tokenizer.json, transformers makes the tokenizer of a vocabulary and a setting.
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("a")
    for lowers in (True, False):
        settings = {"do_lower_case": lowers, "tokenizer_class": "BertTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert len(preflight(recipe_of(folder))) == (not lowers)


@pytest.mark.parametrize(
    ("named", "prompts", "refused"),
    [
        ("query", {"query": "query: ", "document": ""}, True),  # as E5 is often saved
        ("document", {"query": "query: ", "document": ""}, False),
        (None, {"query": "query: "}, False),  # is used where a text asks for it by name
        (None, None, False),
    ],
)
def test_a_prompt_before_every_text_is_refused(
    tmp_path: Path, named: str | None, prompts: dict[str, str] | None, refused: bool
) -> None:
    """sentence-transformers documents default_prompt_name as what `encode` uses by itself."""
    folder = sentences(tmp_path / "model", "mean_tokens")
    config = {"prompts": prompts, "default_prompt_name": named, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    found = preflight(recipe_of(folder))
    assert len(found) == refused
    assert all("puts 'query: ' before every text" in mistake for mistake in found)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_classifier_of_several_labels_is_refused(tmp_path: Path, kind: str) -> None:
    """Its answers are trained as a sigmoid each, not as shares of one."""
    folder = encoder(
        tmp_path / "model", AutoModelForSequenceClassification, num_labels=2, problem_type=kind
    )
    model = {"kind": "local", "path": str(folder)}
    (found,) = preflight(classifier_recipe(teachers=[{"name": "a", "model": model}]))
    assert f"teachers.0: {folder}: its problem_type is {kind}" in found
    # Of a base only the body is read, and the student is a classifier of single labels.
    student = {"kind": "full", "base": model}
    assert preflight(classifier_recipe(student=student)) == []
    made = load_classifier(folder, classes=["no", "yes"])
    assert made.config.problem_type is None


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["code", "prose"], None),
        (["prose", "code"], "prose, code"),
        (None, "LABEL_0, LABEL_1"),  # as transformers names them
        (["a", "b", "c"], "a, b, c"),
    ],
)
def test_a_teacher_of_other_classes_is_refused_before_a_run(
    tmp_path: Path, labels: list[str] | None, found: str | None
) -> None:
    named = {"id2label": dict(enumerate(labels))} if labels else {}
    folder = encoder(tmp_path / "model", AutoModelForSequenceClassification, **named)
    told = AutoModelForSequenceClassification.from_pretrained(folder).config.id2label
    assert list(told.values()) == (labels or ["LABEL_0", "LABEL_1"])
    for model, none in (
        ({"kind": "local", "path": str(folder)}, found),
        (
            source(**{k: {str(i): n for i, n in v.items()} for k, v in named.items()}),
            found and (found if labels else "nothing"),
        ),
    ):
        mistakes = preflight(classifier_recipe(teachers=[{"name": "a", "model": model}]))
        assert len(mistakes) == (none is not None)
        assert all(
            f"tells apart {none}; the recipe's classes are code, prose" in m for m in mistakes
        )


# Decoders take the state of a text's last token, which they find by the id of their padding.
_DECODER: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 256}


def _classifier(folder: Path, kind: str, pad: int | None, **fields: Any) -> Path:
    two = {"id2label": {0: "code", 1: "prose"}, "pad_token_id": pad, "model_type": kind}
    wide = {"initializer_range": 0.2, "num_labels": 2}
    return encoder(folder, AutoModelForSequenceClassification, **two, **wide, **fields)


@torch.inference_mode()
def _alone(folder: Path, student: Path) -> tuple[list[Any], list[int], torch.Tensor]:
    """Held-out rows of a student, their classes, and what transformers says of each by itself."""
    held = load_examples(student / EXAMPLES)
    rows = [
        torch.from_numpy(r[:n]).long() for r, n in zip(held.input_ids, held.lengths, strict=True)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return (
        rows,
        held.groups.tolist(),
        torch.cat([model(input_ids=row[None]).logits for row in rows]),
    )


@pytest.mark.parametrize(
    ("kind", "pad", "fields"),
    [
        ("qwen3", 5, _DECODER),  # its tokenizer pads with 257
        pytest.param("gpt2", 7, {"n_embd": 64, "n_head": 4, "n_layer": 2}, marks=pytest.mark.slow),
        pytest.param("modernbert-decoder", 9, {}, marks=pytest.mark.slow),
    ],
)
def test_texts_of_a_batch_are_answered_as_alone(
    tmp_path: Path, kind: str, pad: int, fields: dict[str, Any]
) -> None:
    """By teacher, student and graph, whatever the tokenizer pads with."""
    folder = _classifier(tmp_path / "model", kind, pad, **fields)
    model = {"kind": "local", "path": str(folder)}
    classes = []
    for at, name in enumerate(("code", "prose")):
        lines = [json.dumps({"text": chr(97 + at) * n}) for n in range(2, 32)]
        (tmp_path / name).write_text("\n".join(lines))
        files = {"paths": [str(tmp_path / name)], "format": {"kind": "jsonl", "field": "text"}}
        classes.append({"name": name, "text": {"kind": "files"} | files})
    recipe = classifier_recipe(
        data={"classes": classes, "max_tokens": 40, "heldout": {"every": 3}},
        teachers=[{"name": "a", "model": model}],
        student={"kind": "full", "base": model},
        training=QUICK["training"] | {"examples": 16},
        export={"forms": ["fp32"]},
    )
    student = compress.distill(recipe=recipe, out=tmp_path / "student")
    for at, found in (
        (folder, student.result["teachers"]["a"]["metrics"]),
        (student.path / "model", student.result["metrics"]),
    ):
        rows, classes, right = _alone(at, student.path)
        nll = torch.nn.functional.cross_entropy(right.double(), torch.tensor(classes))
        assert found["nll"] == pytest.approx(float(nll), abs=1e-4)
    export.export_student(student=student.path, out=tmp_path / "onnx", recipe=recipe)
    graph = Encoder(tmp_path / "onnx")
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    answers = torch.from_numpy(graph.run(ids.numpy(), mask.numpy()))
    torch.testing.assert_close(answers, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "pad", "fields", "says"),
    [
        ("qwen3", None, _DECODER, "cannot answer a test batch.*Set pad_token_id in its config"),
        ("qwen3", -1, _DECODER, "answers a text otherwise when it is padded.*Set pad_token_id"),
        ("fnet", 257, {}, "FNetForSequenceClassification answers a text otherwise.*another enc"),
        ("convbert", 257, {"embedding_size": 64}, "ConvBertForSequenceClassification answers a t"),
    ],
)
def test_an_encoder_whose_answers_depend_on_padding_is_refused(
    tmp_path: Path, kind: str, pad: int | None, fields: dict[str, Any], says: str
) -> None:
    folder = _classifier(tmp_path / "model", kind, 257, **fields)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[8, 9, 10, 11, 12, 13], [8, 9, 10, 257, 257, 257]])
    try:  # transformers itself gives another answer, or none
        beside = model(input_ids=ids, attention_mask=(ids != 257).long()).logits[1]
        assert not torch.allclose(beside, model(input_ids=ids[1:, :3]).logits[0], atol=1e-3)
    except ValueError:
        assert pad is None
    with pytest.raises(ModelError, match=says):
        load_classifier(folder)
