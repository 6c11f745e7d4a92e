"use strict";

/* One tab stop for many things: arrow keys move among them, `enter(element)` is told where one is. */
function roving(container, selector, enter) {
  const all = () => [...container.querySelectorAll(selector)];
  const first = all()[0];
  if (first) first.tabIndex = 0;
  container.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const list = all(), place = list.indexOf(document.activeElement);
    if (!step || place < 0) return;
    event.preventDefault();
    const next = list[(place + step + list.length) % list.length];
    list.forEach((each) => { each.tabIndex = -1; });
    next.tabIndex = 0;
    next.focus();
  };
  container.addEventListener("focusin", (event) => { if (event.target.matches(selector)) enter(event.target); });
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function options(select, names) {
  select.replaceChildren(...names.map((name, value) => make("option", { value, textContent: name })));
}

const embedded = (id) => JSON.parse(document.getElementById(id).textContent);

/* Figures: what a point says, where the mouse or the keyboard is. */
function figures() {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (mark) => {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const left = Math.min(at.right + 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const top = at.bottom + 8 + tip.offsetHeight > window.innerHeight ? at.top - 8 - tip.offsetHeight : at.bottom + 8;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = Math.max(8, top) + "px";
  };
  for (const svg of document.querySelectorAll(".figure svg")) {
    roving(svg, ".mark", show);
    svg.addEventListener("focusout", hide);
    for (const mark of svg.querySelectorAll(".mark")) {
      mark.addEventListener("pointerenter", () => show(mark));
      mark.addEventListener("pointerleave", hide);
    }
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", hide, { passive: true });
}

/* A point of the front, or one between two: its weights, what it brings, and the commands that ask for it. */
function points() {
  const data = embedded("point-data"), form = document.getElementById("point");
  const place = document.getElementById("point-place"), field = (name) => form.elements[name];
  options(field("point"), data.points.map((point) => point.name));
  const number = (value) => String(Number(value.toFixed(4)));

  /* Points of one law differ in their weights alone, and may be mixed. */
  const mixable = (point) => data.points.filter((each) => each !== point && each.temperature === point.temperature
    && (each.method === point.method || each.method === "base" || point.method === "base"));

  function others() {
    const point = data.points[Number(field("point").value)], select = field("other");
    select.replaceChildren(make("option", { value: "", textContent: "–" }),
      ...mixable(point).map((each) => make("option", { value: data.points.indexOf(each), textContent: each.name })));
    field("share").value = 0;
    show();
  }

  function mixed(one, other, share) {
    const names = [...new Set([...Object.keys(one), ...Object.keys(other)])];
    const rest = (weights, name) => weights[name] ?? (name === "base" ? 1 : 0);
    const pairs = names.map((name) => [name, Number(number((1 - share) * rest(one, name) + share * rest(other, name)))]);
    return Object.fromEntries(pairs.filter(([name, weight]) => weight !== (name === "base" ? 1 : 0)));
  }

  function command(text) {
    const copy = make("button", { type: "button", textContent: "Copy" });
    copy.onclick = () => navigator.clipboard.writeText(text);
    return make("div", { className: "command" }, make("pre", { textContent: text }), copy);
  }

  function show() {
    const point = data.points[Number(field("point").value)], chosen = field("other").value;
    const other = chosen === "" ? point : data.points[Number(chosen)];
    field("share").disabled = chosen === "";
    const share = chosen === "" ? 0 : Number(field("share").value), between = share > 0 && share < 1;
    const asked = share === 1 ? other : point;
    const weights = mixed(point.weights, other.weights, share), alphas = mixed(point.alphas, other.alphas, share);
    const listed = Object.entries(alphas).map(([name, alpha]) => name + " " + alpha).join(", ") || "none: the base alone";
    const value = (one, two) => (one === null || two === null ? null : (1 - share) * one + share * two);
    const facts = data.objectives.map((name, which) => {
      const score = value(point.scores[which][0], other.scores[which][0]), [, low, high] = asked.scores[which];
      const range = between || low === null ? "" : " [" + low.toFixed(2) + ", " + high.toFixed(2) + "]";
      return name + " " + (score === null ? "undetermined" : score.toFixed(2)) + range;
    });
    const kl = value(point.kl, other.kl), readable = value(point.readable, other.readable);
    if (kl !== null) facts.push("KL " + kl.toFixed(1) + " nats");
    if (readable !== null) facts.push("readable " + readable.toFixed(2));
    const body = { model: data.base, messages: [{ role: "user", content: "Describe a rainy Monday morning." }],
      max_tokens: data.max_new_tokens, temperature: asked.temperature, guidance: { weights } };
    const curl = "curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '"
      + JSON.stringify(body) + "'";
    const python = ["from pipeline import Request, load_experiment", "", "decoder = load_experiment()",
      "request = Request(\"Describe a rainy Monday morning.\", " + JSON.stringify(weights) + ", temperature="
      + asked.temperature + ", max_new_tokens=" + data.max_new_tokens + ")",
      "print(next(decoder.generate([request]))[1].text)"].join("\n");
    const samples = make("button", { type: "button", textContent: "Samples at " + asked.name });
    samples.onclick = () => {
      const filter = document.getElementById("samples-filter");
      filter.elements.point.value = data.points.indexOf(asked);
      filter.oninput();
      document.getElementById("samples").scrollIntoView();
    };
    for (const mark of document.querySelectorAll(".mark[data-point]"))
      mark.setAttribute("aria-pressed", String([point.name, share ? other.name : ""].includes(mark.dataset.point)));
    place.replaceChildren(
      make("p", {}, make("strong", { textContent: "α: " + listed }), make("br"), facts.join(" · ")
        + (between ? " (on the line between the two, not measured)" : "; in W&B the run “" + asked.name + "”") + " "),
      make("p", {}, samples),
      make("details", {}, make("summary", { textContent: "Ask a server for it (make serve)" }), command(curl)),
      make("details", {}, make("summary", { textContent: "Ask in Python" }), command(python)));
  }

  for (const mark of document.querySelectorAll(".mark[data-point]")) {
    const choose = () => {
      field("point").value = data.points.findIndex((point) => point.name === mark.dataset.point);
      others();
    };
    mark.addEventListener("click", choose);
    mark.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
    });
  }
  /* Of all points and mixes of two, the one of least KL that reaches what is asked; else the one that misses least. */
  const outcome = document.getElementById("outcome");
  outcome.onsubmit = (event) => {
    event.preventDefault();
    const least = data.objectives.map((name) => Number(outcome.elements[name].value || -Infinity));
    const mix = (one, other, share) => (1 - share) * one + share * other;
    const known = data.points.filter((point) => point.kl !== null && point.scores.every((score) => score[0] !== null));
    const offers = known.flatMap((point) => [[point, point, 0], ...mixable(point).filter((each) => known.includes(each))
      .flatMap((other) => [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9].map((share) => [point, other, share]))]);
    const rated = offers.map(([point, other, share]) => ({ point, other, share, kl: mix(point.kl, other.kl, share),
      missing: Math.max(0, ...least.map((bound, which) => bound - mix(point.scores[which][0], other.scores[which][0], share))) }));
    rated.sort((one, two) => Math.abs(one.missing - two.missing) > 1e-9 ? one.missing - two.missing : one.kl - two.kl);
    const best = rated[0];
    document.getElementById("outcome-found").textContent = !best ? "no point has scores"
      : best.missing > 1e-9 ? "out of reach; the nearest is shown" : "";
    if (!best) return;
    field("point").value = data.points.indexOf(best.point);
    others();
    if (best.share) field("other").value = data.points.indexOf(best.other);
    field("share").value = best.share;
    show();
  };

  form.onsubmit = (event) => event.preventDefault();
  field("point").onchange = others;
  field("other").onchange = field("share").oninput = show;
  field("point").value = Math.floor(data.points.length / 2);
  others();
}

