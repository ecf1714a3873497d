// Markdown → elements, block by block. What a model writes is hostile: HTML in it stays text, see inline.js.

import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";

const MOST_NESTED = 8;
// None of these can match in two ways: a line that almost matches costs no more than its length.
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const TABLE_RULE = /^:?-+:?$/;

/**
 * Show a Markdown text in an element. A text that goes on as the last one did changes only its last blocks, so that a
 * stream costs little and a selection further up stays.
 */
export function showMarkdown(target, source) {
  const blocks = split(source);
  const shown = target.shownBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && shown[same] === blocks[same]) same++;
  while (target.children.length > same) target.lastElementChild.remove();
  target.append(...blocks.slice(same).map((block) => render(block, 0)));
  target.shownBlocks = blocks;
}

/** The blocks of a text, each a text of its own. */
function split(source) {
  const lines = source.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let start = 0;
  while (start < lines.length) {
    if (!lines[start].trim()) {
      start++;
      continue;
    }
    const end = blockEnd(lines, start);
    blocks.push(lines.slice(start, end).join("\n"));
    start = end;
  }
  return blocks;
}

/** The line after the block that begins at a line. */
function blockEnd(lines, start) {
  const fence = FENCE.exec(lines[start]);
  if (fence) {
    let closing = start + 1;
    while (closing < lines.length && !isFenceEnd(lines[closing], fence[1])) closing++;
    return Math.min(closing + 1, lines.length);
  }
  if (HEADING.test(lines[start]) || RULE.test(lines[start])) return start + 1;
  let end = start + 1;
  if (QUOTE.test(lines[start])) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return end;
  }
  if (ITEM.test(lines[start])) return listEnd(lines, start);
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end])) end++;
  return end;
}

/** A list goes on over empty lines, as long as items or indented lines follow. */
function listEnd(lines, start) {
  let end = start + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (line.trim()) {
      const afterGap = !lines[end - 1].trim();
      if (!ITEM.test(line) && !/^ {2,}|^\t/.test(line) && (afterGap || beginsBlock(line))) break;
    }
    end++;
  }
  while (!lines[end - 1].trim()) end--;
  return end;
}

function isFenceEnd(line, marker) {
  const trimmed = line.trim();
  return trimmed.length >= marker.length && trimmed === marker[0].repeat(trimmed.length);
}

function beginsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function render(block, depth) {
  const lines = block.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return codeBlock(lines, fence);
  const heading = HEADING.exec(lines[0]);
  // The page's own headings are above those of an answer.
  if (heading) {
    return element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2].trim().replace(/ #+$/, "")));
  }
  if (RULE.test(lines[0])) return element("hr");
  if (depth < MOST_NESTED && QUOTE.test(lines[0])) {
    return element("blockquote", {}, ...children(lines.map((line) => line.replace(QUOTE, "")), depth));
  }
  if (depth < MOST_NESTED && ITEM.test(lines[0])) return list(lines, depth);
  if (lines.length > 1 && lines[0].includes("|") && cells(lines[1]).every((cell) => TABLE_RULE.test(cell))) {
    return table(lines);
  }
  return element("p", {}, ...inline(lines.map((line) => line.trimStart()).join("\n")));
}

function children(lines, depth) {
  return split(lines.join("\n")).map((block) => render(block, depth + 1));
}

function codeBlock(lines, [, marker, info]) {
  const language = info.trim().split(/\s/, 1)[0].slice(0, 40);
  const isClosed = lines.length > 1 && isFenceEnd(lines.at(-1), marker);
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  return element(
    "figure.code-block",
    {},
    element("figcaption", {}, element("span", {}, language || "text"), copyButton(() => text)),
    element("pre", { tabIndex: 0 }, element("code", {}, text)),
  );
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const isOrdered = /\d/.test(mark);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) {
      items.push({ width: found[0].length, lines: [line.slice(found[0].length)] });
    } else {
      const { width, lines: own } = items.at(-1);
      own.push(line.slice(Math.min(width, line.search(/\S|$/))));
    }
  }
  const isLoose = lines.some((line) => !line.trim());
  const made = items.map((item) => {
    const blocks = children(item.lines, depth);
    // An item of a tight list is its text, without a paragraph around.
    const isTight = !isLoose && blocks[0]?.tagName === "P";
    return element("li", {}, ...(isTight ? [...blocks[0].childNodes, ...blocks.slice(1)] : blocks));
  });
  const properties = isOrdered ? { start: Number.parseInt(mark, 10) } : {};
  return element(isOrdered ? "ol" : "ul", properties, ...made);
}

function table(lines) {
  const alignments = cells(lines[1]).map((rule) => {
    if (rule.endsWith(":")) return rule.startsWith(":") ? "centre" : "end";
    return "start";
  });
  const row = (line, name) =>
    element(
      "tr",
      {},
      ...cells(line)
        .slice(0, alignments.length)
        .map((cell, index) => element(`${name}.${alignments[index]}`, {}, ...inline(cell))),
    );
  return element(
    "div.table",
    { tabIndex: 0, role: "region", "aria-label": "Table" },
    element(
      "table",
      {},
      element("thead", {}, row(lines[0], "th")),
      element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td"))),
    ),
  );
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return trimmed.split("|").map((cell) => cell.trim());
}
