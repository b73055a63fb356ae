// Draws the charts of a comparison. Data comes from compare_page.py; colours from the page's CSS, so that both follow the theme.
(async () => {
  "use strict";
  const NUM_COLOURS = 8;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const byName = (name) => document.getElementById(name);
  const byId = (name) => byName("chart-" + name);
  const charts = ["above", "curves", "sources", "fit"].filter((name) => byId(name));
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 560px)");
  // The best eight have colours; the rest recede.
  const ofGroup = (index) => (index < NUM_COLOURS ? colour("series-" + index) : colour("muted"));
  const plain = (text) => text.replace(/[<>&]/g, "");
  const short = (text) => (narrow.matches && text.length > 16 ? plain(text).slice(0, 15) + "…" : plain(text));

  // plotly.js lies gzipped in the page; an inline script runs at once.
  async function loadPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  function layoutOf(xTitle, more) {
    const ink = colour("ink"), muted = colour("muted");
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true,
      tickfont: { color: muted, size: 12 } };
    const { xaxis, yaxis, ...rest } = more;
    const fewer = narrow.matches ? { nticks: 5 } : {};
    return {
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 }, margin: { l: 8, r: 12, t: 8, b: 8 },
      xaxis: { ...axis, ...fewer, title: { text: xTitle, standoff: 8, font: { color: muted, size: 12 } }, ...xaxis },
      yaxis: { ...axis, ...yaxis }, showlegend: false, hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      legend: { orientation: "h", traceorder: "reversed", x: 0, xanchor: "left", y: -0.18, yanchor: "top", font: { color: ink, size: 12.5 }, bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: ink, size: 12.5 } },
      ...rest,
    };
  }

  const zero = () => ({ type: "line", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper", layer: "below", line: { color: colour("muted"), width: 1 } });
  // Rows by number: labels may repeat once they are cut.
  const rows = (labels) => ({ tickvals: labels.map((_, index) => index), ticktext: labels.map(short), autorange: "reversed", showgrid: false });

  function above() {
    const traces = figures.above.map((one, index) => ({
      type: "scatter", mode: "markers", x: [one.mean], y: [index],
      marker: { color: ofGroup(index), size: 10 },
      error_x: one.low === null ? undefined : { type: "data", symmetric: false, array: [one.high - one.mean],
        arrayminus: [one.mean - one.low], color: ofGroup(index), thickness: 1.5, width: 5 },
      hovertemplate: one.low === null ? "%{x:.4f}<extra></extra>"
        : `%{x:.4f} (${one.low.toFixed(4)} to ${one.high.toFixed(4)})<extra></extra>`,
    }));
    return [traces, layoutOf("nats per token above the best", { yaxis: rows(figures.groups), shapes: [zero()] })];
  }

  function curves() {
    const seen = new Set(), less = byName("less-best").checked;
    const traces = figures.curves.map((curve) => {
      const first = !seen.has(curve.group);
      seen.add(curve.group);
      return {
        type: "scatter", mode: curve.x.length < 30 ? "lines+markers" : "lines", x: curve.x, y: less ? curve.above : curve.y, legendgroup: String(curve.group),
        name: short(figures.groups[curve.group]), showlegend: first && curve.group < NUM_COLOURS,
        line: { color: ofGroup(curve.group), width: curve.group < NUM_COLOURS ? 2 : 1 }, marker: { size: 5 },
        opacity: curve.group < NUM_COLOURS ? 1 : 0.5,
        hovertemplate: `%{y:${less ? "+" : ""}.4f} at %{x:.4s}<extra>${plain(curve.name)}</extra>`,
      };
    });
    const at = { type: "line", x0: figures.tokens, x1: figures.tokens, y0: 0, y1: 1, yref: "paper", layer: "below",
      line: { color: colour("muted"), width: 1, dash: "dash" } };
    const log = byName("log-tokens").checked;
    const xaxis = { type: log ? "log" : "linear", exponentformat: "B", dtick: log ? 1 : null };
    return [traces.reverse(), layoutOf("tokens", { showlegend: true, shapes: [at], xaxis })];
  }

  function sources() {
    const traces = figures.by_source.map((values, index) => ({
      type: "scatter", mode: "markers", name: short(figures.groups[index]), x: values, y: values.map((_, place) => place),
      marker: { color: ofGroup(index), size: index < NUM_COLOURS ? 10 : 6, opacity: index < NUM_COLOURS ? 0.9 : 0.45 },
      showlegend: index < NUM_COLOURS, hovertemplate: `%{x:+.4f}<extra>${plain(figures.groups[index])}</extra>`,
    }));
    return [traces.reverse(), layoutOf("nats per token", { yaxis: { ...rows(figures.sources), showgrid: true }, showlegend: true, shapes: [zero()],
      margin: { l: 8, r: 12, t: 8, b: 8 } })];
  }

  function fit() {
    const { observed, predicted, labels, error } = figures.fit;
    const every = [...observed, ...predicted], ends = [Math.min(...every), Math.max(...every)];
    const points = { type: "scatter", mode: "markers", x: observed, y: predicted, text: labels.map(plain), marker: { color: colour("series-0"), size: 8 },
      error_y: { type: "constant", value: error, color: colour("series-0"), thickness: 0.8, width: 0 },
      hovertemplate: "measured %{x:.4f}, predicted %{y:.4f}<extra>%{text}</extra>" };
    const line = { type: "scatter", mode: "lines", x: ends, y: ends, line: { color: colour("muted"), width: 1, dash: "dash" }, hoverinfo: "skip" };
    return [[line, points], layoutOf("measured", { yaxis: { title: { text: "predicted", font: { color: colour("muted"), size: 12 } } } })];
  }

  const drawn = { above, curves, sources, fit };
  function draw() {
    for (const chart of charts) Plotly.react(byId(chart), ...drawn[chart](), { responsive: true, displaylogo: false, displayModeBar: false });
  }

  try {
    await loadPlotly();
  } catch (error) {
    for (const chart of charts) byId(chart).textContent = "The charts need a browser with DecompressionStream (any of 2023 or newer).";
    return;
  }
  draw();
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
  for (const name of ["log-tokens", "less-best"]) byName(name).addEventListener("change", draw);
})();
