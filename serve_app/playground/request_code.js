// The same request for a terminal and for a program. Neither has the key in it: both read it from API_KEY.

const OPENAI_FIELDS = new Set(
  `model messages max_tokens temperature top_p presence_penalty frequency_penalty seed stream stream_options tools
  tool_choice`.split(/\s+/),
);

/** A command line for POSIX shells. */
export function asCurl(body, baseUrl) {
  return [
    `curl --no-buffer ${shellQuoted(`${baseUrl}v1/chat/completions`)}`,
    `  --header 'Content-Type: application/json'`,
    `  --header "Authorization: Bearer $API_KEY"`,
    `  --data ${shellQuoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n");
}

/** A program that uses OpenAI's client. Its own fields go as arguments, all others in `extra_body`. */
export function asPython(body, baseUrl) {
  const own = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name));
  const others = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name));
  if (others.length) own.push(["extra_body", Object.fromEntries(others)]);
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${literal(`${baseUrl}v1`)}, api_key=os.environ.get("API_KEY", "none"))
stream = client.chat.completions.create(
${own.map(([name, value]) => `    ${name}=${literal(value, "    ")},\n`).join("")})
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A JSON value as Python writes it. */
function literal(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  // JSON's strings are Python's, but for the halves of surrogate pairs, which JSON.stringify escapes if alone.
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const inner = `${indent}    `;
  const parts = isList
    ? value.map((each) => literal(each, inner))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, inner)}`);
  const [opening, closing] = isList ? "[]" : "{}";
  if (parts.length === 0) return opening + closing;
  return `${opening}\n${parts.map((part) => `${inner}${part},\n`).join("")}${indent}${closing}`;
}
