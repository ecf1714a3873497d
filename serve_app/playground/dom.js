// Building elements. Text is only ever set as text: no string becomes markup anywhere in this page.

/**
 * An element.
 * @param {string} tag its name, and its classes after dots: "p.help".
 * @param {Object} properties set on it; those with a dash, and `role`, as attributes; `on…` as listeners.
 * @param {...(Node|string|null|undefined|false)} children nothing is made of null, undefined and false.
 */
export function element(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** An SVG element with attributes. */
export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The element of an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A button that copies what `text()` gives, and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = element("button.quiet", { type: "button", onclick: () => copy(button, text()) }, label);
  return button;
}

/** Copy a text, and let the button that was pressed say how that went. */
export async function copy(button, text) {
  const label = button.dataset.label ?? button.textContent;
  button.dataset.label = label;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Pages that were not loaded over HTTPS or from this machine have no clipboard.
    button.textContent = copyBySelection(text) ? "Copied" : "Not allowed here";
  }
  setTimeout(() => (button.textContent = label), 1500);
}

function copyBySelection(text) {
  const field = element("textarea.hidden", { value: text });
  const dialog = document.querySelector("dialog[open]");
  (dialog ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

let lastAnnouncement = 0;

/** Say something to those who do not see the page. */
export function announce(text) {
  // A text that is the same as before is not read again, so it is emptied first.
  byId("announcer").textContent = "";
  clearTimeout(lastAnnouncement);
  lastAnnouncement = setTimeout(() => (byId("announcer").textContent = text), 50);
}
