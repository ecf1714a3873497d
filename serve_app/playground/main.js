// Puts the page together: the bar, the two views, the settings.

import { ApiError, apiKey, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { byId, element } from "./dom.js";
import { Fleet } from "./fleet.js";
import { prepareRequestDialog } from "./request_dialog.js";
import { Settings } from "./settings.js";

const RETRY_MS = 2000;
const THEMES = ["auto", "light", "dark"];

const isNarrow = matchMedia("(max-width: 40rem)"); // as in the style sheets

let models = [];
let noModel = "There is no model yet.";
let wanted = ""; // what the user chose, also while there is no list, as without a key

const settings = new Settings(() => loadModels());
const fleet = new Fleet();
const chat = new Chat(
  settings,
  {
    name: () => chosen()?.id ?? "",
    whyNone: () => noModel,
    maxLength: (name) => models.find(({ id }) => id === name)?.max_model_len ?? 0,
  },
  askForKey,
);

function chosen() {
  return models.find((model) => model.id === byId("model").value);
}

async function loadModels() {
  try {
    models = (await getJson("v1/models")).data;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    const isKey = error.status === 401;
    models = [];
    noModel = isKey ? "The server wants an API key; it goes into the settings." : "There is no model yet.";
    byId("model").disabled = true;
    byId("model").replaceChildren(element("option", { value: "" }, isKey ? "needs a key" : "no model yet"));
    if (isKey) askForKey(error.message);
    else setTimeout(loadModels, (error.retryAfter ?? 0) * 1000 || RETRY_MS);
    return;
  }
  byId("api-key-fault").textContent = "";
  byId("model").replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
  if (models.some((model) => model.id === wanted)) byId("model").value = wanted;
  byId("model").disabled = models.length < 2;
  settings.showDefaults(chosen()?.default_sampling_params);
}

function askForKey(message) {
  // A first visit has no key that could be wrong.
  const fault = apiKey.get() ? `The server does not take this key: ${message}` : "The server wants a key.";
  byId("api-key-fault").textContent = fault;
  showSettings(true);
  byId("api-key").focus();
}

function showSettings(isShown) {
  byId("settings").hidden = !isShown;
  setCovered();
  byId("toggle-settings").setAttribute("aria-expanded", String(isShown));
}

/** Where the settings cover everything else, the focus must not go there. */
function setCovered() {
  const isCovered = isNarrow.matches && !byId("settings").hidden;
  for (const each of document.querySelectorAll("header, main, .skip")) each.inert = isCovered;
}

function showView(name) {
  for (const view of ["chat", "fleet"]) {
    byId(view).hidden = view !== name;
    byId(`show-${view}`).setAttribute("aria-pressed", String(view === name));
  }
  fleet.watch(name === "fleet");
}

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  byId("theme").textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  byId("theme").setAttribute("aria-label", `Colours: ${theme}`);
  byId("theme").title = "Colours: as the system has them, light, or dark";
}

function nextTheme() {
  const root = document.documentElement;
  const theme = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  showTheme();
}

byId("model").addEventListener("change", () => {
  wanted = byId("model").value;
  settings.showDefaults(chosen()?.default_sampling_params);
});
byId("show-chat").addEventListener("click", () => showView("chat"));
byId("show-fleet").addEventListener("click", () => showView("fleet"));
byId("theme").addEventListener("click", nextTheme);
isNarrow.addEventListener("change", setCovered);
byId("toggle-settings").addEventListener("click", () => {
  const isShown = byId("settings").hidden;
  showSettings(isShown);
  if (isShown) byId("close-settings").focus();
});
byId("close-settings").addEventListener("click", () => {
  showSettings(false);
  byId("toggle-settings").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (chat.stop() || byId("settings").hidden) return;
  showSettings(false);
  byId("toggle-settings").focus();
});

prepareRequestDialog();
showTheme();
settings.showDefaults();
loadModels();
// On a phone that would open the keyboard.
if (matchMedia("(pointer: fine)").matches) byId("prompt").focus();
