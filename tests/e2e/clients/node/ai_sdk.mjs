// Vercel AI SDK, whatever the provider: streamText and its loop over tools.
import { stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { TOOL, run, saw, writeFile } from "./tasks.mjs";

export function runWith(model, providerOptions = {}) {
  return run("ai", async (prompt) => {
    const pieces = [];
    const result = streamText({
      model,
      prompt,
      providerOptions,
      maxRetries: 0,
      stopWhen: stepCountIs(3),
      tools: {
        [TOOL.name]: tool({
          description: TOOL.description,
          inputSchema: z.object({ path: z.string(), content: z.string() }),
          execute: async (input) => writeFile(input),
        }),
      },
      onError: () => {}, // seen in the stream below
    });
    for await (const part of result.fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "text-delta") pieces.push(part.text);
    }
    const usage = await result.usage;
    return saw(pieces, [usage.inputTokens, usage.outputTokens]);
  });
}
