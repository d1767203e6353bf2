"use strict";
// Light and dark, and the keys of lists: j, k, Enter, /, n, p, and . for the page as JSON.
(() => {
  const setTheme = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
    const next = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try { localStorage.setItem("theme", next); } catch { /* it holds for this page */ }
  };
  document.getElementById("theme").addEventListener("click", setTheme);

  const links = () => [...document.querySelectorAll("[data-row] a.main")];
  const move = (by) => {
    const all = links();
    const at = all.indexOf(document.activeElement);
    all[Math.min(Math.max(at < 0 ? 0 : at + by, 0), all.length - 1)]?.focus();
  };
  const follow = (selector) => document.querySelector(selector)?.click();
  const keys = {
    j: () => move(1), k: () => move(-1), t: setTheme, n: () => follow("a[rel=next]"), p: () => follow("a[rel=prev]"),
    "/": () => document.getElementById("find")?.focus(),
    ".": () => { location.href = `${location.pathname}.json${location.search}`; },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const act = keys[event.key];
    if (act) { event.preventDefault(); act(); }
  });
})();
