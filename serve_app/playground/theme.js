// Before the first paint, so that a chosen theme does not flash. A classic script: modules run later.
"use strict";

(() => {
  const chosen = localStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
