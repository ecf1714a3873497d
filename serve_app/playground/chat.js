// The chat: sends, shows, stops.

import { Answer } from "./answer.js";
import { ApiError, startChat } from "./api.js";
import { Conversation } from "./conversation.js";
import { announce, byId, element } from "./dom.js";
import { AnswerView, userMessage } from "./messages.js";
import { showRequest } from "./request_dialog.js";

const EXAMPLES = ["What is 17 + 25?", "Say hello in three languages.", "Write a JSON object that describes a book."];
const MOST_ANNOUNCED = 500;

/** The conversation on the screen, and the one request that may run for it. */
export class Chat {
  #conversation = new Conversation();
  #views = [];
  #running = null;

  /**
   * @param {Settings} settings
   * @param {{name: () => string, whyNone: () => string, maxLength: (name: string) => number}} model
   *   what is chosen, why there is nothing to choose, how much a model reads.
   * @param {(message: string) => void} keyNeeded called when the server wants another key.
   */
  constructor(settings, model, keyNeeded) {
    this.settings = settings;
    this.model = model;
    this.keyNeeded = keyNeeded;
    this.prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.prompt.addEventListener("keydown", (event) => {
      // Enter that ends the composition of a character is not meant for us.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.prompt.addEventListener("input", () => this.#fitPrompt());
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.#clear());
    byId("export").addEventListener("click", () => this.#export());
    for (const text of EXAMPLES) {
      const use = () => {
        this.prompt.value = text;
        this.#submit();
      };
      byId("examples").append(element("li", {}, element("button", { type: "button", onclick: use }, text)));
    }
  }

  /** Abort the request that runs, here and thereby on the server. Returns whether there was one. */
  stop() {
    this.#running?.abort();
    return this.#running !== null;
  }

  #submit() {
    const text = this.prompt.value;
    if (!text.trim() || this.#running) return;
    if (this.#ask([...this.#conversation.entries, { role: "user", content: text }])) {
      this.prompt.value = "";
      this.#fitPrompt();
    }
  }

  /** Let the model answer these entries, which become the conversation. Returns false if it cannot be asked. */
  #ask(entries) {
    this.#notice("");
    let body;
    try {
      body = this.#body(entries);
    } catch (error) {
      this.#notice(error.message);
      return false;
    }
    this.#show(entries);
    this.#run(new Answer(body));
    return true;
  }

  #body(entries) {
    if (!this.model.name()) throw new Error(this.model.whyNone());
    const conversation = new Conversation();
    conversation.entries = entries;
    return {
      model: this.model.name(),
      messages: conversation.messages(this.settings.systemPrompt),
      ...this.settings.body(),
      stream: true,
      // With every chunk, so that an answer that is stopped has its numbers too.
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
  }

  async #run(answer) {
    const controller = new AbortController();
    this.#running = controller;
    this.#conversation.entries.push(answer);
    const view = this.#addView(answer);
    this.#showRunning(true);
    announce("The model answers.");
    let frame = 0;
    const draw = () => {
      frame = 0;
      this.#keepEndInView(() => view.update());
    };
    try {
      const { queueSeconds, chunks } = await startChat(answer.request, controller.signal);
      answer.queueSeconds = queueSeconds;
      for await (const chunk of chunks) {
        if (answer.add(chunk) && !frame) frame = requestAnimationFrame(draw);
      }
      // A stream may end without saying why.
      if (answer.finishReason === null) answer.finish("stop");
    } catch (error) {
      this.#failed(answer, error);
    } finally {
      cancelAnimationFrame(frame);
      this.#running = null;
      draw();
      this.#showRunning(false);
      if (this.#conversation.entries.includes(answer)) this.#showContext(answer);
      announce(answer.error ?? (answer.content.slice(0, MOST_ANNOUNCED) || "The answer has ended."));
    }
  }

  #failed(answer, error) {
    if (error.name === "AbortError") {
      answer.finish("stopped");
      return;
    }
    const later = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    answer.finish("error", error.message + later);
    if (error instanceof ApiError && error.status === 401) this.keyNeeded(error.message);
    if (!(error instanceof ApiError)) throw error; // a fault of this page, for its console too
  }

  #show(entries) {
    this.#conversation.entries = [...entries];
    for (const view of this.#views.splice(entries.length)) view.remove();
    // What stays is shown already: a conversation only changes from some entry on.
    while (this.#views.length < entries.length) this.#addView(entries[this.#views.length]);
    this.#showSize();
  }

  /** Show an entry at the end. Returns its AnswerView if it is an answer. */
  #addView(entry) {
    const index = this.#views.length;
    const before = () => this.#conversation.entries.slice(0, index);
    let view = null;
    let root;
    if (entry.role === "user") {
      root = userMessage(entry, (content) => this.#again(() => [...before(), { role: "user", content }]));
    } else {
      view = new AnswerView(entry, {
        retry: () => this.#again(before),
        showRequest: () => showRequest(entry.request),
        sendResults: () => this.#again(() => [...before(), entry]),
      });
      ({ root } = view);
    }
    this.#views.push(root);
    byId("messages").append(root);
    this.#showSize();
    byId("scroller").scrollTo({ top: byId("scroller").scrollHeight });
    return view;
  }

  /** Go on from an earlier point of the conversation; what came after it is dropped. */
  #again(entries) {
    if (this.#running) return;
    const kept = entries();
    // An edited message takes the place of the one that is shown.
    for (const view of this.#views.splice(Math.max(0, this.#unchanged(kept)))) view.remove();
    this.#ask(kept);
    this.prompt.focus();
  }

  #unchanged(entries) {
    const first = entries.findIndex((entry, index) => entry !== this.#conversation.entries[index]);
    return first === -1 ? entries.length : first;
  }

  #clear() {
    this.stop();
    const entries = this.#conversation.entries;
    this.#show([]);
    const undo = () => {
      this.#notice("");
      this.#show(entries);
    };
    this.#notice("The conversation is cleared.", element("button.quiet", { type: "button", onclick: undo }, "Undo"));
    byId("context").textContent = "";
    this.prompt.focus();
  }

  #export() {
    const text = JSON.stringify(this.#conversation.exported(), null, 2);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    element("a", { href: url, download: "conversation.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  #notice(text, ...actions) {
    byId("notice").hidden = !text;
    byId("notice").replaceChildren(text, ...actions);
  }

  #showRunning(isRunning) {
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    if (hadFocus) this.prompt.focus();
    this.#showSize();
  }

  #showSize() {
    const isEmpty = this.#views.length === 0;
    byId("empty").hidden = !isEmpty;
    byId("clear").disabled = isEmpty;
    byId("export").disabled = isEmpty || this.#running !== null;
  }

  #showContext(answer) {
    const used = answer.usage?.total_tokens;
    const most = this.model.maxLength(answer.request.model);
    const isKnown = used && most;
    byId("context").textContent = isKnown ? `${used.toLocaleString("en")} of ${most.toLocaleString("en")} tokens` : "";
  }

  /** Follow what is written, unless the reader has scrolled up. */
  #keepEndInView(change) {
    const scroller = byId("scroller");
    const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
    change();
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
  }

  #fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight, 240)}px`;
  }
}
