// What the programs in this folder share: `node PROGRAM URL MODEL TASKS` does the tasks and prints a JSON line of what it
// saw. TASKS is a JSON list of prompts. A program is a file of its own, so that it can be read as an example of its client.
import { readFileSync, writeFileSync } from "node:fs";

export const [URL, MODEL] = process.argv.slice(2);

export const TOOL = {
  name: "write_file",
  description: "Write a text file.",
  parameters: {
    type: "object",
    properties: { path: { type: "string" }, content: { type: "string" } },
    required: ["path", "content"],
    additionalProperties: false,
  },
};

export function writeFile({ path, content }) {
  writeFileSync(path, content);
  return `wrote ${content.length} characters`;
}

// `act`: prompt → text, pieces (of the stream), usage (prompt, answer).
export async function run(name, act) {
  const seen = [];
  for (const prompt of JSON.parse(process.argv[4])) {
    seen.push(await act(prompt).catch((error) => ({ error: `${error.constructor.name}: ${error.message}` })));
  }
  const { version } = JSON.parse(readFileSync(new globalThis.URL(`node_modules/${name}/package.json`, import.meta.url)));
  console.log(JSON.stringify({ version, seen }));
}

export function saw(pieces, usage) {
  const said = pieces.filter(Boolean);
  return { text: said.join(""), pieces: said.length, usage };
}
