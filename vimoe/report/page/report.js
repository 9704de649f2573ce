"use strict";
// A figure that was drawn in a fold has no width until it is told that its place has one.
document.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")), true);

// Copies a table as a table: a spreadsheet takes its cells, a document its rows.
document.addEventListener("click", ({ target }) => {
  if (!target.matches("button.copy")) return;
  const selection = getSelection();
  selection.selectAllChildren(target.closest(".table").querySelector(".scroll"));
  const copied = document.execCommand("copy");  // works in a file, where a page may not ask for the clipboard
  selection.removeAllRanges();
  target.textContent = copied ? "Copied" : "Select and copy by hand";
  setTimeout(() => { target.textContent = "Copy"; }, 2000);
});