/* Samples: a prompt, and the response at every point side by side. */
function samples() {
  const data = embedded("samples-data"), form = document.getElementById("samples-filter");
  const chooser = document.getElementById("samples-prompt"), place = document.getElementById("samples-place");
  const field = (name) => form.elements[name];
  options(field("objective"), data.objectives);
  options(field("point"), data.points.map((point) => point.name));
  field("point").value = Math.floor(data.points.length / 2);

  const score = (sample, point) => sample.responses[point].scores[Number(field("objective").value)];
  function outcome(sample, point) {
    const mine = score(sample, point), theirs = score(sample, data.points[point].control);
    if (mine === null || theirs === null) return "undetermined";
    return mine > theirs ? "win" : mine < theirs ? "loss" : "tie";
  }
  let found = [];

  function filter() {
    const point = Number(field("point").value), wanted = field("outcome").value;
    const words = field("words").value.trim().toLowerCase();
    const least = Number(field("least").value || 0), most = Number(field("most").value || Infinity);
    document.getElementById("samples-control").textContent = "against " + data.points[data.points[point].control].name;
    found = data.prompts.filter((sample) => {
      const response = sample.responses[point];
      return response.tokens >= least && response.tokens <= most
        && (wanted === "any" || outcome(sample, point) === wanted)
        && (!words || (sample.prompt + "\n" + response.text).toLowerCase().includes(words));
    });
    options(chooser, found.map((sample) => sample.prompt.trim().replace(/\s+/g, " ").slice(0, 120)));
    show();
  }

  function show() {
    const index = Number(chooser.value || 0), sample = found[index], asked = Number(field("point").value);
    document.getElementById("samples-count").textContent =
      found.length + " of " + data.prompts.length + " prompts" + (found.length ? "" : ": loosen the filter");
    document.getElementById("samples-previous").disabled = !sample || index === 0;
    document.getElementById("samples-next").disabled = !sample || index === found.length - 1;
    if (!sample) return place.replaceChildren();
    const cards = data.points.map((point, number) => {
      const response = sample.responses[number];
      const facts = data.objectives.map((name, which) =>
        name + " " + (response.scores[which] === null ? "undetermined" : response.scores[which].toFixed(2)));
      if (response.kl !== null) facts.push("KL " + response.kl.toFixed(1));
      facts.push(response.tokens + " tokens");
      if (point.control !== number) facts.push(outcome(sample, number) + " on " + data.objectives[Number(field("objective").value)]);
      return make("article", { className: number === asked ? "asked" : "" },
        make("h3", { textContent: point.name }), make("p", { textContent: response.text || "(empty)" }),
        make("small", { textContent: facts.join(" · ") }));
    });
    place.replaceChildren(make("p", { className: "tokens", textContent: sample.prompt }), make("div", { className: "samples" }, ...cards));
  }

  const turn = (step) => { chooser.value = Number(chooser.value) + step; show(); };
  document.getElementById("samples-previous").onclick = () => turn(-1);
  document.getElementById("samples-next").onclick = () => turn(1);
  form.onsubmit = (event) => event.preventDefault();
  form.oninput = filter;
  chooser.onchange = show;
  filter();
}

