// openai: the Responses API, which keeps no state here (`store: false`).
import OpenAI from "openai";

import { MODEL, TOOL, URL, run, saw, writeFile } from "./tasks.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });

await run("openai", async (prompt) => {
  const input = [{ role: "user", content: prompt }];
  while (true) {
    const pieces = [];
    const stream = client.responses.stream({
      model: MODEL,
      input,
      tools: [{ type: "function", strict: false, ...TOOL }],
      store: false,
    });
    for await (const event of stream) if (event.type === "response.output_text.delta") pieces.push(event.delta);
    const { output, usage } = await stream.finalResponse();
    const calls = output.filter((item) => item.type === "function_call");
    if (!calls.length) return saw(pieces, [usage.input_tokens, usage.output_tokens]);
    input.push(...output);
    for (const call of calls) {
      const result = writeFile(JSON.parse(call.arguments));
      input.push({ type: "function_call_output", call_id: call.call_id, output: result });
    }
  }
});
