// Draws the charts of the report. Data comes from figures.py; colours from the page's CSS, so that both follow the theme.
(async () => {
  "use strict";
  const NUM_COLOURS = 8;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = Object.keys(figures.traces);
  const byId = (name) => document.getElementById("chart-" + name);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 560px)");
  const say = (chart, text) => {
    const note = document.createElement("p");
    note.className = "empty";
    note.textContent = text;
    byId(chart).replaceChildren(note);
  };

  // plotly.js lies gzipped in the page; an inline script runs at once.
  async function loadPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  function faded(hex, alpha) {
    const [red, green, blue] = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    return `rgba(${red},${green},${blue},${alpha})`;
  }

  function styleTrace(trace, chart) {
    const isSource = trace.source !== undefined;
    const own = isSource ? colour("series-" + (trace.source % NUM_COLOURS)) : colour("series-0");
    const digits = chart === "lr" ? ".3e" : chart === "throughput" ? ",.4s" : ".4f";
    const styled = {
      type: "scatter", mode: "lines", x: trace.x, y: trace.y, name: trace.name,
      line: { color: own, width: 2, dash: isSource && trace.source >= NUM_COLOURS ? "dash" : "solid" },
      hovertemplate: `%{y:${digits}}<extra>${trace.name.replace(/[<>&]/g, "")}</extra>`,
    };
    if (trace.kind === "raw") {
      Object.assign(styled, { line: { color: faded(own, dark.matches ? 0.4 : 0.32), width: 1 }, hoverinfo: "skip", hovertemplate: null });
    }
    if (trace.kind === "held_out") {
      const held = isSource ? own : colour("series-1");
      Object.assign(styled, {
        mode: isSource ? "markers" : "lines+markers", showlegend: !isSource,
        line: { color: held, width: 1.5, dash: "dot" },
        marker: { color: held, size: (isSource ? 7 : 8) - (narrow.matches ? 2 : 0), line: { color: colour("surface"), width: narrow.matches ? 0.5 : 1.5 } },
      });
      if (isSource) styled.legendgroup = "source-" + trace.source;
    } else if (isSource) {
      styled.legendgroup = "source-" + trace.source;
    }
    return styled;
  }

  // Stage borders: a line and the stage's name at its beginning; the entropy as a level on the loss chart.
  function marks(chart) {
    const logTokens = document.getElementById("log-tokens").checked;
    const logLoss = document.getElementById("log-loss").checked;
    const shapes = [], annotations = [];
    figures.borders.forEach((border, index) => {
      if (index > 0) {
        shapes.push({ type: "line", x0: border.tokens, x1: border.tokens, y0: 0, y1: 1, yref: "paper", layer: "below",
          line: { color: colour("muted"), width: 1, dash: "dash" } });
      }
      if (chart !== "loss" && chart !== "sources") return;
      // On a logarithmic axis annotations take the exponent, and the first stage has no left end.
      const place = index > 0 ? { x: logTokens ? Math.log10(border.tokens) : border.tokens, xref: "x" } : { x: 0, xref: "paper" };
      // A name would leave the page to the right of a late border.
      const isLate = border.tokens > 0.7 * figures.tokens || (logTokens && index > 0);
      annotations.push({ ...place, y: 1, yref: "paper", yanchor: "bottom", xanchor: isLate ? "right" : "left", showarrow: false,
        text: isLate ? border.name + " →" : border.name, font: { color: colour("muted"), size: 12 } });
    });
    if (chart === "loss" && figures.entropy !== null) {
      const level = figures.entropy;
      shapes.push({ type: "line", x0: 0, x1: 1, xref: "paper", y0: level, y1: level, layer: "below",
        line: { color: colour("series-2"), width: 1.5, dash: "dot" } });
      annotations.push({ x: 1, xref: "paper", xanchor: "right", y: logLoss ? Math.log10(level) : level, yanchor: "bottom",
        showarrow: false, text: `unigram entropy ${level.toFixed(2)}`, font: { color: colour("series-2"), size: 12 } });
    }
    return { shapes, annotations };
  }

  function layoutOf(chart) {
    const big = chart === "loss" || chart === "sources";
    const ink = colour("ink"), muted = colour("muted");
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true,
      tickfont: { color: muted, size: 12 } };
    const logLoss = big && document.getElementById("log-loss").checked;
    const logTokens = document.getElementById("log-tokens").checked;
    return {
      ...marks(chart),
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 },
      margin: { l: 8, r: 10, t: big ? 24 : 8, b: 8 },
      xaxis: { ...axis, type: logTokens ? "log" : "linear", exponentformat: "B", nticks: narrow.matches ? 5 : 0,
        dtick: logTokens ? 1 : null, title: big ? { text: "tokens", standoff: 8, font: { color: muted, size: 12 } } : null, showspikes: big, spikemode: "across",
        spikethickness: 1, spikedash: "solid", spikecolor: colour("line") },
      yaxis: { ...axis, type: logLoss ? "log" : "linear", rangemode: big || chart === "grad_norm" ? "normal" : "tozero",
        exponentformat: chart === "lr" ? "e" : "B", nticks: 8, dtick: logLoss ? "D2" : null },
      showlegend: big, hovermode: "x unified", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      legend: { orientation: "h", x: 0, xanchor: "left", y: -0.16, yanchor: "top", font: { color: ink, size: 12.5 },
        bgcolor: "rgba(0,0,0,0)", itemsizing: "constant" },
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: ink, size: 12.5 } },
    };
  }

  function draw() {
    for (const chart of charts) {
      const traces = figures.traces[chart].filter((trace) => trace.x.length > 0);
      if (traces.length === 0) {
        say(chart, "No rows yet.");
        continue;
      }
      Plotly.react(byId(chart), traces.map((trace) => styleTrace(trace, chart)), layoutOf(chart),
        { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }

  try {
    await loadPlotly();
  } catch (error) {
    charts.forEach((chart) => say(chart, "The charts need a browser with DecompressionStream (any of 2023 or newer)."));
    return;
  }
  draw();
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
  for (const name of ["log-loss", "log-tokens"]) document.getElementById(name).addEventListener("change", draw);
})();
