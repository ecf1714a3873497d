// Server-sent events over fetch, which unlike EventSource can send a body and a key.

/**
 * The events of a response, as {event, data}.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { event: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line === "") {
          if (event.data.length) yield { event: event.event, data: event.data.join("\n") };
          event = { event: "message", data: [] };
        } else if (line.startsWith("data:")) {
          event.data.push(line.slice(5).replace(/^ /, ""));
        } else if (line.startsWith("event:")) {
          event.event = line.slice(6).trim();
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // it has failed already, or was aborted: there is nothing left to cancel
  }
}
