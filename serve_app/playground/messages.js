// What a conversation looks like.

import { copyButton, element } from "./dom.js";
import { showMarkdown } from "./markdown.js";

/**
 * A user's message, which can be edited in its place.
 * @param {(text: string) => void} edited called with another text; what came after it is then void.
 */
export function userMessage(entry, edited) {
  const text = element("div.said", {}, entry.content);
  const edit = element("button.quiet", { type: "button", onclick: () => startEditing() }, "Edit");
  const actions = element("div.actions", {}, edit, copyButton(() => entry.content));
  const root = element("article.message.user", { "aria-label": "You" }, element("h2.who", {}, "You"), text, actions);

  function startEditing() {
    const field = element("textarea", { value: entry.content, rows: 3, "aria-label": "Edit your message" });
    const stop = () => {
      form.replaceWith(text, actions);
      edit.focus();
    };
    const form = element(
      "form.editing",
      {
        onsubmit: (event) => {
          event.preventDefault();
          if (field.value.trim()) edited(field.value);
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            stop();
          } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
        },
      },
      field,
      element(
        "div.actions",
        {},
        element("button.primary", { type: "submit" }, "Send again"),
        element("button.quiet", { type: "button", onclick: stop }, "Cancel"),
      ),
    );
    actions.remove();
    text.replaceWith(form);
    field.focus();
  }
  return root;
}

/** An answer, as it grows. */
export class AnswerView {
  #thinking = element("div.thought");
  #summary = element("summary");
  #fold = element("details.thinking", { hidden: true }, this.#summary, this.#thinking);
  #content = element("div.prose");
  #calls = element("div.calls");
  #error = element("p.failure", { hidden: true });
  #metrics = element("dl.metrics");
  #actions = element("div.actions");
  #cards = [];

  /**
   * @param {Answer} answer
   * @param {{retry: () => void, showRequest: () => void, sendResults: () => void}} handlers
   */
  constructor(answer, handlers) {
    this.answer = answer;
    this.handlers = handlers;
    this.root = element(
      "article.message.assistant",
      { "aria-label": "Answer", "aria-busy": "true" },
      element("h2.who", {}, answer.request.model),
      this.#fold,
      this.#content,
      this.#calls,
      this.#error,
      this.#metrics,
      this.#actions,
    );
    // What is folded away is not laid out; it is only brought up to date when it is opened.
    this.#fold.addEventListener("toggle", () => this.#showThinking());
    this.update();
  }

  /** Show what the answer is now. */
  update() {
    const { answer } = this;
    const isRunning = answer.finishReason === null;
    this.root.classList.toggle("running", isRunning);
    this.root.classList.toggle("waiting", isRunning && answer.isEmpty && !answer.reasoning);
    this.root.setAttribute("aria-busy", String(isRunning));
    this.#fold.hidden = !answer.reasoning;
    const thought = milliseconds(answer.thinkingMs);
    this.#summary.textContent = answer.isThinking ? "Thinking…" : `Thought for ${thought}`;
    this.#showThinking();
    showMarkdown(this.#content, answer.content);
    this.#showCalls();
    this.#error.hidden = !answer.error;
    this.#error.textContent = answer.error ?? "";
    this.#metrics.replaceChildren(...metrics(answer));
    if (!isRunning && !this.#actions.childElementCount) this.#addActions();
  }

  #showThinking() {
    if (this.#fold.open) showMarkdown(this.#thinking, this.answer.reasoning.trim());
  }

  #addActions() {
    const button = (label, onclick) => element("button.quiet", { type: "button", onclick }, label);
    this.#actions.append(
      button("Retry", this.handlers.retry),
      copyButton(() => this.answer.content),
      button("View as code", this.handlers.showRequest),
    );
  }

  #showCalls() {
    const { toolCalls, finishReason } = this.answer;
    for (const [index, call] of toolCalls.entries()) {
      this.#cards[index] ??= this.#addCard(call);
      this.#cards[index].textContent = prettyJson(call.arguments, finishReason !== null);
    }
    if (finishReason !== null && toolCalls.length && !this.#calls.dataset.asks) this.#askForResults();
  }

  #addCard(call) {
    const given = element("code");
    const head = element("p.call-name", {}, element("span", {}, "Calls "), element("code", {}, call.name));
    const label = `Call of ${call.name}`;
    this.#calls.append(element("section.call", { "aria-label": label }, head, element("pre", { tabIndex: 0 }, given)));
    return given;
  }

  /** A field for the result of each call: the page runs no tools. */
  #askForResults() {
    this.#calls.dataset.asks = "true";
    const fields = this.answer.toolCalls.map((call, index) => {
      const field = element("textarea", { rows: 1, spellcheck: false, placeholder: "What the function returned" });
      field.value = call.result ?? "";
      const label = element("label", {}, element("span", {}, "Result"), field);
      this.#calls.children[index].append(label);
      return field;
    });
    const send = element("button.primary", {
      type: "button",
      onclick: () => {
        for (const [index, call] of this.answer.toolCalls.entries()) call.result = fields[index].value;
        this.handlers.sendResults();
      },
    });
    send.append(fields.length === 1 ? "Send the result" : "Send the results");
    this.#calls.append(element("div.actions", {}, send));
  }
}

function metrics(answer) {
  const found = answer.metrics();
  const shown = [
    ["TTFT", found.ttft_ms, milliseconds, "From sending to the first token, measured here"],
    ["Speed", found.tokens_per_s, (value) => `${rounded(value)} tok/s`, "Tokens after the first, over their time"],
    ["Output", found.output_tokens, tokens, "Tokens of the answer, reasoning included"],
    ["Prompt", found.prompt_tokens, tokens, "Tokens of the whole conversation before it"],
    ["Cached", found.cached_tokens, tokens, "Of the prompt, found in the prefix cache"],
    ["Queue", found.queue_ms, milliseconds, "From admission to its first step in the engine"],
  ];
  const parts = shown
    .filter(([, value]) => value !== null)
    .map(([name, value, format, title]) => metric(name, format(value), title));
  const ends = { length: "cut off at max_tokens", stopped: "stopped", error: "failed" };
  if (answer.finishReason in ends) parts.push(metric("End", ends[answer.finishReason], "Why it ended"));
  return parts;
}

function metric(name, value, title) {
  return element("div", { title }, element("dt", {}, name), element("dd", {}, value));
}

function tokens(value) {
  return `${value} tok`;
}

function milliseconds(value) {
  return value < 1000 ? `${rounded(value)} ms` : `${rounded(value / 1000)} s`;
}

/** Two figures at least. */
function rounded(value) {
  return value.toFixed(value < 10 ? 1 : 0);
}

/** JSON that is complete, with indentation; anything else as it came. */
function prettyJson(text, isComplete) {
  if (!isComplete) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // models may write what is no JSON
  }
}
