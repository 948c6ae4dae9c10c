"""Run a job (JSON on standard input) with onnxruntime-genai and write the result as JSON."""

import json
import sys

import numpy as np
import onnxruntime_genai as genai

genai.disable_telemetry_events()
job = json.load(sys.stdin)


def answer(model, rows):
    """New tokens of every row; short rows are padded on the right, as `encode_batch` does."""
    parameters = genai.GeneratorParams(model)
    width = len(rows[0])
    parameters.set_search_options(
        batch_size=len(rows), max_length=width + job["count"], do_sample=False
    )
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(rows, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [
        [int(token) for token in generator.get_sequence(row)[width:]] for row in range(len(rows))
    ]


tokens, alone, written = {}, {}, {}
for form in job["forms"]:
    config = genai.Config(job["folder"])  # names the shipped form
    config.overlay(json.dumps({"model": {"decoder": {"filename": f"onnx/{job['files'][form]}"}}}))
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    texts = [*job["texts"]]
    if job["messages"]:
        chat = json.dumps(job["messages"])
        texts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True))
    width = max(map(len, job["prompts"]))
    tokens[form] = answer(
        model, [prompt + [job["pad"]] * (width - len(prompt)) for prompt in job["prompts"]]
    )
    alone[form] = answer(model, [job["alone"]])[0]
    # By default no token is put before a text. A rendered chat has its own ones.
    tokenizer.update_options(add_special_tokens="true")
    prompts = [tokenizer.encode(text) for text in job["texts"]]
    tokenizer.update_options(add_special_tokens="false")
    prompts += [tokenizer.encode(text) for text in texts[len(prompts) :]]
    written[form] = [
        tokenizer.decode(np.array(answer(model, [prompt])[0], np.int32)) for prompt in prompts
    ]
ids = [[int(token) for token in prompt] for prompt in prompts]
print(json.dumps({"tokens": tokens, "alone": alone, "written": written, "ids": ids}))
