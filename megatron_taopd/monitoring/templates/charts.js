for (const plot of document.querySelectorAll(".plot")) {
  const [svg, tip, cursor] = ["svg", ".tip", ".cursor"].map((s) => plot.querySelector(s));
  const {labels, colors, at} = JSON.parse(plot.querySelector("script").textContent);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const distance = ([, x]) => Math.abs(x - (event.clientX - box.left) / scale);
    const [step, x, values] = at.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const rows = labels.map((label, i) => values[i] === undefined ? "" :
      `<br><i style="background: var(--${colors[i]})"></i>${label} ${values[i]}`);
    tip.innerHTML = `<b>step ${step}</b>` + rows.join("");
    tip.hidden = false;
    const right = x * scale + 12;
    const fits = right + tip.offsetWidth <= box.width;
    tip.style.left = `${fits ? right : x * scale - 12 - tip.offsetWidth}px`;
    cursor.setAttribute("d", `M${x} ${cursor.dataset.top}V${cursor.dataset.bottom}`);
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("d", "");
  });
}
