const CHAT_STORE = "inferneo.chat", KEY_STORE = "inferneo.key";
const ICONS = { Send: "M8 2l5.5 5.5-1.1 1.1L8.8 5v9H7.2V5L3.6 8.6 2.5 7.5z", Stop: "M4 4h8v8H4z" };
const $ = (id) => document.getElementById(id);

// The chat: its messages, each {role, content, note}, and the settings. Kept in this browser only.
const chat = load();
let cleared = [];    // what "New chat" put away
let answering = null;  // the Answer in progress
let pinned = true;   // the view follows the text while its end is in sight

function load() {
  const fresh = { messages: [], model: "", system: "", temperature: 0.7, maxTokens: null };
  try {
    return { ...fresh, ...JSON.parse(localStorage.getItem(CHAT_STORE)) };
  } catch (error) {
    notify(`The kept chat cannot be read: ${error.message}`);
    return fresh;
  }
}

function save() {
  try {
    localStorage.setItem(CHAT_STORE, JSON.stringify(chat));
  } catch (error) {
    notify(`This chat is not kept: ${error.message}`);
  }
}

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** One answer over its own WebSocket. Closing the socket is what ends the request on the server. */
class Answer {
  constructor(request, { onToken, onEnd }) {
    Object.assign(this, { onToken, onEnd, tokens: 0, started: performance.now(), error: null });
    this.socket = new WebSocket(new URL("v1/chat/completions", location.href.replace(/^http/, "ws")));
    this.socket.onopen = () => {
      const key = sessionStorage.getItem(KEY_STORE);
      if (key) this.socket.send(JSON.stringify({ type: "auth", api_key: key }));
      this.socket.send(JSON.stringify(request));
    };
    this.socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    this.socket.onclose = () => this.end("error", { message: "The connection to the server was lost." });
  }

  receive({ error, choices: [choice] = [] }) {
    if (error) return this.end("error", error);
    if (!choice) return;
    if (typeof choice.delta?.content === "string") {
      this.last = performance.now();
      this.first ??= this.last;
      this.tokens += 1;
      this.onToken(choice.delta.content);
    }
    if (choice.finish_reason) this.end(choice.finish_reason);
  }

  end(reason, error = null) {
    if (this.reason) return;
    Object.assign(this, { reason, error });
    this.socket.close();
    this.onEnd(this);
  }

  /** "57 tokens · 143 tokens/s · first token 38 ms", as far as it is known by now. */
  figures() {
    if (!this.tokens) return `waiting for the first token, ${((performance.now() - this.started) / 1000).toFixed(1)} s`;
    const rate = (1000 * (this.tokens - 1)) / (this.last - this.first);
    const parts = [`${this.tokens} token${this.tokens === 1 ? "" : "s"}`];
    if (Number.isFinite(rate)) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
    parts.push(`first token ${Math.round(this.first - this.started)} ms`);
    const ends = { length: "token limit reached", abort: "stopped", error: "broken off" };
    if (ends[this.reason]) parts.push(ends[this.reason]);
    return parts.join(" · ");
  }
}

// Text on the screen. Only textContent is ever set: what a model writes stays text.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** The text as blocks: prose, and what stands between code fences. A fence that is still open runs to the end. */
function blocks(text) {
  return text.split(/^[ \t]*```.*\n?/m)
    .map((source, index) => ({ source: source.replace(/\n+$/, ""), isCode: index % 2 === 1 }))
    .filter(({ source, isCode }) => isCode || source.trim());
}

function blockView({ source, isCode }) {
  if (isCode) return element("pre", { tabIndex: 0 }, element("code", { textContent: source }));
  const pieces = source.replace(/^\n+/, "").split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/);
  return element("p", {}, ...pieces.map((piece, index) => {
    if (index % 2 === 0) return piece;
    return piece[0] === "`" ? element("code", { textContent: piece.slice(1, -1) })
      : element("strong", { textContent: piece.slice(2, -2) });
  }));
}

/** Only blocks that changed are made anew, so that a selection in the others outlives the stream. */
function drawText(body, text) {
  const wanted = blocks(text);
  while (body.children.length > wanted.length) body.lastChild.remove();
  wanted.forEach((block, index) => {
    const shown = body.children[index], mark = `${block.isCode} ${block.source}`;
    if (shown?.mark === mark) return;
    const made = Object.assign(blockView(block), { mark });
    if (shown) shown.replaceWith(made); else body.append(made);
  });
}

function messageView(message) {
  const body = element("div", { className: "body" });
  if (message.role === "user") {
    body.append(element("p", { textContent: message.content }));
    return element("article", { className: "user", ariaLabel: "You" }, body);
  }
  drawText(body, message.content);
  const copy = element("button", { type: "button", textContent: "Copy", hidden: !navigator.clipboard });
  copy.onclick = async () => {
    await navigator.clipboard.writeText(message.content);
    copy.textContent = "Copied";
  };
  const again = element("button", { type: "button", className: "again", textContent: "Try again", onclick: tryAgain });
  const note = element("span", { className: "note", textContent: message.note ?? "" });
  const tools = element("div", { className: "tools" }, note, copy, again);
  return element("article", { className: "assistant", ariaLabel: "Assistant" }, body, tools);
}

