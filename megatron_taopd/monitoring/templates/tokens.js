const three = (value) => Number(value).toPrecision(3);
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";
const kindNames = JSON.parse(document.getElementById("kinds")?.textContent ?? "{}");
for (const plot of document.querySelectorAll(".plane")) {
  const [frame, tip, spot] = [".frame", ".tip", ".spot"].map((s) => plot.querySelector(s));
  const points = JSON.parse(plot.querySelector("script").textContent);
  const side = plot.querySelector("svg").viewBox.baseVal.width;
  const kept = points.filter((point) => point[3]).sort((a, b) => a[0] - b[0]);
  let chosen = -1;
  const show = ([x, y, kind, isKept, c, d, text]) => {
    tip.innerHTML = `<code>${escaped(visible(text))}</code><br>${kindNames[kind]}` +
      `${isKept ? ", kept" : ""}<br>D ${three(d)} · C ${three(c)}<br>` +
      `D̃ ${three(1 - y / 100)} · C̃ ${three(x / 100)}`;
    tip.hidden = false;
    tip.style.top = y > 60 ? "auto" : `${y}%`;
    tip.style.bottom = y > 60 ? `${100 - y}%` : "auto";
    place(tip, frame, x);
    spot.setAttribute("d", `M${x / 100 * side} ${y / 100 * side}h0`);
  };
  const hide = () => {
    tip.hidden = true;
    spot.setAttribute("d", "");
  };
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    const at = [event.clientX - box.left, event.clientY - box.top];
    const distance = ([x, y]) =>
      Math.hypot(x / 100 * box.width - at[0], y / 100 * box.height - at[1]);
    if (!points.length) return;
    const nearest = points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    if (distance(nearest) < 24) show(nearest); else hide();
  });
  frame.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  walk(plot, kept.length, () => chosen, (next) => show(kept[chosen = next]), hide);
}
const columns = [
  ["D, nats", (t, i) => t.D[i]],
  ["C", (t, i) => t.C[i]],
  ["D̃", (t, i) => t.d[i]],
  ["C̃", (t, i) => t.c[i]],
  ["D̃·C̃, learnable", (t, i) => t.d[i] * t.c[i]],
  ["D̃·(1−C̃), incompatible", (t, i) => t.d[i] * (1 - t.c[i])],
  ["rank", (t, i) => t.rank?.[i]],
  ["log p, student", (t, i) => t.log_p[i]],
  ["log p, teacher", (t, i) => t.log_q?.[i]],
  ["entropy, student", (t, i) => t.student[i]],
  ["entropy, teacher", (t, i) => t.teacher[i]],
];
for (const article of document.querySelectorAll("article.tokens")) {
  const values = JSON.parse(article.querySelector("script").textContent);
  const tokens = [...article.querySelectorAll(".t")], tip = article.querySelector(".tip");
  const show = (token) => {
    const at = tokens.indexOf(token);
    const rows = columns.filter(([, of]) => (of(values, at) ?? null) !== null).map(([name, of]) =>
      `<dt>${name}</dt><dd>${name === "rank" ? of(values, at) : three(of(values, at))}</dd>`);
    tip.innerHTML = `<code>${escaped(visible(token.textContent.replaceAll("⏎\n", "\n")))}</code> ` +
      `${kindNames[values.kinds[at]]}, ${values.kept[at] ? "kept" : "not kept"}` +
      `<dl>${rows.join("")}</dl>`;
    tip.hidden = false;
    const box = article.getBoundingClientRect(), its = token.getClientRects()[0];
    const left = Math.min(its.left - box.left, article.clientWidth - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${its.bottom - box.top + 6}px`;
  };
  const choose = (token) => {
    tokens.forEach((each) => {
      each.tabIndex = each === token ? 0 : -1;
      each.setAttribute("aria-selected", each === token);
    });
    show(token);
  };
  const hide = () => { tip.hidden = true; };
  article.addEventListener("focusin", ({target}) => tokens.includes(target) && choose(target));
  article.addEventListener("focusout", hide);
  article.addEventListener("click", ({target}) => tokens.includes(target) && target.focus());
  article.addEventListener("pointerover", ({target}) => tokens.includes(target) && show(target));
  article.addEventListener("pointerleave", hide);
  const at = ({target}) => tokens.indexOf(target);
  walk(article, tokens.length, at, (next) => tokens[next].focus(), hide);
}
for (const choice of document.querySelectorAll("input[name=step]")) {
  choice.addEventListener("change", () => {
    for (const view of document.querySelectorAll("[data-step]")) {
      view.hidden = view.dataset.step !== choice.value;
    }
  });
}
