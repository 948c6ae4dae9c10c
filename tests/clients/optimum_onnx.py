"""Reads a job as JSON from standard input, runs it with optimum-onnx, and writes what came out as JSON."""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

job = json.load(sys.stdin)
ids, mask = torch.tensor(job["ids"]), torch.tensor(job["mask"])
tokens, alone = {}, {}
for form in job["forms"]:
    model = ORTModelForCausalLM.from_pretrained(job["folder"], subfolder="onnx", file_name=job["files"][form])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=job["count"], do_sample=False)
    tokens[form] = out[:, ids.shape[1] :].tolist()
    out = model.generate(input_ids=torch.tensor([job["alone"]]), max_new_tokens=job["count"], do_sample=False)
    alone[form] = out[0, len(job["alone"]) :].tolist()
tokenizer = AutoTokenizer.from_pretrained(job["folder"])
chat = tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True, tokenize=True)
print(json.dumps({"tokens": tokens, "alone": alone, "text": tokenizer.encode(job["text"]), "chat": list(chat)}))
