// The playground: one conversation, its settings, and what the server does meanwhile.

import { asCurl, asPython, getJson, streamChat } from "./api.js";

const at = (id) => document.getElementById(id);
const kept = ["model", "system", "samples", "probabilities", "schema", "tools", "choice"];
let messages = []; // of the conversation, without the system prompt
let running = null; // AbortController of the answer that comes

// -- settings ---------------------------------------------------------------------------------------------

async function loadSettings() {
  const key = at("key").value;
  const [models, fields] = await Promise.all([getJson("/v1/models", key), getJson("/fields", key)]);
  at("model").replaceChildren(...models.data.map(({ id }) => new Option(id)));
  at("sampling").replaceChildren(...fields.map(control));
  for (const name of [...kept, ...fields.map((field) => field.name)]) restore(name);
}

function control(field) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const sentence = document.createElement("small");
  input.id = input.name = field.name;
  if (field.is_number) Object.assign(input, { type: "number", step: "any", min: field.low ?? "", max: field.high ?? "" });
  input.placeholder = field.default;
  sentence.textContent = field.sentence;
  label.append(field.name, input, sentence);
  return label;
}

function restore(name) {
  const element = at(name);
  const value = localStorage.getItem(`pagetide.${name}`);
  const isThere = element?.tagName !== "SELECT" || [...(element?.options ?? [])].some((one) => one.value === value);
  if (!element || value === null || !isThere) return;
  if (element.type === "checkbox") element.checked = value === "true";
  else element.value = value;
}

function remember(event) {
  const { id, type, value, checked } = event.target;
  if (id === "key") sessionStorage.setItem("pagetide.key", value);
  else if (kept.includes(id) || event.target.closest("#sampling")) localStorage.setItem(`pagetide.${id}`, type === "checkbox" ? checked : value);
}

