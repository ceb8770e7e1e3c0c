// Small helps of every page: cells of tables know their heads (they stack on telephones), and the map of the chapters.
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
