// The page at /admin/ui: what the control plane says, drawn. Text of tenants is only ever put in as text.
"use strict";

const EVERY_MS = 5000, TENANT_EVERY_MS = 30000; // a tenant's history is read from the store
const PLOT_W = 600, PLOT_H = 120;
const KEY = "flatshare-key";
const main = document.getElementById("main");
const statusLine = document.getElementById("status");
const login = document.getElementById("login");
const forget = document.getElementById("forget");
let timer = null, drawn = "", turn = 0;

class Refused extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = "Bearer " + key;
  if (options.body) headers["content-type"] = "application/json";
  const reply = await fetch("." + path, { ...options, headers, cache: "no-store" });
  const body = await reply.json().catch(() => null);
  if (reply.status === 401) throw new Refused(key ? "This key is not known here." : "Show a key of an admin or a viewer.");
  if (!reply.ok) throw new Error(body?.error?.message ?? `the control plane answered ${reply.status}`);
  return body;
}

const enc = encodeURIComponent;

// -- making elements

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((one) => one !== null).map((one) => (one instanceof Node ? one : String(one))));
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function table(caption, columns, rows) {
  const numeric = columns.map((name) => name.endsWith("#"));
  const cell = (tag, value, index) => el(tag, { class: numeric[index] ? "number" : null, scope: tag === "th" ? "col" : null }, value ?? "");
  const head = el("tr", {}, columns.map((name, index) => cell("th", name.replace("#", ""), index)));
  const body = rows.map((row) => el("tr", {}, row.map((value, index) => cell("td", value, index))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, head), el("tbody", {}, body)));
}

const bytes = (size) => {
  for (const unit of ["B", "kB", "MB"]) { if (size < 1000) return `${unit === "B" ? size : size.toFixed(1)} ${unit}`; size /= 1000; }
  return `${size.toFixed(1)} GB`;
};
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);
const milliseconds = (value) => (value === null ? "–" : `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`);
const moment = (seconds) => new Date(1000 * seconds).toLocaleString();
const tenantLink = (tenant, text = tenant) => el("a", { href: `#/tenant/${enc(tenant)}` }, text);
const replicaLink = (name) => el("a", { href: `#/replica/${enc(name)}` }, name);

function plot(title, points, lines, say) {
  const seen = points.flatMap((one) => lines.map((line) => one[line])).filter((value) => value !== null);
  const top = Math.max(...seen, 1e-9), first = points[0]?.at ?? 0, span = Math.max((points.at(-1)?.at ?? 0) - first, 1);
  const drawing = svg("svg", { viewBox: `0 0 ${PLOT_W} ${PLOT_H}`, preserveAspectRatio: "none", role: "img" });
  drawing.append(svg("title", {}, `${title}; highest ${say(top)}`), svg("line", { x1: 0, x2: PLOT_W, y1: PLOT_H - 1, y2: PLOT_H - 1 }));
  for (const line of lines) {
    let path = "", pen = "M";
    for (const one of points) {
      if (one[line] === null) { pen = "M"; continue; }
      path += `${pen}${((one.at - first) / span * PLOT_W).toFixed(1)} ${(PLOT_H - 2 - one[line] / top * (PLOT_H - 14)).toFixed(1)}`;
      pen = "L";
    }
    drawing.append(svg("path", { class: line, d: path || "M0 0" }));
  }
  const now = lines.map((line) => `${line} ${say(points.findLast((one) => one[line] !== null)?.[line] ?? null)}`).join(", ");
  return el("figure", {}, drawing, el("figcaption", {}, `${title}. Now: ${now}; highest ${seen.length ? say(top) : "–"}`));
}

// -- views

async function overview() {
  const [fleet, history] = await Promise.all([ask("/replicas"), ask("/history")]);
  const last = history.points.at(-1);
  const tile = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  const models = fleet.replicas.reduce((sum, one) => sum + one.models.length, 0);
  const resident = [...new Set(fleet.replicas.flatMap((one) => one.models.map((model) => model.tenant)))].sort();
  document.getElementById("tenants").replaceChildren(...resident.slice(0, 500).map((id) => el("option", { value: id })));
  return [
    el("h2", {}, "Fleet"),
    el("dl", { class: "tiles" },
      tile("Replicas", fleet.replicas.length + (fleet.not_answering.length ? ` and ${fleet.not_answering.length} to come` : "")),
      tile("Models held", models), tile("Hit rate", percent(last?.device ?? null)),
      tile("Requests a second", last ? last.requests_per_s.toFixed(1) : "–"),
      tile("p99", milliseconds(last?.p99 ?? null)), tile("Evictions", fleet.totals.evictions), tile("Loads that failed", fleet.totals.load_failures)),
    el("h2", {}, "The last hour"),
    el("div", { class: "plots" },
      plot("Found on the device", history.points, ["device"], percent),
      plot("Time of a request", history.points, ["p50", "p99"], milliseconds)),
    el("h2", {}, "Replicas"),
    table("Replicas", ["replica", "place#", "node", "device", "state", "slots#", "ongoing#", "queued#", "bytes#", "refused#"],
      fleet.replicas.map((one) => [replicaLink(one.replica), one.place, one.node, one.device, one.state, `${one.slots_used} of ${one.slots}`,
        one.ongoing, one.queued, bytes(one.held_bytes), one.refused])),
    el("h2", {}, "What is where"),
    el("p", { class: "quiet" }, "Each box is a model, by the tier that it was loaded from: host, peer or store."),
    el("div", { class: "nodes" }, nodes(fleet.replicas)),
    history.tenants.length ? el("h2", {}, "Busiest tenants") : null,
    history.tenants.length ? table("Busiest tenants", ["tenant", "requests a second#"], history.tenants.map((one) => [tenantLink(one.tenant), one.requests_per_s.toFixed(2)])) : null,
  ];
}

