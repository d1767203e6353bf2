"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const run = document.body.dataset.run;

  let isLeft = false; // then what is still asked for fails, and nobody waits for it
  addEventListener("pagehide", () => { isLeft = true; });
  addEventListener("pageshow", (event) => { isLeft = false; if (event.persisted) location.reload(); }); // from a cache
  const report = (error) => { if (!isLeft) console.warn(error); };

  // --- small things that need a script

  const fillMeters = (root = document) => {
    for (const meter of $$("[data-fill]", root)) meter.style.width = `${100 * Number(meter.dataset.fill)}%`;
  };

  const setTheme = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
    const next = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try { localStorage.setItem("theme", next); } catch { /* it holds for this page */ }
    Charts.redraw().catch(report);
    Tokens.paint();
  };

  const chooseRuns = () => {
    const form = $("#compare");
    if (!form) return;
    const chosen = new Set();
    const note = () => {
      $("input[name=runs]", form).value = [...chosen].join(",");
      $("button", form).disabled = chosen.size < 2;
    };
    document.addEventListener("change", (event) => {
      if (!event.target.matches("#runs-table input")) return;
      if (event.target.checked) chosen.add(event.target.value); else chosen.delete(event.target.value);
      note();
    });
    const find = () => {
      const words = $("#find").value.toLowerCase().split(/\s+/);
      for (const row of $$("#runs-table [data-row]")) {
        row.hidden = !words.every((word) => row.dataset.text.toLowerCase().includes(word));
        const box = $("input", row);
        box.checked = chosen.has(box.value);
      }
    };
    $("#find").addEventListener("input", find);
    document.addEventListener("fresh", find);
  };

  // --- tokens of a rollout

  const Tokens = (() => {
    const place = $("#tokens");
    let data = null, at = -1;
    const spans = place ? $$(".token", place) : [];

    const measures = {
      advantage: (i) => data.advantages[i],
      gap: (i) => (data.trainer_logprobs[i] === null || data.engine_logprobs[i] === null ? null : data.trainer_logprobs[i] - data.engine_logprobs[i]),
      surprise: (i) => (data.engine_logprobs[i] === null ? null : data.engine_logprobs[i]),
      version: (i) => data.versions[i],
      weight: (i) => data.weights[i],
    };

    const paint = () => {
      if (!data) return;
      const kind = $("#measure").value;
      const values = spans.map((_, i) => measures[kind](i));
      const known = values.filter((value) => value !== null);
      const largest = Math.max(...known.map(Math.abs), 1e-9);
      const versions = [...new Set(known)].sort((a, b) => a - b);
      const mix = (name, share) => `color-mix(in srgb, var(${name}) ${Math.round(100 * share)}%, transparent)`;
      spans.forEach((span, i) => {
        const value = values[i];
        let paintWith = "";
        if (value !== null) {
          if (kind === "version") paintWith = mix(`--c${versions.indexOf(value) % 8}`, 0.3);
          else if (kind === "weight") paintWith = value ? mix("--c2", 0.32) : "";
          else if (kind === "surprise") paintWith = mix("--c1", 0.55 * Math.min(1, -value / 5));
          else paintWith = mix(value >= 0 ? "--c0" : "--c1", 0.1 + 0.35 * (Math.abs(value) / largest));
        }
        span.style.background = paintWith;
      });
    };

    const show = (i) => {
      if (!data || i < 0 || i >= spans.length) return;
      if (at >= 0) spans[at].classList.remove("on");
      at = i;
      spans[i].classList.add("on");
      const gap = measures.gap(i);
      const facts = [
        ["position", data.first + i], ["token", data.ids[i]],
        ["engine", data.engine_logprobs[i]], ["trainer", data.trainer_logprobs[i]], ["trainer − engine", gap],
        ["probability", data.engine_logprobs[i] === null ? null : Math.exp(data.engine_logprobs[i])],
        ["policy version", data.versions[i]], ["turn", data.turns[i]],
        ["advantage", data.advantages[i]], ["weight (mask)", data.weights[i]],
        ["sampled", data.sampled[i] ? "yes" : "no, given"],
      ];
      const head = document.createElement("code");
      head.textContent = JSON.stringify(data.texts[i]);
      const list = document.createElement("dl");
      for (const [name, value] of facts) {
        const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
        dt.textContent = name;
        dd.textContent = typeof value === "number" && !Number.isInteger(value) ? Charts.format(value) : value === null ? "–" : String(value);
        box.append(dt, dd);
        list.append(box);
      }
      $("#token-detail").replaceChildren(head, list);
    };

    const move = (by) => {
      show(Math.min(Math.max(at < 0 ? 0 : at + by, 0), spans.length - 1));
      spans[at]?.scrollIntoView({ block: "nearest" });
    };

    const table = () => {
      const names = ["ids", "texts", "sampled", "versions", "engine_logprobs", "trainer_logprobs", "advantages", "weights", "turns"];
      const made = document.createElement("table");
      const add = (section, kind, cells) => {
        const row = section.insertRow();
        for (const text of cells) { const cell = document.createElement(kind); cell.textContent = text; row.append(cell); }
      };
      add(made.createTHead(), "th", ["position", "id", "text", "sampled", "version", "engine", "trainer", "advantage", "weight", "turn"]);
      const body = made.createTBody();
      data.ids.forEach((_, i) => add(body, "td", [data.first + i, ...names.map((name) => {
        const value = data[name][i];
        return value === null ? "–" : name === "texts" ? JSON.stringify(value) : String(value);
      })]));
      $("#token-table .scroll").replaceChildren(made);
    };

    const start = async () => {
      if (!place) return;
      place.addEventListener("mouseover", (event) => { if (event.target.dataset.i) show(Number(event.target.dataset.i)); });
      place.addEventListener("click", (event) => { if (event.target.dataset.i) { show(Number(event.target.dataset.i)); place.focus(); } });
      place.addEventListener("focus", () => { if (at < 0) show(Math.max(0, spans.findIndex((span) => !span.classList.contains("given")))); });
      place.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9, j: 1, k: -1 }[event.key];
        if (by === undefined) return;
        event.preventDefault();
        event.stopPropagation();
        move(by);
      });
      data = (await Charts.fetchJson(place.dataset.source)).tokens;
      if (data.advantages.every((value) => value === null)) $("#measure").value = "surprise";
      $("#measure").addEventListener("change", paint);
      $("#token-table").addEventListener("toggle", () => { if ($("#token-table").open) table(); });
      paint();
    };
    return { start, paint };
  })();

  // --- live: what changed is fetched again; lists are left as they are under the reader

  const refresh = async () => {
    const places = $$("[data-live]");
    if (places.length) {
      const answer = await fetch(location.href);
      if (!answer.ok) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const place of places) {
        const other = fresh.getElementById(place.id);
        if (!other && place.id === "no-runs") { location.reload(); return; } // now there are some
        if (other && other.innerHTML !== place.innerHTML && !place.contains(document.activeElement)) place.replaceChildren(...other.childNodes);
      }
      fillMeters();
      document.dispatchEvent(new Event("fresh"));
    }
    await Promise.all([Charts.update(), Charts.ledger()]);
  };

  const seeMissed = async () => { // of a list, which is left as it is
    const answer = $("#fresh") && await fetch(location.href);
    if (!answer || !answer.ok) return;
    const there = new DOMParser().parseFromString(await answer.text(), "text/html");
    if ($(".pager .count", there)?.textContent !== $(".pager .count").textContent) $("#fresh").hidden = false;
  };

  const listen = () => {
    const source = new EventSource(`/events?run=${encodeURIComponent(run)}`);
    let waiting = false;
    const later = () => {
      if (waiting || document.hidden) { waiting = waiting || document.hidden; return; }
      waiting = true;
      setTimeout(() => { waiting = false; refresh().catch(report); }, 700);
    };
    source.onopen = () => {
      const live = $("#live");
      live.hidden = false;
      live.classList.remove("off");
      live.textContent = "live";
      later(); // what changed while nobody listened
      seeMissed().catch(report);
    };
    source.onerror = () => { const live = $("#live"); live.classList.add("off"); live.textContent = "not connected"; };
    source.onmessage = (event) => {
      const told = JSON.parse(event.data);
      if (told.changed.includes("rollouts") && $("#fresh")) $("#fresh").hidden = false;
      later();
    };
    document.addEventListener("visibilitychange", () => { if (!document.hidden && waiting) { waiting = false; later(); } });
    addEventListener("pagehide", () => source.close());
  };

  // --- keys

  const rows = () => $$("[data-row]").filter((row) => !row.hidden);
  const step = (by) => {
    const all = rows();
    if (!all.length) return $("#tokens")?.focus();
    const now = all.findIndex((row) => row.contains(document.activeElement));
    const next = all[Math.min(Math.max(now + by, 0), all.length - 1)];
    const target = $("a.main", next) || $("a", next);
    if (target) target.focus(); else next.scrollIntoView({ block: "nearest" });
  };
  const follow = (selector) => { const link = $(selector); if (link) link.click(); };
  const sibling = (by) => {
    const all = $$(".siblings .chip");
    all[all.findIndex((chip) => chip.hasAttribute("aria-current")) + by]?.click();
  };
  const toJson = () => { location.href = `${location.pathname.replace(/\/$/, "")}.json${location.search}`; };
  let isGoing = false;
  const keys = {
    j: () => step(1), k: () => step(-1), n: () => follow("a[rel=next]"), p: () => follow("a[rel=prev]"),
    "[": () => sibling(-1), "]": () => sibling(1), x: () => Charts.toggleAxis(), t: setTheme, ".": toJson,
    "/": () => { if ($(".fold")) $(".fold").open = true; $("#find, #filters select, #filters input")?.focus(); }, "?": () => $("#help").showModal(),
    g: () => { isGoing = true; setTimeout(() => { isGoing = false; }, 1500); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
    const isField = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && isField) return event.target.blur();
    if (isField) return;
    if (isGoing) {
      isGoing = false;
      if (event.key === "h") { location.href = "/runs"; return; }
      const link = $(`[data-go="${CSS.escape(event.key)}"]`);
      if (link) { event.preventDefault(); link.click(); return; }
    }
    const act = keys[event.key];
    if (act) { event.preventDefault(); act(); }
  });

  // --- begin

  fillMeters();
  chooseRuns();
  if (matchMedia("(max-width: 560px)").matches && !location.search && $(".fold")) $(".fold").open = false;
  $("#theme").addEventListener("click", setTheme);
  $("#help-button").addEventListener("click", () => $("#help").showModal());
  $("#axis")?.addEventListener("click", () => Charts.toggleAxis().catch(report));
  $("#marks")?.addEventListener("change", () => Charts.repaint());
  let resizing = 0;
  addEventListener("resize", () => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(() => Charts.resize()); });
  Charts.update().catch(report);
  Charts.ledger().catch(report);
  Tokens.start().catch(report);
  if (!("still" in document.body.dataset)) listen(); // what is finished does not change
})();
