// One answer of the model: what has come of it, and how long that took.

/** Built from the chunks of a stream. Times are the browser's, from pressing Send on. */
export class Answer {
  role = "assistant";
  content = "";
  reasoning = "";
  toolCalls = [];
  /** null while it runs; then "stop", "length", "tool_calls", "stopped" by the user, or "error". */
  finishReason = null;
  error = null;
  queueSeconds = null;
  usage = null;
  thinkingEnd = null;
  #firstToken = null;
  #lastToken = null;

  /** @param {Object} request the body that asks for it. */
  constructor(request) {
    this.request = request;
    this.start = performance.now();
  }

  /** Take in a chunk. Returns whether there is anything new to show. */
  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return false;
    const { delta } = choice;
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    const content = delta.content ?? "";
    this.reasoning += reasoning;
    this.content += content;
    for (const part of delta.tool_calls ?? []) this.#addCall(part);
    const isNew = Boolean(reasoning || content || delta.tool_calls?.length);
    if (isNew) {
      this.#lastToken = performance.now();
      this.#firstToken ??= this.#lastToken;
      if (this.reasoning && !reasoning) this.thinkingEnd ??= this.#lastToken;
    }
    if (choice.finish_reason) this.finish(choice.finish_reason);
    return isNew || Boolean(choice.finish_reason);
  }

  finish(reason, error = null) {
    this.finishReason = reason;
    this.error = error;
    if (this.reasoning) this.thinkingEnd ??= performance.now();
  }

  get isEmpty() {
    return !(this.content || this.toolCalls.length);
  }

  get isThinking() {
    return this.finishReason === null && this.reasoning !== "" && this.thinkingEnd === null;
  }

  /** Milliseconds spent on reasoning; 0 if there was none. */
  get thinkingMs() {
    return this.reasoning ? (this.thinkingEnd ?? performance.now()) - this.#firstToken : 0;
  }

  /** Itself, for the API. The template leaves out what was thought before the last question. */
  message() {
    const message = { role: "assistant", content: this.content };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (this.toolCalls.length) {
      message.tool_calls = this.toolCalls.map(({ id, name, arguments: given }) => ({
        id,
        type: "function",
        function: { name, arguments: given },
      }));
    }
    return message;
  }

  /** The results of its calls, for the API. */
  results() {
    return this.toolCalls
      .filter((call) => call.result !== undefined)
      .map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result }));
  }

  /** In milliseconds and tokens; null is not known. */
  metrics() {
    const outputTokens = this.usage?.completion_tokens ?? null;
    const decodeSeconds = this.#firstToken === null ? 0 : (this.#lastToken - this.#firstToken) / 1000;
    return {
      ttft_ms: this.#firstToken === null ? null : this.#firstToken - this.start,
      // The first token is over at the first token's time: the rest come in the time after it.
      tokens_per_s: outputTokens > 1 && decodeSeconds > 0 ? (outputTokens - 1) / decodeSeconds : null,
      output_tokens: outputTokens,
      reasoning_tokens: this.usage?.completion_tokens_details?.reasoning_tokens ?? null,
      queue_ms: this.queueSeconds === null ? null : this.queueSeconds * 1000,
      prompt_tokens: this.usage?.prompt_tokens ?? null,
      cached_tokens: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      finish_reason: this.finishReason,
    };
  }

  #addCall(part) {
    const call = (this.toolCalls[part.index] ??= { id: "", name: "", arguments: "", result: undefined });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name = part.function.name;
    call.arguments += part.function?.arguments ?? "";
  }
}