function nodes(replicas) {
  const byNode = Map.groupBy ? Map.groupBy(replicas, (one) => one.node) : new Map([["", replicas]]);
  return [...byNode].map(([node, found]) => el("section", { class: "node" }, el("h3", {}, node),
    found.map((one) => el("div", { class: "replica" }, replicaLink(one.replica), slots(one)))));
}

function slots(one) {
  const held = one.models.slice(0, 60).map((model) => el("li", {}, el("a", {
    class: model.tier, href: `#/tenant/${enc(model.tenant)}`,
    title: `${model.tenant}@${model.version}, from ${model.tier}, ${model.hits} hits${model.pinned ? ", pinned" : ""}`,
  }, `${model.tenant}@${model.version}${model.pinned ? " 📌" : ""}`)));
  const more = one.models.length > 60 ? [el("li", { class: "quiet" }, `and ${one.models.length - 60} more`)] : [];
  const free = Array.from({ length: Math.max(Math.min(one.slots - one.slots_used, 20), 0) }, () => el("li", { class: "free", "aria-hidden": "true" }));
  return el("ul", { class: "slots" }, held, more, free);
}

function failures(found) {
  return table("Loads that failed", ["replica", "model", "when", "why"], found.map(([one, load]) => [replicaLink(one.replica),
    tenantLink(load.tenant, `${load.tenant}@${load.version}`), moment(load.at), `${load.kind}: ${load.error}`]));
}

async function replica(name) {
  const fleet = await ask("/replicas");
  const one = fleet.replicas.find((other) => other.replica === name);
  if (!one) throw new Error(`there is no replica ${name} now`);
  return [
    el("h2", {}, `Replica ${name}`),
    el("p", {}, `Place ${one.place} on ${one.node}, ${one.device}, process ${one.pid}, since ${moment(one.started_at)}; ` +
      `${one.passes} passes of ${one.rows} images; ${one.ongoing} requests under way, ${one.queued} wait. ` +
      (one.host ? `Host tier: ${bytes(one.host.used_bytes)} of ${bytes(one.host.budget_bytes)}.` : "No host tier.")),
    one.loading.length ? el("p", {}, `Loading: ${one.loading.join(", ")}`) : null,
    one.failed.length ? el("h2", {}, "Loads that failed") : null,
    one.failed.length ? failures(one.failed.map((load) => [one, load])) : null,
    table("Models of this replica", ["model", "architecture", "bytes#", "from", "state", "pinned", "hits#", "leases#", "last used"],
      one.models.map((model) => [tenantLink(model.tenant, `${model.tenant}@${model.version}`), model.architecture, bytes(model.size_bytes),
        model.tier, model.state, model.pinned ? "yes" : "", model.hits, model.leases, moment(model.last_used_at)])),
  ];
}

