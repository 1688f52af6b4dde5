"use strict";
// a chart is read out at the place of the pointer, or step by step with the arrow keys
for (const figure of document.querySelectorAll("figure[data-stops]")) {
  const stops = JSON.parse(figure.dataset.stops), plot = figure.querySelector(".plot"), out = figure.querySelector(".readout");
  if (!stops.length) continue;
  const cursor = plot.querySelector(".cursor"), dots = plot.querySelector(".here");
  let at = stops.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(stops.length - 1, index));
    const [x, text, ys] = stops[at];
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    dots.replaceChildren(...ys.map((y) => {
      const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      dot.setAttribute("cx", x); dot.setAttribute("cy", y); dot.setAttribute("r", 4);
      return dot;
    }));
    plot.classList.add("on");
    plot.setAttribute("aria-valuenow", at + 1);
    plot.setAttribute("aria-valuetext", text);
    out.textContent = text;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width;
    let best = 0;
    stops.forEach((stop, index) => { if (Math.abs(stop[0] - x) < Math.abs(stops[best][0] - x)) best = index; });
    show(best);
  });
  plot.addEventListener("keydown", (event) => {
    const to = {ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: stops.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  plot.addEventListener("focus", () => show(at));
}
// a closed gallery would be missing on paper
let closed = [];
addEventListener("beforeprint", () => { closed = [...document.querySelectorAll("details:not([open])")]; closed.forEach((each) => { each.open = true; }); });
addEventListener("afterprint", () => closed.forEach((each) => { each.open = false; }));
