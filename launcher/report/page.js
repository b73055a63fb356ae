// Draws the charts of the report. Data comes from figures.py; colours from the page's CSS, so that both follow the theme.
(async () => {
  "use strict";
  const NUM_COLOURS = 8;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const byId = (name) => document.getElementById("chart-" + name);
  const control = (name) => document.getElementById(name);
  const charts = Object.keys(figures.traces).filter((chart) => byId(chart));
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

  // Curves lie over the grid; others have tokens of their own.
  function pointsOf(trace) {
    if (trace.x) return { x: trace.x, y: trace.y };
    return smoothed(figures.grid, trace.y, trace.kind === "mean" ? control("smoothing").value / 100 : 0);
  }

  function styleTrace(trace, chart, index) {
    const isSource = trace.source !== undefined, kind = figures.charts[chart];
    const number = trace.kind === "part" ? index : isSource ? trace.source : 0;
    const own = colour("series-" + (number % NUM_COLOURS));
    const styled = {
      type: "scatter", mode: "lines", ...pointsOf(trace), name: trace.name,
      line: { color: own, width: 2, dash: isSource && trace.source >= NUM_COLOURS ? "dash" : "solid" },
      hovertemplate: `%{y:${kind.format}}${kind.suffix || ""}<extra>${trace.name.replace(/[<>&]/g, "")}</extra>`,
    };
    if (isSource) styled.legendgroup = "source-" + trace.source;
    if (trace.kind === "raw") {
      Object.assign(styled, { line: { color: faded(own, dark.matches ? 0.4 : 0.32), width: 1 }, hoverinfo: "skip", hovertemplate: null });
    } else if (trace.kind === "plan") {
      styled.line = { color: colour("muted"), width: 1.5, dash: "dash" };
    } else if (trace.kind === "part") {
      // Areas do not know of gaps: the stages join.
      const known = styled.x.map((tokens) => tokens !== null);
      for (const axis of ["x", "y"]) styled[axis] = styled[axis].filter((_, place) => known[place]);
      Object.assign(styled, { stackgroup: "step", line: { color: own, width: 0 }, fillcolor: faded(own, 0.75) });
    } else if (trace.kind === "held_out") {
      const held = isSource ? own : colour("series-1");
      Object.assign(styled, {
        mode: isSource ? "markers" : "lines+markers", showlegend: !isSource,
        line: { color: held, width: 1.5, dash: "dot" },
        marker: { color: held, size: (isSource ? 7 : 8) - (narrow.matches ? 2 : 0), line: { color: colour("surface"), width: narrow.matches ? 0.5 : 1.5 } },
      });
    }
    return styled;
  }

  // Stage borders: a line and the stage's name at its beginning; the entropy as a level on the loss chart.
  function marks(chart) {
    const logTokens = control("log-tokens").checked;
    const logLoss = control("log-loss").checked;
    const shapes = [], annotations = [];
    figures.borders.forEach((border, index) => {
      if (index > 0) {
        shapes.push({ type: "line", x0: border.tokens, x1: border.tokens, y0: 0, y1: 1, yref: "paper", layer: "below",
          line: { color: colour("muted"), width: 1, dash: "dash" } });
      }
      if (!figures.charts[chart].big) return;
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

  function baseLayout() {
    const ink = colour("ink"), muted = colour("muted");
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true,
      tickfont: { color: muted, size: 12 } };
    const logTokens = control("log-tokens").checked;
    return {
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 },
      margin: { l: 8, r: 10, t: 8, b: 8 },
      xaxis: { ...axis, type: logTokens ? "log" : "linear", exponentformat: "B", nticks: narrow.matches ? 5 : 0,
        dtick: logTokens ? 1 : null, spikemode: "across", spikethickness: 1, spikedash: "solid", spikecolor: colour("line") },
      yaxis: { ...axis, nticks: 8 },
      hovermode: "x unified", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      legend: { orientation: "h", x: 0, xanchor: "left", y: -0.16, yanchor: "top", font: { color: ink, size: 12.5 },
        bgcolor: "rgba(0,0,0,0)", itemsizing: "constant" },
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: ink, size: 12.5 }, align: "left" },
    };
  }

  function layoutOf(chart) {
    const base = baseLayout(), kind = figures.charts[chart];
    const logLoss = kind.big && control("log-loss").checked;
    return {
      ...base, ...marks(chart), margin: { ...base.margin, t: kind.big ? 24 : 8 },
      xaxis: { ...base.xaxis, showspikes: !!kind.big, title: kind.big ? { text: "tokens", standoff: 8, font: base.xaxis.tickfont } : null },
      yaxis: { ...base.yaxis, type: logLoss ? "log" : "linear", rangemode: kind.zero ? "tozero" : "normal", tickformat: kind.tick || "",
        ticksuffix: kind.suffix || "", exponentformat: kind.exponent ? "e" : "B", dtick: logLoss ? "D2" : null },
      showlegend: !!(kind.big || kind.wide || kind.stacked),
    };
  }

  const settings = { responsive: true, displaylogo: false, displayModeBar: false };

  function drawChart(chart) {
    const traces = figures.traces[chart];
    if (traces.length === 0) {
      say(chart, "No rows yet.");
      return;
    }
    Plotly.react(byId(chart), traces.map((trace, index) => styleTrace(trace, chart, index)), layoutOf(chart), settings);
  }

  function drawTimeline() {
    if (figures.timeline.bands.length + figures.timeline.lanes.length === 0) {
      say("timeline", "No events.");
      return;
    }
    const traces = timelineTraces(figures.timeline, colour, narrow.matches);
    Plotly.react(byId("timeline"), traces, timelineLayout(figures.timeline, baseLayout(), colour, narrow.matches), settings);
  }

  function draw() {
    charts.forEach(drawChart);
    drawTimeline();
  }

  // The large charts follow the hand, the rest its end.
  let waits = false;
  function smoothing(isOver) {
    control("smoothing-told").textContent = control("smoothing").value + "%";
    const changed = charts.filter((chart) => (isOver || figures.charts[chart].big) && figures.traces[chart].some((trace) => trace.kind === "mean"));
    if (waits && !isOver) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      changed.forEach(drawChart);
    });
  }

  control("smoothing").value = 100 * figures.smoothing;
  control("smoothing-told").textContent = control("smoothing").value + "%";
  try {
    await loadPlotly();
  } catch (error) {
    [...charts, "timeline"].forEach((chart) => say(chart, "The charts need a browser with DecompressionStream (any of 2023 or newer)."));
    return;
  }
  draw();
  control("smoothing").addEventListener("input", () => smoothing(false));
  control("smoothing").addEventListener("change", () => smoothing(true));
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
  for (const name of ["log-loss", "log-tokens"]) control(name).addEventListener("change", () => charts.forEach(drawChart));
})();