/* Token rewards: the text once per ARM in its colours; a token shows what might have stood there. */
function tokens() {
  const data = embedded("tokens-data"), strongest = Number(document.getElementById("tokens").dataset.strongest);
  const lines = document.getElementById("tokens-lines");
  const prompt = document.getElementById("tokens-prompt"), point = document.getElementById("tokens-point");
  const others = document.getElementById("tokens-others");
  options(prompt, data.prompts.map((text) => text.trim().replace(/\s+/g, " ").slice(0, 120)));
  let mine = [];

  const colour = (reward) =>
    "rgba(var(--" + (reward > 0 ? "more" : "less") + "), " + (0.75 * Math.min(1, Math.abs(reward) / strongest)).toFixed(2) + ")";
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

  function choose() {
    mine = data.traces.filter((each) => each.prompt === Number(prompt.value));
    const before = point.selectedOptions[0] && point.selectedOptions[0].textContent;
    options(point, mine.map((each) => each.point));
    const says = mine.map((each) => Object.values(each.weights).filter((alpha) => alpha).length);
    const mixed = says.indexOf(Math.max(...says)), same = mine.findIndex((each) => each.point === before);
    point.value = same < 0 ? mixed : same;
    show();
  }

  function alternatives(trace, place) {
    const before = trace.tokens.slice(0, place).join("").slice(-40);
    const head = make("tr", {}, make("th", { textContent: "token" }), ...trace.laws.map((law) => make("th", { textContent: law })));
    const rows = trace.alternatives[place].map(([text, chosen, probabilities]) =>
      make("tr", { className: chosen ? "chosen" : "" },
        make("td", { textContent: JSON.stringify(text) + (chosen ? " ← stands here" : "") }),
        ...probabilities.map((each) => make("td", { textContent: each.toFixed(3) }))));
    others.replaceChildren(
      make("p", { textContent: "Position " + place + ", after “…" + before + "”: probabilities of the next token" }),
      make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
    for (const each of lines.querySelectorAll(".token")) each.setAttribute("aria-current", each.dataset.place === String(place));
  }

  function show() {
    const trace = mine[Number(point.value)];
    others.replaceChildren(make("p", { className: "faint", textContent: "Choose a token to see what else might have stood there." }));
    lines.replaceChildren();
    for (const [arm, rewards] of Object.entries(trace.rewards)) {
      const line = make("p", { className: "tokens" });
      line.setAttribute("role", "group");
      line.setAttribute("aria-label", "the response as " + arm + " sees it");
      trace.tokens.forEach((text, place) => {
        const token = make("span", { className: "token", textContent: text, title: signed(rewards[place], 2) + " nats", tabIndex: -1 });
        token.setAttribute("role", "button");
        token.setAttribute("aria-label", text + ", " + signed(rewards[place], 1) + " nats");
        token.style.background = colour(rewards[place]);
        token.dataset.place = place;
        token.onclick = () => token.focus();
        line.append(token);
      });
      const sum = rewards.reduce((total, each) => total + each, 0), alpha = trace.weights[arm] || 0;
      lines.append(make("h3", { textContent: arm + ", α = " + alpha + ": " + signed(sum, 1) + " nats beside the base" }), line);
      roving(line, ".token", (token) => alternatives(trace, Number(token.dataset.place)));
    }
  }

  prompt.onchange = choose;
  point.onchange = show;
  choose();
}

figures();
if (document.getElementById("point-data")) points();
if (document.getElementById("samples-data")) samples();
if (document.getElementById("tokens-data")) tokens();
