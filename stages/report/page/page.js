// Sort a table by the column whose heading is clicked. The page is complete without this.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    if (!button.textContent) return;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[index].textContent;
      const value = (row) => parseFloat(text(row).replaceAll(",", ""));
      const byNumber = heading.classList.contains("number");
      const compare = (a, b) =>
        byNumber ? (isNaN(value(a)) - isNaN(value(b))) || value(a) - value(b) : text(a).localeCompare(text(b), "en", { numeric: true });
      const rows = [...body.rows].sort(compare);
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