function parsed(id, what) {
  const text = at(id).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what} is not valid JSON: ${error.message}`);
  }
}

function requestBody() {
  const system = at("system").value.trim();
  const body = {
    model: at("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const samples = Number(at("samples").value);
  if (samples > 1) body.n = samples;
  if (at("probabilities").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  for (const input of at("sampling").querySelectorAll("input")) {
    if (input.value !== "") body[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  const schema = parsed("schema", "the JSON schema");
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  const tools = parsed("tools", "the list of tools");
  if (tools) Object.assign(body, { tools, tool_choice: at("choice").value });
  return body;
}

// -- answers ----------------------------------------------------------------------------------------------

function turn(title) {
  const element = document.createElement("div");
  const heading = document.createElement("h2");
  element.className = "turn";
  heading.textContent = title;
  element.append(heading);
  at("log").append(element);
  return element;
}

function showMessage(text) {
  const card = document.createElement("div");
  card.className = "card text";
  card.textContent = text;
  turn("You").append(card);
}

// One answer: its text, token by token where probabilities are known, and their details below.
// conversation: the messages that it answers, among which it will stand.
class Card {
  constructor(parent, index, count, conversation) {
    this.text = "";
    this.calls = [];
    this.tokens = [];
    this.held = []; // tokens whose text has not come: parts of characters, or what may become a stop text
    this.chosen = -1;
    this.body = document.createElement("div");
    this.body.className = "text";
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Answer ${index + 1}; the arrow keys show what else each token could have been`);
    this.odds = document.createElement("output");
    this.odds.className = "odds";
    this.facts = document.createElement("span");
    this.facts.className = "facts";
    const element = document.createElement("div");
    element.className = "card";
    element.append(this.body, this.odds, this.facts);
    if (count > 1) element.append(this.choiceOf(index, conversation));
    parent.append(element);
    this.body.addEventListener("pointerover", (event) => this.show(this.tokens.findIndex(({ span }) => span === event.target)));
    this.body.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !this.tokens.length) return;
      event.preventDefault();
      this.show(Math.min(Math.max(this.chosen + step, 0), this.tokens.length - 1));
    });
  }

  choiceOf(index, conversation) {
    const label = document.createElement("label");
    const place = conversation.length;
    this.radio = Object.assign(document.createElement("input"), { type: "radio", name: `go-on-${place}`, checked: index === 0 });
    this.radio.addEventListener("change", () => {
      if (conversation[place]?.role === "assistant") conversation[place] = this.message();
    });
    label.className = "check";
    label.append(this.radio, " go on with this one");
    return label;
  }

  take(choice) {
    const { delta, logprobs } = choice;
    if (delta.reasoning_content) this.append(delta.reasoning_content, "thought");
    else this.held.push(...(logprobs?.content ?? []));
    if (delta.content) {
      this.text += delta.content;
      this.appendText(delta.content);
    }
    for (const call of delta.tool_calls ?? []) {
      const known = (this.calls[call.index] ??= { id: call.id, type: "function", function: { name: "", arguments: "" } });
      known.function.name += call.function.name ?? "";
      known.function.arguments += call.function.arguments ?? "";
      this.append(`${call.function.name ?? ""} ${call.function.arguments ?? ""}`);
    }
  }

  // Text, cut where its tokens are; what none of them explains belongs to the first that waits for its text.
  appendText(text) {
    let rest = text;
    let unexplained = [];
    for (const token of this.held) {
      const found = token.token ? rest.indexOf(token.token) : -1;
      if (found < 0 || (found > 0 && !unexplained.length)) {
        unexplained.push(token);
        continue;
      }
      if (found > 0) this.appendToken(rest.slice(0, found), unexplained[0]);
      unexplained = [];
      this.appendToken(token.token, token);
      rest = rest.slice(found + token.token.length);
    }
    if (rest && unexplained.length) this.appendToken(rest, unexplained[0]);
    else if (rest) this.append(rest);
    this.held = rest ? [] : unexplained;
  }

  append(text, kind = "") {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    this.body.append(span);
    return span;
  }

  appendToken(text, token) {
    const span = this.append(text, "token");
    span.style.setProperty("--doubt", (0.5 * (1 - Math.exp(token.logprob))).toFixed(2));
    this.tokens.push({ span, token });
  }

  show(index) {
    if (index < 0) return;
    this.tokens[this.chosen]?.span.classList.remove("chosen");
    this.chosen = index;
    const { span, token } = this.tokens[index];
    span.classList.add("chosen");
    const line = (one) => `${percent(one.logprob)} ${JSON.stringify(one.token)}`;
    const others = token.top_logprobs.filter((one) => one.token !== token.token);
    this.odds.textContent = [line(token), ...others.map(line)].join("\n");
  }

  message() {
    const calls = this.calls.filter(Boolean);
    return { role: "assistant", content: this.text, ...(calls.length ? { tool_calls: calls } : {}) };
  }
}

