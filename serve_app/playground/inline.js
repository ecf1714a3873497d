// Markdown inside a line → nodes. Every piece of the source ends up as text; only these elements are ever made:
// strong, em, del, code, br, and links to http, https and mailto.

import { element } from "./dom.js";

const MOST_NESTED = 6;
const ESCAPED = /\\([\\`*_{}\[\]()#+\-.!~|<>])/y;
// Bounded, and without anything that could match in two ways: model output must not be able to stall the page.
const LINK = /!?\[([^\[\]]{0,500})\]\(<?([^\s()<>]{1,2000})>?(?:\s"[^"]{0,200}")?\)/y;
const ADDRESS = /<?(https?:\/\/[^\s<>"'`]{1,2000})>?/y;
const SPECIAL = /[\\`*_~!\[<h\n]/g;
const MARKERS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

/** The nodes of a line or paragraph. */
export function inline(source, depth = 0) {
  const nodes = [];
  const unclosed = new Set();
  let text = "";
  let position = 0;

  const flush = () => {
    if (text) nodes.push(text);
    text = "";
  };

  while (position < source.length) {
    SPECIAL.lastIndex = position;
    const next = SPECIAL.exec(source)?.index ?? source.length;
    text += source.slice(position, next);
    position = next;
    if (position === source.length) break;
    const found = depth < MOST_NESTED ? special(source, position, depth, unclosed) : null;
    if (found === null) {
      text += source[position++];
    } else {
      if (typeof found.node === "string") text += found.node;
      else {
        flush();
        nodes.push(found.node);
      }
      position = found.end;
    }
  }
  flush();
  return nodes;
}

/** What begins at a special character, and where it ends; null if it stands for itself. */
function special(source, position, depth, unclosed) {
  switch (source[position]) {
    case "\n":
      return source.slice(position - 2, position) === "  " ? { node: element("br"), end: position + 1 } : null;
    case "\\": {
      const found = matchAt(ESCAPED, source, position);
      return found && { node: found[1], end: position + 2 };
    }
    case "`":
      return code(source, position, unclosed);
    case "!":
    case "[": {
      const found = matchAt(LINK, source, position);
      return found && { node: link(found[2], inline(found[1], depth + 1)), end: position + found[0].length };
    }
    case "<":
    case "h":
      return address(source, position);
    default:
      return emphasis(source, position, depth, unclosed);
  }
}

function code(source, position, unclosed) {
  const fence = /`+/y;
  fence.lastIndex = position;
  const marker = fence.exec(source)[0];
  const start = position + marker.length;
  const literal = { node: marker, end: start };
  if (unclosed.has(marker)) return literal;
  for (let end = source.indexOf(marker, start); end !== -1; end = source.indexOf(marker, end)) {
    let after = end;
    while (source[after] === "`") after++;
    if (after - end === marker.length) {
      const content = source.slice(start, end).replaceAll("\n", " ");
      const padded = content.startsWith(" ") && content.endsWith(" ") && content.trim();
      return { node: element("code", {}, padded ? content.slice(1, -1) : content), end: after };
    }
    end = after;
  }
  unclosed.add(marker);
  return literal;
}

function address(source, position) {
  const before = source[position - 1];
  const found = before && /\w/.test(before) ? null : matchAt(ADDRESS, source, position);
  if (!found) return null;
  const isBracketed = found[0].startsWith("<");
  if (isBracketed !== found[0].endsWith(">")) return null;
  // A full stop or a bracket at the end belongs to the sentence.
  let url = found[1];
  while (!isBracketed && ".,;:!?)]*_~".includes(url.at(-1))) url = url.slice(0, -1);
  return { node: link(url, [url]), end: position + (isBracketed ? found[0].length : url.length) };
}

function emphasis(source, position, depth, unclosed) {
  const marker = MARKERS.find(([mark]) => source.startsWith(mark, position));
  if (!marker) return null;
  const [mark, name] = marker;
  const start = position + mark.length;
  const literal = { node: mark, end: start };
  if (unclosed.has(mark) || /\s|^$/.test(source.charAt(start))) return literal;
  if (mark.startsWith("_") && /\w/.test(source.charAt(position - 1))) return literal; // as in snake_case
  for (let end = source.indexOf(mark, start + 1); end !== -1; end = source.indexOf(mark, end + 1)) {
    if (closes(source, mark, end)) {
      return { node: element(name, {}, ...inline(source.slice(start, end), depth + 1)), end: end + mark.length };
    }
  }
  unclosed.add(mark); // none further on either: looking once is enough
  return literal;
}

function closes(source, mark, end) {
  if (/\s/.test(source[end - 1]) || source[end - 1] === "\\") return false;
  if (mark.startsWith("_") && /\w/.test(source.charAt(end + mark.length))) return false;
  const isPartOfDouble = mark.length === 1 && (source[end + 1] === mark || source[end - 1] === mark);
  return !isPartOfDouble;
}

/** A link, or only its text if it leads anywhere but to a page or a mailbox. Images are links too: none is loaded. */
function link(url, children) {
  let parsed;
  try {
    parsed = new URL(url);
  } catch {
    return element("span", {}, ...children, ` (${url})`);
  }
  if (!["http:", "https:", "mailto:"].includes(parsed.protocol)) {
    return element("span", {}, ...children, ` (${url})`);
  }
  const label = children.length ? children : [url];
  return element("a", { href: parsed.href, target: "_blank", rel: "noopener noreferrer" }, ...label);
}

function matchAt(pattern, source, position) {
  pattern.lastIndex = position;
  return pattern.exec(source);
}
