/** A new element; strings among the children become text, never markup. */
export function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null));
  return made;
}
