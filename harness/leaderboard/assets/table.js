"use strict";
/* Sortable, searchable, paged tables over DataTables: real table elements, sorted by buttons in the heads.
   The library is given nodes to show and plain values to sort and search, never markup. */
const Table = (() => {
  const { el } = Site;

  /* Figures sort by value, rows without one last in both directions. */
  const byFigure = (sign) => (a, b) => (a === "") - (b === "") || sign * (a - b);
  DataTable.ext.type.order["figure-asc"] = byFigure(1);
  DataTable.ext.type.order["figure-desc"] = byFigure(-1);

  /* Text to search in: the library would read "&" as markup. */
  const searchable = (value) => (value === null || value === undefined ? "" : String(value).replace(/[&<>]/g, " "));

  /* columns: {title, note, value(row) -> number, text or null, show(row) -> node or text, isNumber, isRowHead, lowFirst}.
     options: caption, pageLength, search (label), empty. Returns {node, api, filter(name, keep)}. */
  function make(columns, rows, { caption, pageLength = 25, search = "Search", empty = "No row" }) {
    const heads = columns.map((column) => el("th", { scope: "col", title: column.note, class: column.isNumber ? "num" : "left" }, column.title));
    const table = el("table", { class: "data" }, el("caption", { class: "hidden" }, caption), el("thead", {}, el("tr", {}, heads)));
    const holder = el("div", { class: "datatable" }, table);
    const wide = () => holder.querySelector(".dt-layout-table");
    const isPaged = rows.length > pageLength;
    const api = new DataTable(table, {
      data: rows,
      columns: columns.map((column) => ({
        data: null,
        searchable: !column.isNumber || Boolean(column.words),
        type: column.isNumber ? "figure" : "string",
        className: [column.isNumber ? "num" : "left", column.className || ""].join(" ").trim(),
        cellType: column.isRowHead ? "th" : "td",
        orderSequence: column.isNumber && !column.lowFirst ? ["desc", "asc"] : ["asc", "desc"],
        createdCell: column.isRowHead ? (cell) => cell.setAttribute("scope", "row") : undefined,
        render: (data, type, row) => {
          const value = column.value(row);
          if (type === "display") return el("span", {}, column.show ? column.show(row) : (value ?? Site.DASH));
          if (type === "filter") return searchable(column.words ? column.words(row) : value);
          if (!column.isNumber) return searchable(value).toLowerCase();
          return value ?? "";
        },
      })),
      order: [],
      drawCallback() {
        const paging = holder.querySelector(".dt-paging");
        if (paging) paging.hidden = this.api().page.info().pages < 2;
      },
      orderMulti: false,
      autoWidth: false,
      paging: isPaged,
      pageLength,
      layout: {
        topStart: rows.length > 8 ? { search: { text: search } } : null,
        topEnd: isPaged ? "pageLength" : null,
        bottomStart: isPaged ? "info" : null,
        bottomEnd: isPaged ? "paging" : null,
      },
      lengthMenu: [25, 50, 100, 250].includes(pageLength) ? [25, 50, 100, 250] : [pageLength, 25, 50, 100],
      language: { emptyTable: empty, zeroRecords: empty, lengthMenu: "_MENU_ rows a page", info: "_START_ to _END_ of _TOTAL_ rows", infoFiltered: "(of _MAX_)" },
    });
    const region = wide();
    if (region) {
      region.setAttribute("role", "region");
      region.setAttribute("aria-label", caption);
      region.tabIndex = 0;
    }
    return {
      node: holder,
      api,
      /* Show only rows for which keep(row) holds; null takes the filter away. */
      filter(name, keep) {
        api.search.fixed(name, keep && ((text, row) => keep(row))).draw();
      },
      destroy: () => api.destroy(true),
    };
  }

  return { make };
})();
