// openai: streamed chat completions; its own loop runs the tools.
import OpenAI from "openai";

import { MODEL, TOOL, URL, run, saw, writeFile } from "./tasks.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });

await run("openai", async (prompt) => {
  let pieces = [];
  let usage = null;
  const runner = client.chat.completions.runTools({
    model: MODEL,
    messages: [{ role: "user", content: prompt }],
    tools: [{ type: "function", function: { ...TOOL, function: writeFile, parse: JSON.parse } }],
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of runner) {
    usage = chunk.usage ? [chunk.usage.prompt_tokens, chunk.usage.completion_tokens] : usage;
    pieces.push(chunk.choices[0]?.delta?.content);
  }
  return saw(pieces, usage);
});
