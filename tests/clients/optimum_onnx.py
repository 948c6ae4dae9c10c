"""Run a job (JSON on standard input) with optimum-onnx and write the result as JSON."""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

job = json.load(sys.stdin)
ids, mask = torch.tensor(job["ids"]), torch.tensor(job["mask"])
tokenizer = AutoTokenizer.from_pretrained(job["folder"])
prompts = [tokenizer.encode(text) for text in job["texts"]]
if job["messages"]:
    prompts.append(list(tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True)))


def answer(model, ids, mask=None):
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=job["count"], do_sample=False
    )
    return out[:, ids.shape[1] :].tolist()


tokens, alone, written = {}, {}, {}
for form in job["forms"]:
    model = ORTModelForCausalLM.from_pretrained(
        job["folder"], subfolder="onnx", file_name=job["files"][form]
    )
    tokens[form] = answer(model, ids, mask)
    alone[form] = answer(model, torch.tensor([job["alone"]]))[0]
    answers = [answer(model, torch.tensor([prompt]))[0] for prompt in prompts]
    written[form] = [tokenizer.decode(found, skip_special_tokens=True) for found in answers]
print(json.dumps({"tokens": tokens, "alone": alone, "written": written, "ids": prompts}))
