// Asks the server that gave this page. No failure is silent: it is announced, and stands where the person looked.
import { announce, make } from "viscircuits/words.js";

export const served = Boolean(JSON.parse(document.getElementById("server")?.textContent || "null")?.served);
export const HOW_TO_SERVE = "viscircuits view DIR --serve";

const running = new Map();  // topic → AbortController of the newest request

/** The answer as JSON (or as `read` reads it), or null if it failed, was called off, or a newer one of its topic came. */
export async function ask(path, { topic = null, into = null, read = (response) => response.json(), ...rest } = {}) {
  const turn = begin(topic);
  try {
    const answer = await read(await send(path, rest, turn.signal));
    return turn.signal.aborted ? null : cleared(into, answer);
  } catch (fault) {
    return turn.signal.aborted ? null : report(fault, into);
  } finally { end(topic, turn); }
}

/** Each line of a streamed answer goes to `onLine`; gives the last one, or null if it failed or was called off. */
export async function follow(path, onLine, { topic, into = null, ...rest }) {
  const turn = begin(topic);
  let last = null;
  try {
    const response = await send(path, rest, turn.signal);
    for await (const line of linesOf(response.body)) {
      last = JSON.parse(line);
      if (last.error) throw new Error(last.error);
      onLine(last);
    }
    return turn.signal.aborted ? null : cleared(into, last);
  } catch (fault) {
    return turn.signal.aborted ? null : report(fault, into);
  } finally { end(topic, turn); }
}

/** Calls off what is under way about a topic; the server stops working on it. */
export function stop(topic) {
  running.get(topic)?.abort();
  running.delete(topic);
}

/** Says what went wrong, aloud and in the element; gives null. */
export function report(fault, into) {
  const text = fault.message || String(fault);
  announce(text);
  if (into) {
    clear(into);
    into.prepend(make("p", { class: "fault" }, text));
  }
  return null;
}

function begin(topic) {
  if (topic) stop(topic);
  const turn = new AbortController();
  if (topic) running.set(topic, turn);
  return turn;
}
function end(topic, turn) {
  if (running.get(topic) === turn) running.delete(topic);
}

async function send(path, { json, body = json === undefined ? undefined : JSON.stringify(json), method = body === undefined ? "GET" : "POST", headers = {} }, signal) {
  const kind = json === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { method, body, signal, headers: { "X-Viscircuits": "1", ...kind, ...headers }, credentials: "same-origin", cache: "no-store" });
  } catch (fault) {
    if (signal.aborted) throw fault;
    throw new Error(`The server does not answer. Is “${HOW_TO_SERVE}” still running? Nothing was changed.`);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Error(said?.error ?? `The server refused with status ${response.status} and gave no reason. Nothing was changed.`);
}

async function* linesOf(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = done ? "" : lines.pop();
      yield* lines.filter((line) => line.trim());
      if (done) return;
    }
  } finally { reader.cancel().catch(() => {}); }  // leaving early closes the connection, which stops the work
}

function clear(into) { into.querySelectorAll(":scope > .fault").forEach((old) => old.remove()); }
function cleared(into, answer) {
  if (into) clear(into);
  return answer;
}
