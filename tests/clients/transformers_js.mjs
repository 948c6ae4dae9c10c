// Reads a job as JSON from standard input, runs it with transformers.js, and writes what came out as JSON.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(`${process.cwd()}/`);
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = require("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = "/";

const job = JSON.parse(readFileSync(0, "utf8"));
const DTYPES = { fp32: "fp32", "int8-weight": "q8", "int8-dynamic": "int8", "int4-weight": "q4" };
const width = job.ids[0].length;
const tensor = (rows) =>
  new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const numbers = (rows) => rows.map((row) => row.map(Number));

const tokens = {};
for (const form of job.forms) {
  const model = await AutoModelForCausalLM.from_pretrained(job.folder, { dtype: DTYPES[form], local_files_only: true });
  const out = await model.generate({
    input_ids: tensor(job.ids),
    attention_mask: tensor(job.mask),
    max_new_tokens: job.count,
    do_sample: false,
  });
  tokens[form] = numbers(out.tolist()).map((row) => row.slice(width));
}
const tokenizer = await AutoTokenizer.from_pretrained(job.folder, { local_files_only: true });
const chat = tokenizer.apply_chat_template(job.messages, { add_generation_prompt: true, return_dict: false, return_tensor: false });
console.log(JSON.stringify({ tokens, text: tokenizer.encode(job.text), chat: chat.map(Number) }));