async function tenant(id) {
  const path = `/tenants/${enc(id)}`;
  const [head, versions, audit, fleet] = await Promise.all([ask(path), ask(`${path}/versions`), ask(`${path}/audit?limit=50`), ask("/replicas")]);
  const where = fleet.replicas.flatMap((one) => one.models.filter((model) => model.tenant === id).map((model) => [one, model]));
  const swaps = fleet.replicas.flatMap((one) => one.swaps.filter((swap) => swap.tenant === id).map((swap) => [one, swap]));
  const failed = fleet.replicas.flatMap((one) => one.failed.filter((load) => load.tenant === id).map((load) => [one, load]));
  const hits = where.reduce((sum, [, model]) => sum + model.hits, 0);
  const act = (text, request, body) => el("button", { type: "button", onclick: () => change(text, request, body) }, text);
  const aliases = (number) => Object.entries(head.aliases).filter(([, other]) => other === number).map(([name]) => name);
  const promoted = head.aliases.production;
  return [
    el("h2", {}, `Tenant ${id}`),
    el("p", {}, `${head.state}, plan ${head.plan}, since ${new Date(head.created_at).toLocaleDateString()}; production is version ${promoted ?? "–"}; ` +
      `resident on ${where.length} of ${fleet.replicas.length} replicas, with ${hits} hits since it was loaded there.`),
    el("p", {}, act("Roll back", ["POST", `${path}/aliases/production/rollback`]),
      " ", act("Preload everywhere", ["POST", "/preload"], { model: id }), " ", act("Pin", ["POST", "/preload"], { model: id, pin: true }),
      " ", act("Unpin", ["POST", "/unpin"], { model: id }), " ", act("Unload", ["POST", "/unload"], { model: id })),
    el("h2", {}, "Versions"),
    table("Versions", ["version", "aliases", "architecture", "bytes#", "digest", "made", "by", ""],
      versions.map((one) => [`${id}@${one.version}`, aliases(one.version).join(", "), one.architecture, bytes(one.size_bytes), one.digest.slice(0, 12),
        new Date(one.created_at).toLocaleString(), one.created_by,
        one.version === promoted ? "" : act(`Promote ${one.version}`, ["PUT", `${path}/aliases/production`], { version: one.version })])),
    el("h2", {}, "Where it is"),
    where.length ? table("Where it is", ["replica", "version#", "from", "state", "pinned", "hits#", "loaded", "last used"],
      where.map(([one, model]) => [replicaLink(one.replica), model.version, model.tier, model.state, model.pinned ? "yes" : "", model.hits,
        moment(model.loaded_at), moment(model.last_used_at)])) : el("p", { class: "quiet" }, "On no replica now; its next request loads it."),
    failed.length ? el("h2", {}, "Loads that failed") : null,
    failed.length ? failures(failed) : null,
    swaps.length ? el("h2", {}, "Promotions that have not taken over") : null,
    swaps.length ? table("Promotions under way", ["replica", "alias", "from#", "to#", "why"], swaps.map(([one, swap]) => [replicaLink(one.replica), swap.alias,
      swap.from_version, swap.to_version, swap.error || "it is being loaded"])) : null,
    el("h2", {}, "History"),
    table("History", ["when", "who", "what", "alias", "from#", "to#", "detail"], [...audit.entries].reverse().map((one) => [
      new Date(one.at).toLocaleString(), one.actor, one.action, one.alias ?? "", one.from_version ?? "", one.to_version ?? "", Object.entries(one.detail ?? {}).map(([key, value]) => `${key}=${value}`).join(" ")])),
  ];
}

// -- doing

async function change(text, [method, path], body) {
  if (!window.confirm(`${text}: ${body ? Object.values(body).join(" ") : location.hash.split("/").at(-1)}?`)) return;
  say(`${text} …`);
  try {
    await ask(path, { method, body: body ? JSON.stringify(body) : undefined });
    await draw(true);
    say(`${text}: done.`);
  } catch (error) {
    say(`${text}: ${error.message}`, true);
  }
}

function say(text, bad = false) {
  statusLine.textContent = text;
  statusLine.classList.toggle("bad", bad);
}

async function draw(forced = false) {
  const mine = ++turn;
  const here = location.hash || "#/";
  const [, kind, name] = location.hash.split("/");
  try {
    const made = kind === "tenant" ? await tenant(decodeURIComponent(name)) : kind === "replica" ? await replica(decodeURIComponent(name)) : await overview();
    if (mine !== turn) return;
    const active = document.activeElement, scrolled = window.scrollY, moved = drawn !== here;
    // A button that is about to be pressed stays where it is.
    if (!moved && !forced && active !== main && main.contains(active)) return;
    main.replaceChildren(...made.filter((one) => one !== null));
    window.scrollTo(0, moved ? 0 : scrolled);
    if (moved && drawn) main.focus({ preventScroll: true });
    drawn = here;
    login.hidden = true;
    forget.hidden = !sessionStorage.getItem(KEY);
    say(`As of ${new Date().toLocaleTimeString()}.`);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Refused) {
      login.hidden = false;
      main.replaceChildren();
      document.getElementById("key").focus();
    }
    say(error.message, true);
  }
}

async function drawOn() {
  clearTimeout(timer);
  if (!document.hidden && login.hidden) await draw();
  timer = setTimeout(drawOn, location.hash.startsWith("#/tenant/") ? TENANT_EVERY_MS : EVERY_MS);
}

login.addEventListener("submit", (event) => {
  event.preventDefault();
  const field = document.getElementById("key");
  sessionStorage.setItem(KEY, field.value.trim());
  field.value = "";
  login.hidden = true;
  drawOn();
});
forget.addEventListener("click", () => { sessionStorage.removeItem(KEY); location.reload(); });
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = document.getElementById("tenant").value.trim();
  if (id) location.hash = `#/tenant/${enc(id)}`;
});
window.addEventListener("hashchange", () => { document.activeElement?.blur(); drawOn(); });
document.addEventListener("visibilitychange", drawOn);
drawOn();