function drawChat() {
  $("log").replaceChildren(...chat.messages.map(messageView));
  drawState();
}

function drawState() {
  const label = answering ? "Stop" : "Send";
  $("send").ariaLabel = $("send").title = label;
  $("send").querySelector("path").setAttribute("d", ICONS[label]);
  $("send").disabled = !answering && !$("prompt").value.trim();
  $("empty").hidden = chat.messages.length > 0;
  $("restore").hidden = !cleared.length;
  $("log").ariaBusy = String(Boolean(answering));  // a screen reader reads the answer once it stands
  const views = [...$("log").children];
  views.forEach((view, index) => {
    const isLast = index === views.length - 1;
    view.classList.toggle("live", Boolean(answering) && isLast);
    for (const button of view.querySelectorAll("button")) {
      button.disabled = Boolean(answering);
      button.style.visibility = answering && isLast ? "hidden" : "";
    }
    const again = view.querySelector(".again");
    if (again) again.hidden = !isLast;
  });
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
  if (pinned) $("scroller").scrollTop = $("scroller").scrollHeight;
}

// The acts

function send() {
  const content = $("prompt").value;
  if (answering || !content.trim()) return;
  chat.messages.push({ role: "user", content });
  $("prompt").value = "";
  answer();
}

function tryAgain() {
  chat.messages.pop();
  answer();
}

/** Ask for an answer to the messages as they stand, the user's last. */
function answer() {
  notify("");
  cleared = [];
  pinned = true;
  const system = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  const messages = [...system, ...chat.messages.map(({ role, content }) => ({ role, content }))];
  const request = { model: chat.model, messages, stream: true, temperature: chat.temperature };
  if (chat.maxTokens) request.max_tokens = chat.maxTokens;
  const message = { role: "assistant", content: "" };
  chat.messages.push(message);
  const onToken = (text) => { message.content += text; };
  answering = new Answer(request, { onToken, onEnd: (ended) => finish(ended, message) });
  drawChat();
  requestAnimationFrame(() => drawLive(answering, message));
}

/** Once a frame, however fast the tokens come. */
function drawLive(live, message) {
  if (!live || live.reason) return;
  drawMessage(live, message);
  if (pinned) $("scroller").scrollTop = $("scroller").scrollHeight;
  requestAnimationFrame(() => drawLive(live, message));
}

function drawMessage(live, message) {
  const view = $("log").lastElementChild;
  drawText(view.querySelector(".body"), message.content);
  view.querySelector(".note").textContent = live.figures();
}

function finish(ended, message) {
  answering = null;
  if (ended.tokens) {
    message.note = ended.figures();
    drawMessage(ended, message);
    drawState();
  } else {  // nothing came: the question goes back to where it was typed, so that the roles still alternate
    chat.messages.pop();
    $("prompt").value = chat.messages.pop().content + ($("prompt").value && `\n${$("prompt").value}`);
    drawChat();
  }
  save();
  if (ended.error?.code === "invalid_api_key") askKey(send);
  else if (ended.error) notify(ended.error.message);
}

/** Ask until the key is right, then go on. */
function askKey(then) {
  $("ask-key").querySelector("form").onsubmit = () => {
    sessionStorage.setItem(KEY_STORE, $("key").value);
    $("key").value = "";
    loadModels(then);
  };
  $("ask-key").showModal();
}

async function loadModels(then = () => {}) {
  const key = sessionStorage.getItem(KEY_STORE);
  try {
    const response = await fetch("v1/models", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    if (response.status === 401) return askKey(then);
    const { data, error } = await response.json();
    if (error) return notify(error.message);
    $("model").replaceChildren(...data.map(({ id }) => element("option", { value: id, textContent: id })));
    if (data.some(({ id }) => id === chat.model)) $("model").value = chat.model;
    chat.model = $("model").value;
    then();
  } catch (error) {
    notify(`The server does not answer: ${error.message}`);
  }
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (answering) answering.end("abort"); else send();
};
$("prompt").oninput = drawState;
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) answering?.end("abort");
};
$("scroller").onscroll = ({ target }) => {
  pinned = target.scrollHeight - target.scrollTop - target.clientHeight < 48;
};
$("new-chat").onclick = () => {
  answering?.end("abort");
  cleared = chat.messages.length ? chat.messages : cleared;
  chat.messages = [];
  notify("");
  drawChat();
  save();
  $("prompt").focus();
};
$("restore").onclick = () => {
  [chat.messages, cleared] = [cleared, []];
  drawChat();
  save();
};
$("model").onchange = () => { chat.model = $("model").value; save(); };
$("open-settings").onclick = () => {
  $("system").value = chat.system;
  $("temperature").value = $("temperature-value").value = chat.temperature;
  $("max-tokens").value = chat.maxTokens ?? "";
  $("settings").showModal();
};
$("temperature").oninput = () => { $("temperature-value").value = $("temperature").value; };
$("settings").onclose = () => {
  chat.system = $("system").value;
  chat.temperature = $("temperature").valueAsNumber;
  chat.maxTokens = $("max-tokens").valueAsNumber || null;
  save();
};
addEventListener("pagehide", () => answering?.end("abort"));  // what has come is kept

drawChat();
loadModels();
