// A tour of the HTTP API with OpenAI's own client for Node, which knows nothing of promptfleet.
//
// Run a fleet with `promptfleet dev`, then, in another terminal:
//
//     eval "$(promptfleet env)"
//     cd examples/node && npm ci
//     node openai_tour.mjs
//
// OPENAI_BASE_URL and OPENAI_API_KEY name another fleet; --model asks for another model or tier,
// and --lines makes smaller batches.

import { parseArgs } from "node:util";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI, { ConflictError, InternalServerError, NotFoundError, toFile } from "openai";

const { values: asked } = parseArgs({
  options: {
    model: { type: "string", default: "tier/basic" },
    "embedding-model": { type: "string", default: "tier/basic" },
    lines: { type: "string", default: "1000" },
  },
});
const here = process.env.PROMPTFLEET_PUBLIC_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? `${here}/v1`,
  apiKey: process.env.OPENAI_API_KEY ?? "this machine needs none",
});
const FINAL = new Set(["completed", "failed", "expired", "cancelled"]);

function assert(truth, what) {
  if (!truth) throw new Error(`not so: ${what}`);
}

async function models() {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  console.log("models:", ids.join(", "));
}

async function chat(model) {
  const { data, response } = await client.chat.completions
    .create({ model, messages: [{ role: "user", content: "Why is the sky blue?" }], max_tokens: 30 })
    .withResponse();
  console.log("chat:", JSON.stringify(data.choices[0].message.content));
  const job = response.headers.get("x-promptfleet-job");
  console.log(`  ${data.usage.total_tokens} tokens, job ${job}`);
}

async function stream(model) {
  const chunks = await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: "Count to ten." }],
    max_tokens: 30,
    stream: true,
    stream_options: { include_usage: true },
  });
  let pieces = 0;
  for await (const chunk of chunks) {
    if (chunk.choices[0]?.delta.content) pieces += 1;
    if (chunk.usage) console.log(`stream: ${chunk.usage.completion_tokens} tokens in ${pieces} pieces`);
  }
}

async function embeddings(model) {
  try {
    const made = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
    console.log(`embeddings: ${made.data.length} of ${made.data[0].embedding.length} numbers`);
  } catch (error) {
    if (!(error instanceof InternalServerError)) throw error;
    console.log(`embeddings: none, ${error.message}`); // the small model of `promptfleet dev`
  }
}

async function files() {
  const file = await client.files.create({
    file: await toFile(Buffer.from('{"note": 1}\n'), "notes.jsonl"),
    purpose: "batch",
  });
  const content = await (await client.files.content(file.id)).text();
  assert((await client.files.retrieve(file.id)).bytes === content.length, "the file is whole");
  await client.files.delete(file.id);
  try {
    await client.files.retrieve(file.id);
  } catch (error) {
    if (!(error instanceof NotFoundError)) throw error;
    console.log(`files: ${file.filename} was written, read and deleted`);
  }
}

async function newBatch(model, lines, topic) {
  const requests = Array.from({ length: lines }, (_, n) => ({
    custom_id: `line-${n}`,
    method: "POST",
    url: "/v1/chat/completions",
    body: { model, messages: [{ role: "user", content: `${topic} ${n}?` }], max_tokens: 2 },
  }));
  const text = requests.map((request) => JSON.stringify(request)).join("\n");
  const file = await client.files.create({
    file: await toFile(Buffer.from(text), "batch.jsonl"),
    purpose: "batch",
  });
  return client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
  });
}

// The batch as it is at its end; `look` sees it on its way.
async function ended(batch, look = async () => {}) {
  while (!FINAL.has(batch.status)) {
    await sleep(100);
    batch = await client.batches.retrieve(batch.id);
    await look(batch);
  }
  return batch;
}

async function linesOf(fileId) {
  if (!fileId) return [];
  const text = await (await client.files.content(fileId)).text();
  return text.split("\n").filter(Boolean).map((line) => JSON.parse(line));
}

async function wholeBatch(model, lines) {
  const batch = await ended(await newBatch(model, lines, "What is"));
  const answered = await linesOf(batch.output_file_id);
  const failed = await linesOf(batch.error_file_id);
  assert(answered.length + failed.length === lines, "every line is told of");
  console.log(`a batch of ${lines} lines: ${answered.length} answers, ${failed.length} errors`);
}

async function cancelledBatch(model, lines) {
  let cancelled = false;
  const batch = await ended(await newBatch(model, lines, "Where is"), async (seen) => {
    if (cancelled || seen.request_counts.completed < Math.min(20, lines / 10)) return;
    cancelled = true;
    try {
      await client.batches.cancel(seen.id);
    } catch (error) {
      if (!(error instanceof ConflictError)) throw error;
      console.log(`too late: ${error.message}`); // a fast fleet has ended it
    }
  });
  const answered = await linesOf(batch.output_file_id);
  const left = await linesOf(batch.error_file_id);
  assert(answered.length + left.length === lines, "every line is told of");
  console.log(`${batch.status} in mid-flight: ${answered.length} answers, ${left.length} cancelled`);
}

await models();
await chat(asked.model);
await stream(asked.model);
await embeddings(asked["embedding-model"]);
await files();
await wholeBatch(asked.model, Number(asked.lines));
await cancelledBatch(asked.model, Number(asked.lines));
