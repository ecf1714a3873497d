// What was said. An entry is a user's {role, content} or an assistant's Answer (answer.js).

/** Turns of a chat, in order. */
export class Conversation {
  entries = [];

  /** The messages for the API: of all entries before one, with the results of tools after the calls. */
  messages(systemPrompt, before = this.entries.length) {
    const system = systemPrompt.trim() ? [{ role: "system", content: systemPrompt }] : [];
    return [...system, ...this.entries.slice(0, before).flatMap(asMessages)];
  }

  /** What was said and how long it took. Without the key, which is no part of any request's body. */
  exported() {
    return {
      format: "qwen3-serve conversation",
      exported: new Date().toISOString(),
      entries: this.entries.map((entry) =>
        entry.role === "user"
          ? entry
          : { ...entry.message(), results: entry.results(), metrics: entry.metrics(), request: entry.request },
      ),
    };
  }
}

function asMessages(entry) {
  if (entry.role === "user") return [{ role: "user", content: entry.content }];
  if (entry.isEmpty) return []; // it failed, or was stopped before it began
  return [entry.message(), ...entry.results()];
}
