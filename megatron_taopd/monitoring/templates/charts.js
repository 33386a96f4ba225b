const place = (tip, frame, left) => {
  const x = left / 100 * frame.clientWidth, room = frame.clientWidth - x - 12;
  tip.style.left = tip.style.right = "auto";
  if (tip.offsetWidth <= room) tip.style.left = `${x + 12}px`;
  else tip.style.left = `${Math.max(-40, x - 12 - tip.offsetWidth)}px`;
};
const walk = (element, count, place, go, hide) => {
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const at = place(event), last = count - 1;
    const to = {ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last};
    if (!count || !(event.key in to)) return;
    event.preventDefault();
    go(Math.max(0, Math.min(last, to[event.key])));
  });
};
const escaped = (text) => new Option(text).innerHTML;
for (const plot of document.querySelectorAll(".plot:not(.plane)")) {
  const [frame, tip, cursor] = [".frame", ".tip", ".cursor"].map((s) => plot.querySelector(s));
  const {labels, colors, at} = JSON.parse(plot.querySelector("script").textContent);
  const along = plot.querySelector(".along").textContent;
  const {width, height} = cursor.dataset;
  let chosen = -1;
  const show = (index) => {
    chosen = index;
    const [step, x, values] = at[index];
    const rows = labels.map((label, i) => values[i] === undefined ? "" :
      `<br><i style="background: var(--${colors[i]})"></i>${escaped(label)} ${values[i]}`);
    tip.innerHTML = `<b>${along} ${step}</b>` + rows.join("");
    tip.hidden = false;
    place(tip, frame, x);
    cursor.setAttribute("d", `M${x / 100 * width} 0V${height}`);
  };
  const hide = () => {
    tip.hidden = true;
    cursor.setAttribute("d", "");
  };
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    const left = 100 * (event.clientX - box.left) / box.width;
    const distance = (i) => Math.abs(at[i][1] - left);
    show([...at.keys()].reduce((a, b) => (distance(b) < distance(a) ? b : a)));
  });
  frame.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  walk(plot, at.length, () => chosen, show, hide);
}
