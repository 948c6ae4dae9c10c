"""The decoder loop, tokenising and streaming of `limbeck.runtime`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, DataError, EnvironmentalError
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.sampling import Sampling, choose
from limbeck.runtime.session import asked_for, import_onnxruntime
from limbeck.runtime.text import load_text, well_formed
from tests.factory import Factory
from tests.pico import make_tokenizer


@pytest.fixture(scope="module")
def exported(tiny: Factory) -> Artifact:
    return tiny.exported()


def torch_greedy(model: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            with torch.inference_mode():
                ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def test_generate_is_torchs_greedy_token_by_token(exported: Artifact) -> None:
    prompts = [[1, 2, 3], [77], list(range(40, 60))]
    decoder = Decoder(exported.path, form="fp32")
    expected = torch_greedy(exported.path.parent / "student/model", prompts, 20)
    assert [list(decoder.generate(prompt, 20)) for prompt in prompts] == expected
    every = Decoder(exported.path, form="fp32", all_logits=True)
    assert list(every.generate(prompts[0], 20)) == expected[0]


def test_a_ragged_batch_generates_what_each_prompt_does_alone(exported: Artifact) -> None:
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    decoder = Decoder(exported.path, form="fp32")
    alone = [list(decoder.generate(prompt, 8)) for prompt in prompts]
    for left in (True, False):
        ids, mask = np.zeros((3, 4), np.int64), np.zeros((3, 4), np.int64)
        for row, prompt in enumerate(prompts):
            place = slice(4 - len(prompt), 4) if left else slice(0, len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        tokens = [decoder.prefill(ids, mask, room=7).argmax(axis=1)]
        while len(tokens) < 8:
            tokens.append(decoder.step(tokens[-1]).argmax(axis=1))
        assert np.stack(tokens, axis=1).tolist() == alone


def test_the_cache_is_kept_between_prompts_and_grows(exported: Artifact) -> None:
    decoder = Decoder(exported.path, form="fp32")
    long = list(decoder.generate(list(range(30)), 10))
    binding = decoder._bindings[False]
    short = list(decoder.generate([1, 2], 3))
    assert decoder._bindings[False] is binding
    assert list(decoder.generate(list(range(30)), 10)) == long
    assert list(Decoder(exported.path, form="fp32").generate([1, 2], 3)) == short


def test_generation_stops(exported: Artifact) -> None:
    decoder = Decoder(exported.path)
    tokens = list(decoder.generate([1, 2, 3], 12))
    assert len(tokens) == 12
    assert (
        list(decoder.generate([1, 2, 3], 12, stop_ids={tokens[5]}))
        == tokens[: tokens.index(tokens[5])]
    )
    assert list(decoder.generate([1, 2, 3], 0)) == []
    assert len(list(decoder.generate(list(range(40)), 24))) == 24  # up to the context of 64


def test_sampling_is_repeatable_and_top_p_narrows(exported: Artifact) -> None:
    decoder = Decoder(exported.path)
    drawn = [
        list(decoder.generate([1, 2], 20, sampling=Sampling(temperature=5.0), seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = list(decoder.generate([1, 2], 20))
    assert (
        list(decoder.generate([1, 2], 20, sampling=Sampling(temperature=5.0, top_p=1e-9))) == greedy
    )
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    found = {
        choose(row, Sampling(temperature=1.0, top_p=0.79), np.random.default_rng(n))
        for n in range(60)
    }
    assert found == {0, 1}


def test_scores_need_the_all_logits_graph(exported: Artifact) -> None:
    ids = np.arange(12).reshape(2, 6)
    scores = Decoder(exported.path, all_logits=True).score(
        ids, np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    )
    assert scores.shape == (2, 6, 258)
    assert Decoder(exported.path).vocabulary == 258
    with pytest.raises(DataError, match="all_logits=True"):
        Decoder(exported.path).score(ids)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: d.prefill([[]]), r"found ids of shape \(1, 0\)"),
        (lambda d: d.prefill([1, 2]), r"found ids of shape \(2,\)"),
        (lambda d: d.prefill([[1, 2]], [[0, 0]]), "at least one token in every row"),
        (lambda d: d.prefill([[1, 2]], room=63), r"found 65 tokens .* context is 64"),
        (
            lambda d: (d.prefill([[1], [2]], room=4), d.extend([[1, 2], [3, 4]])),
            "one row only; append them one at a time",
        ),
        (
            lambda d: (d.prefill([[1], [2]], room=4), d.extend([[1], [3]], [[1], [0]])),
            "give every row a token",
        ),
        (
            lambda d: (d.prefill([[1]], room=4), d.extend([[1, 2]], [[1, 0]])),
            "padding can be appended to no row",
        ),
    ],
)
def test_bad_input_is_refused(exported: Artifact, act: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        act(Decoder(exported.path))


def test_a_full_cache_is_refused(exported: Artifact) -> None:
    decoder = Decoder(exported.path)
    decoder.prefill([[1, 2]], room=1)
    decoder.step([3])
    with pytest.raises(DataError, match="holds 3 tokens and is full"):
        decoder.step([4])


def test_an_unknown_form_or_folder_is_refused(exported: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no form 'int2'; it has fp32, int8-weight"):
        Decoder(exported.path, form="int2")
    with pytest.raises(ArtifactError, match="no complete artifact"):
        Decoder(tmp_path)


# The runtime package ------------------------------------------------------------------------------


def test_a_missing_runtime_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(importlib.metadata, "version", _only())
    with pytest.raises(EnvironmentalError, match=r"pip install 'limbeck\[cpu\]'"):
        import_onnxruntime()


def test_two_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", _only("onnxruntime", "onnxruntime-gpu"))
    with pytest.raises(
        EnvironmentalError, match=r"both installed.*pip uninstall -y onnxruntime onnxruntime-gpu"
    ):
        import_onnxruntime()


def test_no_gpu_build_is_said(exported: Artifact) -> None:
    with pytest.raises(EnvironmentalError, match="no CUDAExecutionProvider"):
        Decoder(exported.path, provider="cuda")


def test_generating_imports_neither_torch_nor_onnx(exported: Artifact) -> None:
    code = (
        "import sys; from pathlib import Path; from limbeck.runtime.decoder import Decoder\n"
        "from limbeck.runtime.text import load_text\n"
        f"folder = Path({str(exported.path)!r}); text = load_text(folder)\n"
        "print(''.join(text.stream(Decoder(folder).generate(text.encode('abc'), 4))))\n"
        "heavy = {'torch', 'transformers', 'onnx', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _only(*names: str) -> Any:
    def version(name: str) -> str:
        if name in names:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    return version


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["plain", "Grüße, Jürgen", "日本語のテキスト", "family 👩‍👩‍👧 flag 🇩🇪!", "  two  spaces\n", ""],
)
def test_streamed_text_is_whole_characters(exported: Artifact, text: str) -> None:
    folder = load_text(exported.path)
    ids = folder.encode(text)
    pieces = list(folder.stream(iter(ids)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(text)  # one byte a token, so one piece a character


def test_a_broken_character_at_the_end_is_shown_as_such(exported: Artifact) -> None:
    folder = load_text(exported.path)
    assert list(folder.stream(iter(folder.encode("aé")[:-1]))) == ["a", "\ufffd"]
    assert list(folder.stream(iter([256, *folder.encode("a"), 256]))) == ["a"]


def test_chat_is_rendered_as_transformers_does(exported: Artifact) -> None:
    messages = [
        {"role": "user", "content": "{{ 7 * 7 }} \n é"},
        {"role": "assistant", "content": "b"},
    ]
    expected = make_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    folder = load_text(exported.path)
    assert folder.chat(messages) == expected
    assert folder.stop_ids == {256}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<\n  {%- generation -%}\n  {{ m.content }} {% endgeneration %}\n>"
        "{% endfor %}",
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}",
        "{{ {'b': '<é>', 'a': [1]} | tojson(indent=1, sort_keys=true) }}"
        "{{ '<é>' | tojson(ensure_ascii=true) }}",
    ],
    ids=["generation", "globals", "tojson"],
)
def test_templates_find_what_transformers_gives_them(
    exported: Artifact, tmp_path: Path, template: str
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = make_tokenizer().apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    found = replace(load_text(exported.path), template=template)
    assert found.tokenizer.decode(found.chat(messages)) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "cannot render"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render these messages: TypeError: "),
    ],
)
def test_a_template_cannot_do_harm(
    exported: Artifact, tmp_path: Path, template: str, message: str
) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((exported.path / name).read_bytes())
    assert load_text(tmp_path).stop_ids == {256}
    with pytest.raises(DataError, match="no chat template"):
        load_text(tmp_path).chat([])
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, name: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 256}')
    assert load_text(tmp_path).stop_ids == {256}
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-5])
    with pytest.raises(ArtifactError, match=rf"{name}: .*; copy the folder again"):
        load_text(tmp_path)


def test_every_files_end_token_ends_an_answer(tmp_path: Path) -> None:
    """A chat model as it is found: each file names another end."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])
    assert load_text(tmp_path).stop_ids == {end[0]}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 10}')
    (tmp_path / "genai_config.json").write_text(f'{{"model": {{"eos_token_id": [{end[1]}]}}}}')
    assert load_text(tmp_path).stop_ids == {256, 9, 10, *end}


