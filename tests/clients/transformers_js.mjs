// Reads a job as JSON from standard input, runs it with transformers.js, and writes what came out as JSON.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(`${process.cwd()}/`);
const { AutoTokenizer, Tensor, env, pipeline } = require("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = "/";

const job = JSON.parse(readFileSync(0, "utf8"));
const DTYPES = { fp32: "fp32", "int8-weight": "q8", "int8-dynamic": "int8", "int4-weight": "q4" };
const tensor = (rows) =>
  new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const numbers = (rows) => rows.map((row) => row.map(Number));

const tokenizer = await AutoTokenizer.from_pretrained(job.folder, { local_files_only: true });
const chats = job.messages.length ? [job.messages] : [];
const options = { add_generation_prompt: true, return_dict: false, return_tensor: false };
const chatIds = chats.map((messages) => tokenizer.apply_chat_template(messages, options));
const ids = [...job.texts.map((text) => tokenizer.encode(text)), ...chatIds].map((prompt) => prompt.map(Number));
const tokens = {};
const alone = {};
const written = {};
for (const form of job.forms) {
  const generator = await pipeline("text-generation", job.folder, { dtype: DTYPES[form], local_files_only: true });
  const answer = async (ids, mask) => {
    const given = { input_ids: tensor(ids), attention_mask: tensor(mask) };
    const out = await generator.model.generate({ ...given, max_new_tokens: job.count, do_sample: false });
    return numbers(out.tolist()).map((row) => row.slice(ids[0].length));
  };
  tokens[form] = await answer(job.ids, job.mask);
  alone[form] = (await answer([job.alone], [job.alone.map(() => 1)]))[0];
  written[form] = [];
  for (const prompt of [...job.texts, ...chats]) {
    const [{ generated_text: whole }] = await generator(prompt, { max_new_tokens: job.count, do_sample: false });
    written[form].push(typeof prompt === "string" ? whole.slice(prompt.length) : whole.at(-1).content);
  }
}
console.log(JSON.stringify({ tokens, alone, written, ids }));
