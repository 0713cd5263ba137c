// The page of the service. Whatever the service sends enters as text, never as markup.

import { combobox } from "./combobox.js";
import { element } from "./element.js";
import { call, problemOf, sentence, serverSentEvents } from "./service.js";

const $ = (id) => document.getElementById(id);

const FALLBACKS = {
  timeout: "The reasoning took too long, so the history alone decided.",
  reasoner_unavailable: "The language model could not be reached, so the history alone decided.",
  no_history: "There is no history to go by: these are the popular items.",
};

const state = {
  user: null, // id of the picked user
  edited: false, // the picked user's history was changed by hand
  history: [], // of Item, the newest last
  answers: {}, // "reasoned", "plain" → RecommendResponse, of one and the same question
  question: "", // whom and how many the answers are for
  running: null, // AbortController of the latest request
};
const known = new Map(); // item_id → Item, of whatever a search has shown

async function search(path, text, signal) {
  const response = await call(`${path}?${new URLSearchParams({ q: text, limit: 20 })}`, undefined, signal);
  return response.json();
}

async function findItems(text, signal) {
  return remember((await search("v1/items", text, signal)).items);
}

async function findUsers(text, signal) {
  const { users } = await search("v1/users", text, signal);
  for (const user of users) remember(user.history);
  return users;
}

function remember(items) {
  for (const item of items) known.set(item.item_id, item);
  return items;
}

// ---- The question: user, history, options -----------------------------------------------------

