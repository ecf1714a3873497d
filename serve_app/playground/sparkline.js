// A small line of the last values. The number beside it says the same to those who do not see it.

import { svg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;
const MOST_VALUES = 120;

/** @param {number|null} most the top of the scale; null: the largest value shown. */
export class Sparkline {
  #values = [];
  #line = svg("polyline", { class: "line" });
  #area = svg("polygon", { class: "area" });

  constructor(most = null) {
    this.most = most;
    const viewBox = `0 0 ${WIDTH} ${HEIGHT}`;
    const attributes = { viewBox, preserveAspectRatio: "none", class: "sparkline", "aria-hidden": "true" };
    this.root = svg("svg", attributes, this.#area, this.#line);
  }

  add(value) {
    this.#values.push(value);
    if (this.#values.length > MOST_VALUES) this.#values.shift();
    const top = this.most ?? Math.max(1, ...this.#values);
    const first = MOST_VALUES - this.#values.length; // the newest is at the right from the start on
    const points = this.#values.map((each, index) => {
      const x = ((first + index) / (MOST_VALUES - 1)) * WIDTH;
      const y = HEIGHT - 1.5 - (each / top) * (HEIGHT - 3);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    const left = ((first / (MOST_VALUES - 1)) * WIDTH).toFixed(1);
    this.#line.setAttribute("points", points.join(" "));
    this.#area.setAttribute("points", `${left},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`);
  }
}
