// Usage: node chat.mjs BASE_URL MODEL. Prints one JSON line with what the official Node client saw of a streamed answer.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

const { data: stream, response } = await client.chat.completions
  .create({
    model,
    messages: [{ role: "user", content: "What is the capital of France? Answer in one word." }],
    max_tokens: 12,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  })
  .withResponse();

let text = "";
let finish = null;
let usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}

const unknown = await client.chat.completions
  .create({ model: "nope", messages: [{ role: "user", content: "Hi" }] })
  .then(() => null, (error) => ({ name: error.constructor.name, status: error.status, code: error.code }));

console.log(JSON.stringify({ text, finish, usage, backend: response.headers.get("x-backend"), unknown }));
