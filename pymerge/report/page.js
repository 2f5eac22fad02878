"use strict";
// The table of tensors is filtered and sorted; the address keeps both, so that a view can be shared.
(() => {
  const table = document.getElementById("tensors");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const box = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const state = { filter: "", column: -1, descending: false };

  const value = (row, column) => {
    const text = row.cells[column].dataset.value;
    return text === undefined ? null : Number(text);
  };

  function compare(a, b) {
    const { column, descending } = state;
    if (column < 0) return a.number - b.number;
    if (heads[column].classList.contains("text")) {
      const left = a.row.cells[column].textContent;
      const right = b.row.cells[column].textContent;
      const order = left.localeCompare(right, "en", { numeric: true });
      return (descending ? -order : order) || a.number - b.number;
    }
    const left = value(a.row, column);
    const right = value(b.row, column);
    if (left === null || right === null) return (left === null) - (right === null) || a.number - b.number;
    return (descending ? right - left : left - right) || a.number - b.number;
  }

  function show() {
    const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const name = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => name.includes(word));
      count += row.hidden ? 0 : 1;
    }
    const sorted = rows.map((row, number) => ({ row, number })).sort(compare);
    body.append(...sorted.map((each) => each.row));
    heads.forEach((head, column) => {
      const order = state.descending ? "descending" : "ascending";
      head.setAttribute("aria-sort", column === state.column ? order : "none");
    });
    shown.textContent = `${count} of ${rows.length} tensors`;
  }

  function remember() {
    const words = new URLSearchParams();
    if (state.filter) words.set("filter", state.filter);
    if (state.column >= 0) words.set("sort", `${state.column}${state.descending ? "d" : "a"}`);
    const text = words.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }

  function recall() {
    const words = new URLSearchParams(location.hash.slice(1));
    const sort = /^(\d+)([ad])$/.exec(words.get("sort") || "");
    state.filter = words.get("filter") || "";
    state.column = sort && Number(sort[1]) < heads.length ? Number(sort[1]) : -1;
    state.descending = Boolean(sort) && sort[2] === "d";
    box.value = state.filter;
    show();
  }

  box.addEventListener("input", () => {
    state.filter = box.value;
    show();
    remember();
  });
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const again = state.column === column;
      const text = head.classList.contains("text");
      state.descending = again ? !state.descending : !text;
      state.column = column;
      show();
      remember();
    });
  });
  addEventListener("hashchange", recall);

  for (const plot of document.querySelectorAll(".plot")) {
    for (const key of plot.querySelectorAll(".key")) {
      key.addEventListener("click", () => {
        const on = key.getAttribute("aria-pressed") !== "true";
        key.setAttribute("aria-pressed", String(on));
        const line = plot.querySelector(`.series[data-series="${key.dataset.series}"]`);
        line.style.display = on ? "" : "none";
      });
    }
  }
  recall();
})();