function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1).padStart(5)} %`;
}

async function answer(body) {
  const conversation = messages; // "New chat" begins another one
  const count = body.n ?? 1;
  const element = turn("Assistant");
  const answers = document.createElement("div");
  answers.className = "answers";
  element.append(answers);
  const cards = Array.from({ length: count }, (_, index) => new Card(answers, index, count, conversation));
  const mine = new AbortController();
  running = mine;
  setBusy(true);
  const begun = performance.now();
  let first = 0;
  let said = ["", false];
  try {
    await streamChat(body, at("key").value, mine.signal, (chunk) => {
      for (const choice of chunk.choices) {
        const { content, tool_calls: calls, reasoning_content: thought } = choice.delta;
        if (!first && (content || calls || thought)) first = performance.now();
        cards[choice.index].take(choice);
      }
      if (chunk.usage) showSpeed(cards, chunk.usage, begun, first);
      at("log").scrollTop = at("log").scrollHeight;
    });
  } catch (error) {
    mine.abort(); // whatever failed, nobody reads on
    said = error.name === "AbortError" ? ["Stopped.", false] : [error.message, true];
  }
  if (conversation !== messages) return;
  const message = (cards.find((card) => card.radio?.checked) ?? cards[0]).message();
  if (message.content || message.tool_calls) conversation.push(message);
  else element.remove();
  setBusy(false);
  say(...said);
}

function showSpeed(cards, usage, begun, first) {
  if (!first) return;
  const seconds = (performance.now() - first) / 1000;
  const tokens = usage.completion_tokens;
  const speed = seconds > 0.05 ? `, ${((tokens - cards.length) / seconds).toFixed(1)} tokens/s` : "";
  cards[0].facts.textContent =
    `first token after ${Math.round(first - begun)} ms${speed}, ${tokens} tokens (prompt: ${usage.prompt_tokens}, ` +
    `${usage.prompt_tokens_details.cached_tokens} of them cached)`;
}

function setBusy(isBusy) {
  at("send").disabled = isBusy;
  at("stop-answer").disabled = !isBusy;
  at("retry").disabled = isBusy;
  if (!isBusy) running = null;
}

function say(text, isError = false) {
  at("notice").textContent = text;
  at("notice").classList.toggle("error", isError);
}

// -- what the buttons do ------------------------------------------------------------------------------------

function send(event) {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (!text || running) return;
  if (messages.at(-1)?.role === "user") messages.pop(); // it was not answered, and this one takes its place
  messages.push({ role: "user", content: text });
  begin(() => {
    at("prompt").value = "";
    showMessage(text);
  }, () => messages.pop());
}

function retry() {
  if (running || !messages.length) return;
  const dropped = messages.at(-1).role === "assistant" ? messages.pop() : null;
  begin(() => dropped && at("log").lastElementChild.remove(), () => dropped && messages.push(dropped));
}

// Asks for an answer to the messages, unless what the settings say makes no request.
function begin(show, undo) {
  let body;
  try {
    body = requestBody();
  } catch (error) {
    undo();
    say(error.message, true);
    return;
  }
  show();
  answer(body);
}

function clear() {
  running?.abort();
  messages = [];
  at("log").replaceChildren();
  setBusy(false);
  at("retry").disabled = true;
  say("");
  at("prompt").focus();
}

async function copy(make) {
  try {
    const body = requestBody();
    if (!messages.length) body.messages.push({ role: "user", content: at("prompt").value || "Hello" });
    else if (messages.at(-1).role === "assistant") body.messages.pop();
    await navigator.clipboard.writeText(make(body, location.origin, Boolean(at("key").value)));
    say("Copied.");
  } catch (error) {
    say(`Not copied: ${error.message}`, true);
  }
}

// -- the strip ----------------------------------------------------------------------------------------------

let before = null;

async function watch() {
  try {
    if (document.visibilityState === "visible") showStatus(await getJson("/status", at("key").value));
  } catch {
    before = null;
    for (const id of ["running", "waiting", "batch", "blocks"]) at(id).textContent = "–";
  }
  setTimeout(watch, 1000);
}

function showStatus(now) {
  const steps = before ? now.steps - before.steps : 0;
  at("running").textContent = now.running;
  at("waiting").textContent = now.waiting;
  at("batch").textContent = steps > 0 ? ((now.step_sequences - before.step_sequences) / steps).toFixed(1) : "–";
  at("blocks").textContent = `${now.blocks_used} / ${now.blocks_total}`;
  at("blocks-meter").value = now.blocks_total ? now.blocks_used / now.blocks_total : 0;
  before = now;
}

// -- start --------------------------------------------------------------------------------------------------

async function start() {
  try {
    await loadSettings();
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

at("key").value = sessionStorage.getItem("pagetide.key") ?? "";
at("composer").addEventListener("submit", send);
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop-answer").addEventListener("click", () => running?.abort());
at("retry").addEventListener("click", retry);
at("clear").addEventListener("click", clear);
at("curl").addEventListener("click", () => copy(asCurl));
at("python").addEventListener("click", () => copy(asPython));
at("key").addEventListener("change", start);
document.addEventListener("change", remember);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
start();
watch();
