// Small helps of every page: cells of tables know their heads (they stack on telephones), terms show their definition
// when they are pointed at, and the map of the chapters shows what stands behind one.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table.table")) {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    if (heads.length < 3) continue;
    table.classList.add("stacks");
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.children].forEach((cell, i) => (cell.dataset.label = heads[i] || ""));
    }
  }

  const definition = document.createElement("div");
  definition.className = "definition";
  definition.id = "definition";
  definition.setAttribute("role", "tooltip");
  for (const term of document.querySelectorAll("article a.term[title]")) {
    const text = term.title;
    term.removeAttribute("title"); // or the browser would show it as well
    const show = () => {
      definition.textContent = text;
      document.body.append(definition);
      term.setAttribute("aria-describedby", "definition");
      const word = term.getBoundingClientRect(), box = definition.getBoundingClientRect();
      const left = Math.max(8, Math.min(word.left, document.documentElement.clientWidth - box.width - 8));
      const above = word.bottom + box.height + 8 > window.innerHeight && word.top > box.height + 8;
      definition.style.left = `${left + window.scrollX}px`;
      definition.style.top = `${(above ? word.top - box.height - 6 : word.bottom + 6) + window.scrollY}px`;
    };
    const hide = () => {
      definition.remove();
      term.removeAttribute("aria-describedby");
    };
    for (const event of ["pointerenter", "focus"]) term.addEventListener(event, show);
    for (const event of ["pointerleave", "blur"]) term.addEventListener(event, hide);
    term.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  }

  for (const map of document.querySelectorAll("svg.map")) {
    const links = [...map.querySelectorAll("a")];
    const show = (link) => {
      const behind = link ? new Set(link.dataset.needs.split(" ").filter(Boolean)) : new Set();
      const chosen = link && link.dataset.chapter;
      map.classList.toggle("chosen", Boolean(link));
      for (const other of links) {
        const chapter = other.dataset.chapter;
        other.classList.toggle("behind", chapter === chosen || behind.has(chapter));
      }
      for (const arc of map.querySelectorAll("path")) {
        const { from, to } = arc.dataset;
        arc.classList.toggle("behind", (from === chosen || behind.has(from)) && behind.has(to));
      }
    };
    for (const link of links) {
      for (const event of ["pointerenter", "focus"]) link.addEventListener(event, () => show(link));
      for (const event of ["pointerleave", "blur"]) link.addEventListener(event, () => show(null));
    }
  }
});
