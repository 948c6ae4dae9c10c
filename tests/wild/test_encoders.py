"""Sentence encoders and classifiers whose files say how their answers are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from compress.models.encoders import load_body, load_classifier, pooled
from compress.models.language import random_config
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import AnyRecipe
from limbeck.contract.sources.encoders import require_pooling
from limbeck.contract.sources.preflight import preflight
from tests.encoders import CONFIGS, classifier_recipe, embedding_recipe, source
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
