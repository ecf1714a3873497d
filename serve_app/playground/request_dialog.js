// "View as code": the request of an answer, for a terminal and for a program.

import { byId, copy } from "./dom.js";
import { asCurl, asPython } from "./request_code.js";

const LANGUAGES = { "as-curl": asCurl, "as-python": asPython };

let shown = null;
let language = "as-curl";

/** Show a request's body as code. */
export function showRequest(body) {
  shown = body;
  write();
  byId("request").showModal();
}

/** Let the dialog's buttons work. */
export function prepareRequestDialog() {
  for (const id of Object.keys(LANGUAGES)) {
    byId(id).addEventListener("click", () => {
      language = id;
      write();
    });
  }
  byId("copy-request").addEventListener("click", () => copy(byId("copy-request"), byId("request-code").textContent));
  byId("close-request").addEventListener("click", () => byId("request").close());
  byId("request").addEventListener("click", (event) => {
    if (event.target === byId("request")) byId("request").close(); // beside it
  });
}

function write() {
  for (const id of Object.keys(LANGUAGES)) byId(id).setAttribute("aria-pressed", String(id === language));
  byId("request-code").textContent = LANGUAGES[language](shown, new URL("./", location.href).href);
}
