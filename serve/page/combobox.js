// A search box whose matches open below it.

import { element } from "./element.js";

/** The combobox pattern of the ARIA Authoring Practices: focus stays in `input`, the arrows walk the list. */
export function combobox(input, { find, label, choose, fail }) {
  const list = document.getElementById(input.getAttribute("aria-controls"));
  let found = [], active = -1, lookup = null, timer;

  const activate = (index) => {
    active = found.length ? (index + found.length) % found.length : -1;
    [...list.children].forEach((option, i) => option.setAttribute("aria-selected", i === active));
    if (active < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", list.children[active].id);
    list.children[active].scrollIntoView({ block: "nearest" });
  };
  const show = (open) => {
    list.hidden = !open;
    input.setAttribute("aria-expanded", open);
  };
  const close = () => {
    clearTimeout(timer);
    lookup?.abort();
    found = [];
    activate(-1);
    show(false);
  };
  const open = async () => {
    lookup?.abort();
    const { signal } = (lookup = new AbortController());
    try {
      found = await find(input.value.trim(), signal);
    } catch (error) {
      if (!signal.aborted) fail(error);
      return;
    }
    if (signal.aborted) return;
    list.replaceChildren(...found.map((entry, i) => optionOf(`${list.id}-${i}`, ...label(entry))));
    if (!found.length) {
      list.append(optionOf(`${list.id}-none`, "Nothing found", ""));
      list.firstElementChild.setAttribute("aria-disabled", true);
    }
    show(true);
    activate(0);
  };
  const pick = (index) => {
    choose(found[index]);
    input.value = "";
    close();
  };

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(open, 150);
  });
  input.addEventListener("click", open);
  input.addEventListener("blur", () => {
    if (!document.querySelector("dialog[open]")) close(); // a search that waits for the token goes on after it
  });
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) list.hidden ? open() : activate(active + step);
    else if (event.key === "Enter" && (active >= 0 || input.value)) active >= 0 && pick(active);
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
  });
  list.addEventListener("mousedown", (event) => event.preventDefault()); // keeps the focus in `input`
  list.addEventListener("click", (event) => {
    const index = [...list.children].indexOf(event.target.closest("[role=option]"));
    if (found[index]) pick(index);
  });
}

function optionOf(id, name, detail) {
  return element("li", { id, role: "option" }, name, element("small", {}, detail));
}
