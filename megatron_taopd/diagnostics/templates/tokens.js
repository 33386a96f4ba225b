const panel = document.querySelector("aside");
const element = (name, text, parent) => {
  const made = parent.appendChild(document.createElement(name));
  made.textContent = text;
  return made;
};
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";
function show(token) {
  panel.replaceChildren();
  element("h3", visible(token.text), panel);
  const list = element("dl", "", panel);
  const names = {learnable: "learnable", incompatible: "incompatible", D: "D, nats", C: "C",
    gain: "gain, nats"};
  for (const [key, name] of Object.entries(names)) {
    element("dt", name, list);
    element("dd", token[key].toFixed(3), list);
  }
  for (const [who, color, other] of [["student", 1, "teacher"], ["teacher", 3, "student"]]) {
    element("h4", `${who[0].toUpperCase()}${who.slice(1)}, likeliest`, panel);
    const table = element("table", "", panel);
    for (const [text, p] of token[who]) {
      const row = element("tr", "", table);
      const shared = token[other].some(([its]) => its === text);
      element("td", visible(text) + (shared ? "" : " ·"), row).title =
        shared ? "" : `not among the ${other}'s shown`;
      const bar = element("td", "", row);
      bar.className = "bar";
      element("span", "", bar).style.cssText = `width:${100 * p}%;background:var(--${color})`;
      const value = element("td", `${(100 * p).toFixed(1)} %`, row);
      value.className = "num";
    }
  }
}
let chosen = null;
for (const view of document.querySelectorAll(".view")) {
  const tokens = JSON.parse(view.querySelector("script").textContent);
  const spans = [...view.querySelectorAll(".t")];
  const choose = (span) => {
    chosen?.setAttribute("aria-selected", "false");
    spans.forEach((each) => (each.tabIndex = each === span ? 0 : -1));
    span.setAttribute("aria-selected", "true");
    chosen = span;
    show(tokens[spans.indexOf(span)]);
  };
  view.addEventListener("click", ({target}) => {
    if (spans.includes(target)) { target.focus(); choose(target); }
  });
  view.addEventListener("focusin", ({target}) => spans.includes(target) && choose(target));
  view.addEventListener("pointerover", ({target}) => {
    const at = spans.indexOf(target);
    if (at >= 0) show(tokens[at]);
  });
  view.addEventListener("pointerleave", () => {
    const of = chosen?.closest(".view");
    if (of === view) show(tokens[spans.indexOf(chosen)]);
  });
  view.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1}[event.key];
    const next = step && spans[spans.indexOf(event.target) + step];
    if (next) { event.preventDefault(); next.focus(); }
  });
}
