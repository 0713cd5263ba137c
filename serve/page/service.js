// Calls to the service: bearer token, problems, server-sent events.

import { element } from "./element.js";

/** POST with a body, else GET. Throws an Error whose message is one line for the reader. */
export async function call(path, body, signal) {
  const response = await authorised(path, {
    signal,
    method: body ? "POST" : "GET",
    headers: body ? { "content-type": "application/json" } : {},
    body: body && JSON.stringify(body),
  });
  if (!response.ok) throw new Error(await problemOf(response));
  return response;
}

async function authorised(path, options) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = token ? { ...options.headers, authorization: `Bearer ${token}` } : options.headers;
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw options.signal?.aborted ? error : new Error("The service cannot be reached.");
    });
    if (response.status !== 401) return response;
    // Another request may have asked meanwhile.
    if (token === sessionStorage.getItem("token")) await askForToken(token !== null);
  }
}

let asking = null;

function askForToken(refused) {
  asking ??= new Promise((resolve, reject) => {
    const title = "The service asks for a token";
    const token = element("input", { type: "password", autocomplete: "off" });
    const dialog = element("dialog", { ariaLabel: title }, element("form", { method: "dialog" },
      element("h2", {}, title),
      element("p", { className: "refused" }, refused ? "The token was refused." : ""),
      element("label", {}, "Bearer token", token),
      element("p", { className: "note" }, "Kept until this tab is closed, and nowhere else."),
      element("div", { className: "bar" },
        element("button", { className: "primary", value: "send" }, "Continue"),
        element("button", { value: "cancel" }, "Cancel"))));
    dialog.addEventListener("close", () => {
      asking = null;
      dialog.remove();
      if (dialog.returnValue !== "send") return reject(new Error("The service asks for a bearer token."));
      sessionStorage.setItem("token", token.value.trim());
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
    token.focus();
  });
  return asking;
}

/** What a failed response says, in one line. */
export async function problemOf(response) {
  const problem = await response.json().catch(() => null);
  const line = problem?.title ? sentence(problem) : `The service answered ${response.status}.`;
  const wait = Number(response.headers.get("retry-after"));
  return wait ? `${line.replace(/\.$/, "")}; try again in ${wait} s.` : line;
}

/** A problem document (RFC 9457) in one line. */
export function sentence({ title, detail }) {
  return detail ? `${title}: ${detail}` : title;
}

/** Yields {event, data} of a server-sent stream, however its bytes are cut into chunks. */
export async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (pending + value).split(/\r\n\r\n|\n\n|\r\r/);
      pending = blocks.pop();
      for (const block of blocks) {
        const { event, data } = fieldsOf(block);
        if (data.length) yield { event: event.at(-1), data: JSON.parse(data.join("\n")) };
      }
    }
  } finally {
    reader.cancel().catch(() => null); // of a stream that broke there is nothing left to cancel
  }
}

function fieldsOf(block) {
  const fields = { event: [], data: [] };
  for (const line of block.split(/\r\n|\n|\r/)) {
    const [, name, content] = line.match(/^([^:]*):? ?(.*)$/s);
    if (Object.hasOwn(fields, name)) fields[name].push(content);
  }
  return fields;
}
