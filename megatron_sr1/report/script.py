"""The script of a page: draws the figures with Plotly, and filters the gallery.

Figures are drawn once they come near the visible part, in the colours of the style sheet, and again
when the reader switches between light and dark. Nothing is requested from any host.
"""

DRAW = """
const charts = [...document.querySelectorAll(".chart")];
const coarse = matchMedia("(pointer: coarse)").matches;
const hovers = matchMedia("(hover: hover)").matches;
const config = {responsive: true, displaylogo: false, displayModeBar: hovers ? "hover" : false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], plotlyServerURL: ""};

function averaged(trace) {  // centred, over a tenth of the values
  const half = Math.floor(trace.y.length / 20), sums = [0];
  trace.y.forEach((y, i) => sums.push(sums[i] + y));
  const y = trace.y.map((_, i) => {
    const first = Math.max(i - half, 0), end = Math.min(i + half + 1, trace.y.length);
    return (sums[end] - sums[first]) / (end - first);
  });
  return {...trace, y, hoverinfo: "skip"};
}

function titled(axis, own) {
  return {...axis, ...own, title: {...own.title, font: {size: 12}}};
}

function drawn(chart) {
  const css = getComputedStyle(document.documentElement);
  const value = (name) => css.getPropertyValue(name).trim();
  const paint = (key, v) => key === "color" && String(v).startsWith("--") ? value(v) : v;
  const {data, layout} = JSON.parse(chart.nextElementSibling.textContent, paint);
  const traces = data.flatMap((trace) => {
    if (trace.type !== "scatter" || trace.stackgroup || trace.y.length <= 20) return [trace];
    const pale = {line: {...trace.line, width: 1}, opacity: 0.35, showlegend: false};
    const group = {legendgroup: trace.name};
    return [{...trace, ...group, ...pale}, {...averaged(trace), ...group}];
  });
  const axis = {gridcolor: value("--rule"), linecolor: value("--rule"),
    zerolinecolor: value("--soft"), automargin: true, fixedrange: coarse};
  const looks = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: "same",
    font: {family: css.fontFamily, size: 12, color: value("--soft")}, hovermode: "x unified",
    margin: {l: 46, r: 12, t: 8, b: 38}, dragmode: coarse ? false : "zoom",
    hoverlabel: {bgcolor: value("--card"), bordercolor: value("--rule"),
      font: {color: value("--ink")}},
    showlegend: data.length > 1,
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: value("--soft"), activecolor: value("--ink")},
    ...layout, xaxis: titled(axis, layout.xaxis), yaxis: titled(axis, layout.yaxis),
  };
  return [traces, looks];
}

function draw(chart) {
  if (!window.Plotly) {
    chart.textContent = "plotly.min.js is not beside this page; `report --inline` puts it inside.";
    return;
  }
  chart.classList.add("drawn");
  Plotly.react(chart, ...drawn(chart), config);
}

const near = new IntersectionObserver((entries) => {
  for (const {isIntersecting, target} of entries) {
    if (isIntersecting && !target.classList.contains("drawn")) draw(target);
  }
}, {rootMargin: "300px"});
charts.forEach((chart) => near.observe(chart));
const again = () => document.querySelectorAll(".chart.drawn").forEach(draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
addEventListener("beforeprint", () => charts.filter((c) => c.checkVisibility()).forEach(draw));
"""

FILTER = """
for (const gallery of document.querySelectorAll(".gallery")) {
  const cards = [...gallery.querySelectorAll(".sample")];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const inputs = [...gallery.querySelectorAll("[data-filter]")];
  const counted = gallery.querySelector("output"), more = gallery.querySelector(".more");
  const page = Number(gallery.dataset.page);
  let limit = page;

  function show() {
    const wanted = Object.fromEntries(inputs.map((i) => [i.dataset.filter, i.value]));
    const fits = (element, name) => !wanted[name] || element.dataset[name] === wanted[name];
    let found = 0;
    for (const card of cards) {
      const said = [...card.querySelectorAll(".said")];
      said.forEach((one) => one.classList.toggle("found",
        Boolean(wanted.cell || wanted.run) && fits(one, "cell") && fits(one, "run")));
      const fit = fits(card, "origin") && fits(card, "source")
        && texts.get(card).includes((wanted.search || "").toLowerCase())
        && said.some((one) => fits(one, "cell") && fits(one, "run"));
      card.hidden = !fit || ++found > limit;
    }
    counted.textContent = `${Math.min(found, limit)} of ${found} shown`;
    more.hidden = found <= limit;
  }

  inputs.forEach((input) => input.addEventListener("input", () => { limit = page; show(); }));
  more.addEventListener("click", () => { limit += page; show(); });
  gallery.querySelector(".filters").hidden = false;
  show();
}
"""

SCRIPT = '"use strict";' + DRAW + FILTER
