// @anthropic-ai/sdk: streamed messages, and a loop over tool uses.
import Anthropic from "@anthropic-ai/sdk";

import { MODEL, TOOL, URL, run, saw, writeFile } from "./tasks.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const tools = [{ name: TOOL.name, description: TOOL.description, input_schema: TOOL.parameters }];

await run("@anthropic-ai/sdk", async (prompt) => {
  const messages = [{ role: "user", content: prompt }];
  while (true) {
    const pieces = [];
    const stream = client.messages.stream({ model: MODEL, max_tokens: 1024, messages, tools });
    stream.on("text", (piece) => pieces.push(piece));
    const { content, usage } = await stream.finalMessage();
    const uses = content.filter((block) => block.type === "tool_use");
    if (!uses.length) return saw(pieces, [usage.input_tokens, usage.output_tokens]);
    messages.push({ role: "assistant", content });
    messages.push({
      role: "user",
      content: uses.map((use) => ({ type: "tool_result", tool_use_id: use.id, content: writeFile(use.input) })),
    });
  }
});
