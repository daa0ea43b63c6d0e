// Vercel AI SDK: chat completions, by its provider for compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

import { URL, MODEL } from "./tasks.mjs";
import { runWith } from "./ai_sdk.mjs";

await runWith(createOpenAICompatible({ name: "xgen", baseURL: `${URL}/v1`, apiKey: "none", includeUsage: true })(MODEL));