/** Feedback of whoever picked no user goes to a random id that stays in this browser. */
function visitor() {
  let id = localStorage.getItem("visitor");
  if (!id) {
    // Not `randomUUID`, which plain HTTP lacks.
    const bytes = crypto.getRandomValues(new Uint8Array(6));
    id = `visitor-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
    localStorage.setItem("visitor", id);
  }
  return id;
}

const nameOf = (item) => item.title || item.item_id;
const attributesOf = (item) => Object.entries(item.attributes ?? {})
  .map(([name, value]) => `${name}: ${value}`).join(" · ");
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const rowOf = (template) => $(template).content.firstElementChild.cloneNode(true);

function setQuestion(user, history, edited) {
  Object.assign(state, { user, history, edited });
  const rows = history.map((item) => {
    const row = rowOf("history-row");
    row.querySelector(".name").textContent = nameOf(item);
    row.title = attributesOf(item);
    for (const button of row.querySelectorAll("button")) {
      const what = button.name === "remove" ? "Remove" : "Move";
      const where = button.name === "remove" ? "" : ` ${button.name}`;
      button.setAttribute("aria-label", `${what} ${nameOf(item)}${where}`);
    }
    return row;
  });
  $("history").replaceChildren(...rows);
  $("who").textContent = user
    ? `User ${user}. Feedback is stored for this user.`
    : `No user picked: feedback is stored for ${visitor()}, a random id kept in this browser.`;
  const sent = user && edited ? " Changed by hand, so it is sent instead of the user’s id." : "";
  const shown = `${count(history.length, "item")} shown, the newest last.${sent}`;
  $("history-note").textContent = history.length ? shown : "";
  $("clear").hidden = !user && !history.length;
}

function showNewest() {
  $("history").scrollTop = $("history").scrollHeight;
}

function pickUser(user) {
  setQuestion(user.user_id, user.history, false);
  showNewest();
}

function addItem(item) {
  setQuestion(state.user, [...state.history, item], true);
  showNewest();
}

function editHistory(button) {
  const index = [...$("history").children].indexOf(button.closest("li"));
  const step = { earlier: -1, later: 1 }[button.name];
  const history = [...state.history];
  const [item] = history.splice(index, 1);
  const place = Math.max(0, Math.min(index + (step ?? 0), history.length));
  if (step) history.splice(place, 0, item);
  setQuestion(state.user, history, true);
  const row = $("history").children[place] ?? $("history").lastElementChild;
  (row?.querySelector(`[name=${button.name}]`) ?? $("item-search")).focus();
}

// ---- The answer -------------------------------------------------------------------------------

async function recommend() {
  state.running?.abort();
  const running = (state.running = new AbortController());
  const reason = $("reason").checked;
  const whom = state.user && !state.edited
    ? { user_id: state.user }
    : { history: state.history.map((item) => item.item_id) };
  const body = { ...whom, k: $("k").valueAsNumber, reason, stream: reason };
  begin(JSON.stringify([whom, body.k]), reason);
  try {
    const response = await call("v1/recommend", body, running.signal);
    finish(reason, reason ? await follow(response.body, running.signal) : await response.json());
  } catch (error) {
    if (state.running !== running) return;
    if (running.signal.aborted) $("status").textContent = "Stopped.";
    else fail(error);
    if (reason) {
      $("reasoning").hidden = !$("cot").textContent;
      $("reasoning-note").textContent = "Cut off before the end; no answer rests on it.";
    }
  } finally {
    if (state.running === running) rest();
  }
}

/** Writes the reasoning while it comes; returns the RecommendResponse at the end of it. */
async function follow(body, signal) {
  let text = "";
  for await (const { event, data } of serverSentEvents(body)) {
    signal.throwIfAborted();
    if (event === "token") writeReasoning(pieces((text += data.text)));
    else if (event === "result") return data;
    else if (event === "error") throw new Error(sentence(data));
  }
  throw new Error("The connection ended before the recommendations came.");
}

function begin(question, reason) {
  if (question !== state.question) state.answers = {};
  state.question = question;
  delete state.answers[reason ? "reasoned" : "plain"];
  compare();
  $("error").hidden = $("welcome").hidden = true;
  $("stop").hidden = false;
  $("reasoning").hidden = !reason && !state.answers.reasoned;
  if (reason) {
    writeReasoning({ cot: "", answer: "" });
    $("reasoning-note").textContent = "";
    $("reasoning").classList.add("writing");
  }
  $("status").textContent = reason ? "Reasoning …" : "Ranking …";
  if (matchMedia("(max-width: 56rem)").matches) $("answers").scrollIntoView();
}

function finish(reason, result) {
  const mode = reason ? "reasoned" : "plain";
  state.answers[mode] = result;
  if (reason && result.cot !== null) writeReasoning({ cot: result.cot, answer: result.answer ?? "" });
  else if (reason) $("reasoning-note").textContent = "No finished reasoning took part in this answer.";
  const notices = [result.fallback && (FALLBACKS[result.fallback] ?? result.fallback), ...result.warnings];
  const panel = $(mode);
  panel.querySelector(".notices").replaceChildren(
    ...notices.filter(Boolean).map((notice) => element("li", {}, notice)),
  );
  panel.querySelector(".items").replaceChildren(...result.items.map(itemRow(result.items)));
  panel.querySelector(".items + .note").textContent = provenance(result);
  compare();
  $("status").textContent = `${count(result.items.length, "recommendation")}.`;
}

function rest() {
  if (document.activeElement === $("stop")) $("recommend").focus();
  $("stop").hidden = true;
  $("reasoning").classList.remove("writing");
}

function fail(error) {
  $("status").textContent = "";
  $("error").textContent = error.message;
  $("error").hidden = false;
}

/** Thought and answer of a completion that may still be growing, even inside a tag. */
function pieces(text) {
  const [thought, answer = ""] = text.replace(/<\/?[a-z]*$/, "").split("<answer>");
  return { cot: thought.replace(/<\/?think>/g, "").trimStart(), answer: answer.split("</answer>")[0].trimStart() };
}

/** Appends, where it can, so that a screen reader hears only what is new. */
function writeReasoning(parts) {
  for (const [id, text] of Object.entries(parts)) {
    const written = $(id).textContent;
    if (text.startsWith(written)) $(id).append(text.slice(written.length));
    else $(id).textContent = text;
  }
}

function provenance({ version, timings_ms: { reason, retrieve, total } }) {
  const time = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);
  const steps = [reason && `reasoned for ${time(reason)}`, retrieve && `ranked in ${time(retrieve)}`];
  const took = [...steps.filter(Boolean), total && `${time(total)} in all`].filter(Boolean).join(", ");
  return `Model version ${version}${took && `: ${took}`}. Bars compare the scores within this list.`;
}

function itemRow(items) {
  const scores = items.map((item) => item.score);
  const [high, low] = [Math.max(...scores), Math.min(...scores)];
  const format = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
  return (item) => {
    const row = rowOf("item-row");
    row.dataset.item = item.item_id;
    row.querySelector("b").textContent = nameOf(item);
    row.querySelector(".attributes").textContent = attributesOf({ ...known.get(item.item_id), ...item });
    row.querySelector(".score span").textContent = format.format(item.score);
    // Even the last item keeps a stump of a bar.
    const bounds = { min: low - 0.08 * (high - low || 1), max: high, value: item.score, ariaLabel: "Score" };
    Object.assign(row.querySelector("meter"), bounds);
    for (const button of row.querySelectorAll("button")) {
      button.setAttribute("aria-label", `${button.name === "like" ? "Like" : "Dislike"} ${nameOf(item)}`);
      button.addEventListener("click", () => vote(item, button.name));
    }
    return row;
  };
}

function rowsOf(item) {
  return [...document.querySelectorAll(".items > li")].filter((row) => row.dataset.item === item.item_id);
}

async function vote(item, event) {
  const user = state.user ?? visitor();
  try {
    await call("v1/feedback", { user_id: user, item_id: item.item_id, event });
  } catch (error) {
    return fail(error);
  }
  // The user's stored history has grown: what is asked next is another question.
  if (state.user) state.question = "";
  const stored = `Stored: ${event} by ${user}.`;
  $("error").hidden = true;
  $("status").textContent = `${nameOf(item)}: ${stored}`;
  for (const row of rowsOf(item)) {
    for (const button of row.querySelectorAll("button")) button.setAttribute("aria-pressed", button.name === event);
    row.querySelector(".stored").textContent = stored;
  }
}

/** Marks what the reasoning changed, once both lists are there. */
function compare() {
  const { reasoned, plain } = state.answers;
  const ranks = (answer) => new Map(answer?.items.map((item, i) => [item.item_id, i]));
  const [before, after] = [ranks(plain), ranks(reasoned)];
  const tally = { new: 0, gone: 0, up: 0, down: 0, same: 0 };
  const mark = (row, kind, words) => {
    Object.assign(row.querySelector(".mark"), { textContent: words, className: `mark ${kind}` });
    tally[kind] += 1;
  };
  $("reasoned").hidden = !reasoned;
  $("plain").hidden = !plain;
  $("changes").hidden = !(reasoned && plain);
  $("panels").classList.toggle("both", Boolean(reasoned && plain));
  if (!(reasoned && plain)) return document.querySelectorAll(".mark").forEach((span) => span.replaceChildren());

  for (const row of $("reasoned").querySelectorAll(".items > li")) {
    const rise = before.get(row.dataset.item) - after.get(row.dataset.item);
    if (Number.isNaN(rise)) mark(row, "new", "new");
    else if (rise) mark(row, rise > 0 ? "up" : "down", `${rise > 0 ? "up" : "down"} ${Math.abs(rise)}`);
    else mark(row, "same", "same");
  }
  for (const row of $("plain").querySelectorAll(".items > li")) {
    if (!after.has(row.dataset.item)) mark(row, "gone", "drops out");
  }
  $("changes").textContent = `What the reasoning changed: ${tally.new} new, ${tally.gone} dropped out, `
    + `${tally.up} up, ${tally.down} down, ${tally.same} the same.`
    + (reasoned.version === plain.version ? "" : " The two lists are also of different model versions.");
}

// ---- Start ------------------------------------------------------------------------------------

async function checkService() {
  const response = await fetch("readyz").catch(() => null);
  if (response?.ok) {
    const { version, items } = await response.json();
    $("service").textContent = `Ready: model version ${version}, ${count(items, "item")}`;
  } else {
    $("service").textContent = response ? await problemOf(response) : "The service cannot be reached.";
    setTimeout(checkService, 5000);
  }
  $("service").classList.toggle("ready", Boolean(response?.ok));
}

combobox($("user-search"), {
  find: findUsers,
  label: ({ user_id, history }) => [user_id, history.length ? `last: ${nameOf(history.at(-1))}` : "no history"],
  choose: pickUser,
  fail,
});
combobox($("item-search"), {
  find: findItems,
  label: (item) => [nameOf(item), attributesOf(item)],
  choose: addItem,
  fail,
});
$("history").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button) editHistory(button);
});
$("clear").addEventListener("click", () => {
  setQuestion(null, [], false);
  $("user-search").focus();
});
$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  recommend();
});
$("stop").addEventListener("click", () => state.running?.abort());
setQuestion(null, [], false);
checkService();
