// Vercel AI SDK: the Responses API, by its provider for OpenAI.
import { createOpenAI } from "@ai-sdk/openai";

import { URL, MODEL } from "./tasks.mjs";
import { runWith } from "./ai_sdk.mjs";

await runWith(createOpenAI({ baseURL: `${URL}/v1`, apiKey: "none" })(MODEL), { openai: { store: false } });
