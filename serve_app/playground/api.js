// The service's API. All paths are relative: the page works behind a prefix too.

import { events } from "./sse.js";

const KEY = "api-key";

/** What the server said no with, or that it could not be reached. */
export class ApiError extends Error {
  /**
   * @param {string} message for the user.
   * @param {number} status 0 if there was no answer.
   * @param {string|null} code the error's code, if it has one.
   * @param {number|null} retryAfter seconds after which to try again.
   */
  constructor(message, status = 0, code = null, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** The API key: in this tab's session only. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** GET a JSON document. */
export async function getJson(path) {
  return (await answer(path, { cache: "no-store" })).json();
}

/**
 * Start a chat completion.
 * @returns {Promise<{queueSeconds: number|null, chunks: AsyncGenerator<Object>}>}
 */
export async function startChat(body, signal) {
  const response = await answer("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  return { queueSeconds: queueSeconds(response), chunks: chunks(response) };
}

async function* chunks(response) {
  for await (const { event, data } of events(response.body)) {
    if (data === "[DONE]") return;
    const found = JSON.parse(data);
    if (event === "error" || found.error) throw new ApiError(found.error.message, 200, found.error.code);
    yield found;
  }
  throw new ApiError("The stream broke off before its end. What had come is above.");
}

async function answer(path, options) {
  const headers = new Headers(options.headers);
  if (apiKey.get()) headers.set("Authorization", `Bearer ${apiKey.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.");
  }
  if (!response.ok) throw await asError(response);
  return response;
}

async function asError(response) {
  const retryAfter = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy's answer: it has a status and no JSON.
  }
  const message = error.message ?? `The server answered ${response.status} ${response.statusText}.`;
  return new ApiError(message, response.status, error.code ?? null, Number.isNaN(retryAfter) ? null : retryAfter);
}

/** How long the request waited in the engine: the `queue` of the Server-Timing header. */
function queueSeconds(response) {
  const found = /(?:^|,)\s*queue;dur=([\d.]+)/.exec(response.headers.get("Server-Timing") ?? "");
  return found ? Number(found[1]) / 1000 : null;
}
