// The fleet: what GET /status tells, once a second while it is looked at, and how that went in the last minutes.

import { ApiError, getJson } from "./api.js";
import { byId, element } from "./dom.js";
import { Sparkline } from "./sparkline.js";

const EVERY_MS = 1000;
const STALE_S = 3;

/** The view of that name. */
export class Fleet {
  #models = new Map();
  #timer = 0;
  #isWatched = false;
  #lastAnswer = null;

  /** Begin or end to follow it. */
  watch(isWatched) {
    this.#isWatched = isWatched;
    clearTimeout(this.#timer);
    if (isWatched) this.#poll();
  }

  async #poll() {
    let wait = EVERY_MS;
    if (!document.hidden) {
      try {
        this.#show(await getJson("status"));
        this.#lastAnswer = performance.now();
        this.#note("");
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        this.#showFailure(error);
        wait = Math.max(wait, (error.retryAfter ?? 0) * 1000);
      }
    }
    if (this.#isWatched) {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.#poll(), wait);
    }
  }

  #show({ models }) {
    const names = models.map((model) => model.name);
    for (const [name, view] of this.#models) {
      if (names.includes(name)) continue;
      view.root.remove();
      this.#models.delete(name);
    }
    for (const model of models) {
      if (!this.#models.has(model.name)) {
        const view = new ModelView(model.name);
        this.#models.set(model.name, view);
        byId("fleet-models").append(view.root);
      }
      this.#models.get(model.name).show(model);
    }
  }

  #showFailure(error) {
    const ago = this.#lastAnswer === null ? 0 : Math.round((performance.now() - this.#lastAnswer) / 1000);
    this.#note(ago > 1 ? `${error.message} What is shown is ${ago} s old.` : error.message);
  }

  #note(text) {
    byId("fleet-note").textContent = text;
    byId("fleet-models").classList.toggle("stale", text !== "");
  }
}

/** One model: its sums, with their history, and its replicas. */
class ModelView {
  #figures = {
    replicas: new Figure("Replicas", "running, of those that the autoscaler wants"),
    running: new Figure("Running", "requests in the batches of all replicas"),
    waiting: new Figure("Waiting", "requests in the queues of this ingress and of all replicas"),
    kv: new Figure("KV in use", "of the cache's blocks, by requests", 1),
    prefill: new Figure("Prefill", "prompt tokens a second, all replicas"),
  };
  #rows = element("tbody");
  #table = element("table.replicas");
  #views = new Map();
  #note = element("p.help");

  constructor(name) {
    const head = ["Replica", "State", "Running", "Waiting", "KV in use", "Step", "Prefill", "Last report"];
    this.#table.append(
      element("caption.hidden", {}, `Replicas of ${name}`),
      element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
      this.#rows,
    );
    this.root = element(
      "section.fleet-model",
      { "aria-label": name },
      element("h2", {}, name),
      element("div.figures", {}, ...Object.values(this.#figures).map((figure) => figure.root)),
      this.#table,
      this.#note,
    );
  }

  show(model) {
    const target = model.target_num_replicas;
    const isTold = target !== null; // Ray Serve's controller answers: who has no state there is gone
    const present = model.replicas.filter((replica) => replica.state !== null || !isTold);
    const loads = present.map((replica) => replica.load).filter((load) => load !== null);
    const sum = (value) => loads.reduce((total, load) => total + value(load), 0);
    const running = isTold ? present.filter((replica) => replica.state === "RUNNING").length : loads.length;
    const blocks = sum((load) => load.num_blocks);
    const used = blocks - sum((load) => load.num_free_blocks);
    this.#figures.replicas.show(running, isTold ? `${running} of ${target}` : String(running));
    this.#figures.running.show(sum((load) => load.num_running));
    this.#figures.waiting.show(model.num_queued + sum((load) => load.num_waiting));
    this.#figures.kv.show(blocks ? used / blocks : 0, blocks ? percent(used / blocks) : "–");
    const prefill = sum((load) => load.prefill_tokens_per_s);
    this.#figures.prefill.show(prefill, rate(prefill));
    this.#showReplicas(model.replicas, isTold);
    const { min_replicas: least, max_replicas: most } = model;
    this.#table.hidden = model.replicas.length === 0;
    const none = model.replicas.length === 0 && least === 0 ? "None runs: the next request starts one. " : "";
    this.#note.textContent = none + scaling(least, most);
  }

  /** Rows stay as long as their replicas do: nothing jumps, and what is selected stays so. */
  #showReplicas(replicas, isTold) {
    const ids = new Set(replicas.map((replica) => replica.replica_id));
    for (const [id, row] of this.#views) {
      if (ids.has(id)) continue;
      row.root.remove();
      this.#views.delete(id);
    }
    for (const replica of replicas) {
      if (!this.#views.has(replica.replica_id)) {
        const row = new ReplicaRow(replica.replica_id);
        this.#views.set(replica.replica_id, row);
        this.#rows.append(row.root);
      }
      this.#views.get(replica.replica_id).show(replica, isTold);
    }
  }
}

/** A number with a name and a history. */
class Figure {
  #value = element("dd", {}, "–");

  constructor(name, explanation, most = null) {
    this.line = new Sparkline(most);
    this.root = element("dl.figure", { title: explanation }, element("dt", {}, name), this.#value, this.line.root);
  }

  show(value, text = String(value)) {
    this.#value.textContent = text;
    this.line.add(value);
  }
}

class ReplicaRow {
  #state = element("td", { "data-name": "State" });
  #running = element("td", { "data-name": "Running" });
  #waiting = element("td", { "data-name": "Waiting" });
  #bar = element("meter", { min: 0, max: 1, "aria-hidden": "true" });
  #kvText = element("span");
  #step = element("td", { "data-name": "Step" });
  #prefill = element("td", { "data-name": "Prefill" });
  #age = element("td", { "data-name": "Last report" });

  constructor(id) {
    this.root = element(
      "tr",
      {},
      element("th", { scope: "row" }, element("code", {}, id)),
      this.#state,
      this.#running,
      this.#waiting,
      element("td.kv", { "data-name": "KV in use" }, this.#kvText, this.#bar),
      this.#step,
      this.#prefill,
      this.#age,
    );
  }

  show({ state, age_s: age, load }, isTold) {
    this.#state.textContent = state?.toLowerCase() ?? (isTold ? "gone" : "not known");
    this.root.classList.toggle("silent", age > STALE_S);
    this.root.classList.toggle("absent", load === null);
    this.#age.textContent = age === null ? "none yet" : `${age.toFixed(1)} s ago`;
    const kv = load === null ? 0 : 1 - load.num_free_blocks / load.num_blocks;
    this.#running.textContent = load?.num_running ?? "–";
    this.#waiting.textContent = load?.num_waiting ?? "–";
    this.#bar.value = kv;
    this.#kvText.textContent = load === null ? "–" : percent(kv);
    this.#step.textContent = load === null ? "–" : `${(load.step_s * 1000).toFixed(1)} ms`;
    this.#prefill.textContent = load === null ? "–" : rate(load.prefill_tokens_per_s);
  }
}

function scaling(least, most) {
  if (most === null) return "";
  if (least === most) return `The number of replicas is fixed at ${most}.`;
  return `The autoscaler keeps ${least} to ${most} replicas.`;
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function rate(value) {
  return value ? `${Math.round(value).toLocaleString("en")} tok/s` : "–";
}
