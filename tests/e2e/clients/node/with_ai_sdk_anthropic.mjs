// Vercel AI SDK: the Messages API, by its provider for Anthropic.
import { createAnthropic } from "@ai-sdk/anthropic";

import { URL, MODEL } from "./tasks.mjs";
import { runWith } from "./ai_sdk.mjs";

await runWith(createAnthropic({ baseURL: `${URL}/v1`, apiKey: "none" })(MODEL));
