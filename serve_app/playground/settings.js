// The settings panel: the key, the system prompt, sampling, tools.

import { apiKey } from "./api.js";
import { byId, element } from "./dom.js";

const SAMPLING = [
  { name: "temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", min: -1, max: 2 ** 31 - 1, step: 1 },
  { name: "min_p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", min: 1, max: 2 ** 31 - 1, step: 1 },
  { name: "seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  { name: "presence_penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", min: 0.01, max: 100, step: 0.01 },
];
const EXAMPLE_TOOL = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

/** Reads the panel's fields. */
export class Settings {
  #inputs = new Map();
  #thinking;

  /** @param {() => void} keyChanged called when there is another key. */
  constructor(keyChanged) {
    for (const field of SAMPLING) this.#addNumber(field);
    this.#thinking = element(
      "select",
      { id: "thinking" },
      element("option", { value: "" }, "model's own"),
      element("option", { value: "true" }, "on"),
      element("option", { value: "false" }, "off"),
    );
    byId("sampling").prepend(row("thinking", "thinking", this.#thinking));
    byId("api-key").value = apiKey.get();
    byId("api-key").addEventListener("change", (event) => {
      apiKey.set(event.target.value.trim());
      keyChanged();
    });
    byId("settings-form").addEventListener("submit", (event) => {
      event.preventDefault();
      byId("api-key").blur(); // Enter in a field: its change counts now
    });
    byId("tools").addEventListener("input", () => this.#checkTools());
    byId("example-tool").addEventListener("click", () => {
      byId("tools").value = JSON.stringify(EXAMPLE_TOOL, null, 2);
      this.#checkTools();
    });
    byId("reset").addEventListener("click", () => this.#reset());
  }

  get systemPrompt() {
    return byId("system-prompt").value;
  }

  /** Show what the model does where a field is empty. */
  showDefaults(defaults = {}) {
    for (const [name, input] of this.#inputs) input.placeholder = defaults[name] ?? "none";
    this.#inputs.get("max_tokens").placeholder = defaults.max_tokens ?? "what fits";
    this.#inputs.get("seed").placeholder = "random";
  }

  /**
   * The fields of a request's body.
   * @throws {Error} a field cannot be used; it is focused.
   */
  body() {
    const body = {};
    for (const [name, input] of this.#inputs) {
      if (!input.checkValidity()) {
        input.focus();
        throw new Error(`${name}: expected a number from ${input.min} to ${input.max}.`);
      }
      if (input.value !== "") body[name] = Number(input.value);
    }
    if (this.#thinking.value) body.chat_template_kwargs = { enable_thinking: this.#thinking.value === "true" };
    const tools = this.#tools();
    if (tools.length) Object.assign(body, { tools, tool_choice: byId("tool-choice").value });
    return body;
  }

  #tools() {
    const text = byId("tools").value.trim();
    if (!text) return [];
    let tools;
    try {
      tools = JSON.parse(text);
    } catch (error) {
      byId("tools").focus();
      throw new Error(`Tools: ${error.message}.`);
    }
    if (!Array.isArray(tools)) throw new Error("Tools: expected a JSON list.");
    return tools;
  }

  #checkTools() {
    let message = "";
    try {
      const count = this.#tools().length;
      if (count) message = `${count} ${count === 1 ? "function" : "functions"}`;
    } catch (error) {
      ({ message } = error);
    }
    byId("tools-help").textContent = message;
  }

  #reset() {
    for (const input of this.#inputs.values()) input.value = "";
    this.#thinking.value = "";
    byId("system-prompt").value = "";
    byId("tools").value = "";
    byId("tool-choice").value = "auto";
    this.#checkTools();
  }

  #addNumber({ name, min, max, step }) {
    // Steps are for the arrows; any number within the bounds will do.
    const input = element("input", { id: `sampling-${name}`, type: "number", inputMode: "decimal", min, max });
    input.step = Number.isInteger(step) ? step : "any";
    this.#inputs.set(name, input);
    byId("sampling").append(row(input.id, name, input));
  }
}

function row(id, label, input) {
  return element("div.row", {}, element("label", { htmlFor: id }, label), input);
}