@pytest.mark.parametrize(
    ("template", "before"), [("<s> $A </s>", [258]), ("$A </s>", []), ("<s> $A", [258])]
)
@pytest.mark.parametrize("end", ["</s>", "<|end|>"])
def test_a_prompt_keeps_its_beginning_and_has_no_end(
    tmp_path: Path, template: str, before: list[int], end: str
) -> None:
    """A chat model's tokenizer names another end token than the one its template adds."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert (bos, eos) == (258, 259)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    tokenizer.eos_token = end
    tokenizer.save_pretrained(tmp_path)
    text = load_text(tmp_path)
    plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert text.encode("ab") == [*before, *plain]
    assert text.encode("ab</s>") == [*before, *plain, eos]  # the text's own is the user's
    assert text.encode("") == before


def test_a_beginning_that_is_also_the_end_token_stays(tmp_path: Path) -> None:
    """GPT-2's and OPT's BOS is their EOS: an empty prompt is that token alone, as transformers."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    assert tokenizer.bos_token_id == end
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, end)]
    )
    tokenizer.save_pretrained(tmp_path)
    for prompt in ("", "ab"):
        assert load_text(tmp_path).encode(prompt) == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("lone", ["\ud800", "a\udfffb", "\udc80\udcff b"])
def test_a_lone_surrogate_is_a_replacement_character(exported: Artifact, lone: str) -> None:
    text = load_text(exported.path)
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in lone)
    assert well_formed(lone) == expected
    assert text.encode(lone) == text.encode(expected)
    ids = text.chat([{"role": "user", "content": lone}])
    assert ids == text.chat([{"role": "user", "content": expected}])
    assert well_formed("\ud83d\ude00") == "😀"  # a pair is one character
    assert well_formed("Grüße 😀") == "Grüße 😀"


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer.json is missing"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    ("provider", "asked"),
    [("cpu", ["CPU"]), ("cuda", ["CUDA"]), ("tensorrt", ["Tensorrt", "CUDA"])],
)
def test_each_provider_is_asked_for_once(provider: Any, asked: list[str]) -> None:
    """onnxruntime warns of a provider that is named twice, also on a card."""
    assert asked_for(provider) == [f"{name}ExecutionProvider" for name in asked]
