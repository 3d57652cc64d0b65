"use strict";
// What the pages can't do without scripts: a clock for what is live, details that load when they are opened, charts.
(() => {
  const TICK_MS = 2000;
  const live = document.getElementById("live");
  if (sessionStorage.getItem("live") === "off") live.checked = false;
  live.addEventListener("change", () => sessionStorage.setItem("live", live.checked ? "on" : "off"));

  // A hidden page asks for nothing; text that is being selected or typed is not replaced.
  const busy = () => document.hidden || !live.checked || String(getSelection()) !== "" || document.querySelector("#main form [data-typed]");
  setInterval(() => { if (!busy()) htmx.trigger(document.body, "tick"); }, TICK_MS);

  // A running rollout reports over one connection that there is something new. It is closed when the rollout has ended,
  // and while the page is hidden or not live. Without a connection, the page asks at each tick.
  let stream = null, latest = "";
  const renew = (part) => htmx.trigger(part, "renew");
  const listen = () => {
    const part = document.querySelector("[data-events]");
    const wanted = part && !document.hidden && live.checked ? part.dataset.events : "";
    if (stream && stream.address !== wanted) { stream.source.close(); stream = null; }
    if (!wanted || stream) return;
    const source = new EventSource(`${wanted}?seen=${encodeURIComponent(part.dataset.seen)}`);
    stream = { address: wanted, source };
    latest = "";
    source.addEventListener("changed", (event) => { latest = event.data; const now = document.querySelector("[data-events]"); if (now && !busy()) renew(now); });
    source.addEventListener("ended", () => source.close());
  };
  document.addEventListener("visibilitychange", listen);
  live.addEventListener("change", listen);
  document.body.addEventListener("tick", () => {
    const part = document.querySelector("[data-events]");
    if (part && (latest && latest !== part.dataset.seen || !stream || stream.source.readyState !== EventSource.OPEN)) renew(part);
  });

  const load = (details) => {
    const body = details.querySelector(":scope > .body");
    if (body && details.open && !body.dataset.loaded) {
      body.dataset.loaded = "1";
      htmx.ajax("GET", details.dataset.load, { target: body, swap: "innerHTML" });
    }
  };
  document.addEventListener("toggle", (event) => { if (event.target.dataset && event.target.dataset.load) load(event.target); }, true);

  // What was opened stays open, and what was scrolled stays where it was, when a part of the page is replaced.
  let kept = null;
  document.addEventListener("htmx:beforeSwap", (event) => {
    const part = event.detail.target;
    if (!part.querySelectorAll) return;
    kept = { states: new Map(), focus: document.activeElement && document.activeElement.closest("[data-key]") };
    part.querySelectorAll("details[data-key]").forEach((d) => {
      const body = d.querySelector(":scope > .body");
      kept.states.set(d.dataset.key, { open: d.open, html: body && body.dataset.loaded ? body : null });
    });
  });
  document.addEventListener("htmx:afterSettle", () => {
    if (kept) {
      document.querySelectorAll("details[data-key]").forEach((d) => {
        const was = kept.states.get(d.dataset.key);
        if (!was) return;
        if (was.html) { const body = d.querySelector(":scope > .body"); if (body && body !== was.html) body.replaceWith(was.html); }
        d.open = was.open;
      });
      const key = kept.focus && kept.focus.dataset.key;
      if (key) { const again = document.querySelector(`details[data-key="${CSS.escape(key)}"] > summary`); if (again) again.focus(); }
      kept = null;
    }
    draw();
    listen();
  });
  document.addEventListener("htmx:responseError", (event) => { say(`The page could not be refreshed: ${event.detail.xhr.status}`); });
  document.addEventListener("htmx:sendError", () => { say("The server of this page does not answer; it is asked again."); });
  document.addEventListener("htmx:afterOnLoad", () => { say(""); });
  const say = (text) => { document.getElementById("said").textContent = text; };

  // Keys: / searches, j and k walk through a list, g and a letter go to a page.
  let went = 0;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form && event.target.tagName === "TEXTAREA") event.target.form.requestSubmit();
      return;
    }
    if (event.key === "/") {
      const search = document.querySelector("input[type=search], textarea");
      if (search) { search.focus(); event.preventDefault(); }
    } else if (event.key === "j" || event.key === "k") {
      const all = [...document.querySelectorAll("tbody tr a:first-of-type, .span > summary")].filter((a) => a.offsetParent);
      const at = all.indexOf(document.activeElement);
      const next = all[at < 0 ? 0 : at + (event.key === "j" ? 1 : -1)];
      if (next) next.focus();
    } else if (event.key === "g") { went = Date.now(); return; }
    else if (Date.now() - went < 1000) {
      const link = { o: 0, e: 1, r: 2, d: 3, s: 4 }[event.key];
      const links = document.querySelectorAll(".top nav a");
      if (link !== undefined && links[link]) links[link].click();
    }
    went = 0;
  });

  // A question before what can't be undone.
  document.addEventListener("submit", (event) => {
    const ask = event.target.dataset && event.target.dataset.ask;
    if (ask && !confirm(ask)) event.preventDefault();
  });

  // Charts: <div class="chart" data-src="…json">. The answer: {x: [labels], links: [addresses or null], series: [{name, values,
  // kind: line|second|band-low|band-high|count (told, not drawn)}]}.
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
  const charts = new Map();
  const paint = (element, data) => {
    const old = charts.get(element);
    if (old) old.destroy();
    charts.delete(element);
    const note = element.parentElement.querySelector(".chart-note");
    element.dataset.points = String(data.x.length);
    if (!data.x.length) { element.textContent = ""; if (note) note.textContent = element.dataset.empty || "Nothing to show yet."; return; }
    const drawn = data.series.filter((s) => s.kind !== "count");
    const tones = { line: color("--accent"), second: color("--second"), "band-low": "transparent", "band-high": "transparent" };
    const find = (kind) => drawn.findIndex((s) => s.kind === kind) + 1;
    const tell = (at) => {
      if (!note) return;
      const values = data.series.map((s) => `${s.name} ${short(s.values[at])}`).join(" · ");
      note.textContent = `${data.x[at]}: ${values}${data.links && data.links[at] ? " · click for its rollouts" : ""}`;
    };
    const options = {
      width: Math.max(element.clientWidth, 200),
      height: element.clientHeight || 280,
      cursor: { drag: { x: true, y: false }, points: { size: 8 } },
      legend: { show: false },
      scales: { x: { time: false, range: (u, min, max) => min === max ? [min - 1, max + 1] : [min, max] } },
      axes: [
        { stroke: color("--faint"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, space: 90, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10000], values: (u, at) => at.map((i) => data.x[i] === undefined ? "" : data.x[i]) },
        { stroke: color("--faint"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, size: 56, values: (u, at) => at.map(short) },
      ],
      series: [{}, ...drawn.map((s) => ({ label: s.name, stroke: tones[s.kind], width: s.kind.startsWith("band") ? 0 : 2, points: { show: !s.kind.startsWith("band") && data.x.length < 60, size: 6, fill: tones[s.kind] }, spanGaps: true }))],
      bands: find("band-high") && find("band-low") ? [{ series: [find("band-high"), find("band-low")], fill: color("--band") }] : [],
      hooks: { setCursor: [(u) => { if (u.cursor.idx !== null && u.cursor.idx !== undefined) tell(u.cursor.idx); }] },
    };
    const chart = new uPlot(options, [data.x.map((_, i) => i), ...drawn.map((s) => s.values)], element);
    let pressed = 0;
    chart.over.addEventListener("mousedown", (event) => { pressed = event.clientX; });
    chart.over.addEventListener("click", (event) => {
      const at = chart.cursor.idx;
      if (Math.abs(event.clientX - pressed) < 4 && data.links && at !== null && data.links[at]) location.href = data.links[at];
    });
    charts.set(element, chart);
    tell(data.x.length - 1);
    element.dataset.ready = "1";
  };
  const answers = new Map();
  const draw = () => {
    for (const element of charts.keys()) if (!element.isConnected) { charts.get(element).destroy(); charts.delete(element); }
    document.querySelectorAll(".chart[data-src]").forEach((element) => {
      if (element.dataset.asked) return;
      element.dataset.asked = "1";
      fetchChart(element);
    });
  };
  const fetchChart = async (element) => {
    try {
      const answer = await fetch(element.dataset.src, { headers: { accept: "application/json" } });
      if (!answer.ok) return;
      const text = await answer.text();
      if (answers.get(element) === text) return;
      answers.set(element, text);
      paint(element, JSON.parse(text));
    } catch (error) { /* the next tick asks again */ }
  };
  let ticks = 0;
  document.body.addEventListener("tick", () => { if (++ticks % 2 === 0) document.querySelectorAll(".chart[data-live]").forEach(fetchChart); });
  const repaint = () => { answers.clear(); document.querySelectorAll(".chart[data-src]").forEach(fetchChart); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  let resizing = 0;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(repaint, 200); });
  draw();
  listen();
})();
