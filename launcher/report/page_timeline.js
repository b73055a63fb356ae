// The run by wall time: a row of bands that say what it did, and below it a row of marks for each kind of event.
const BAND_COLOURS = { training: "good", validation: "good", checkpoint: "series-0", start_up: "series-4", restart: "series-1", hang: "bad", away: "away", other: "muted" };
const LANE_COLOURS = { stages: "good", starts: "series-4", ends: "muted", faults: "bad", rewinds: "series-1", checkpoints: "series-0", other: "series-5" };
const BAND_WORDS = { training: "training", start_up: "start-up", restart: "restart", hang: "hang", away: "queue or stopped", other: "other" };

function timelineTraces(timeline, colour, narrow) {
  const plain = (text) => text.replace(/[<>&]/g, "");
  const broken = (text) => plain(text).replace(new RegExp(`(.{1,${narrow ? 34 : 70}})(?:\\s+|$)`, "g"), "$1<br>");
  const kinds = [...new Set(timeline.bands.map((band) => band.kind))];
  const bands = kinds.map((kind) => {
    const own = timeline.bands.filter((band) => band.kind === kind);
    return {
      type: "bar", orientation: "h", name: BAND_WORDS[kind] || kind, width: 0.6, y: own.map(() => "state"),
      base: own.map((band) => band.begin), x: own.map((band) => band.end - band.begin),
      marker: { color: colour(BAND_COLOURS[kind] || "muted"), line: { width: 0 } }, showlegend: true,
      customdata: own.map((band) => broken(band.words)), hovertemplate: "%{customdata}<extra></extra>",
    };
  });
  const lanes = timeline.lanes.map((lane) => ({
    type: "scatter", mode: "markers", name: lane.name, showlegend: false, x: lane.times, y: lane.times.map(() => lane.name),
    marker: { color: colour(LANE_COLOURS[lane.name] || "muted"), size: narrow ? 10 : 12, symbol: "line-ns-open",
      line: { color: colour(LANE_COLOURS[lane.name] || "muted"), width: 2 } },
    customdata: lane.words.map(broken), hovertemplate: "%{x|%Y-%m-%d %H:%M:%S}<br>%{customdata}<extra></extra>",
  }));
  return [...bands, ...lanes];
}

function timelineLayout(timeline, base, colour, narrow) {
  const hidden = timeline.lanes.filter((lane) => lane.hidden > 0);
  const names = ["state", ...timeline.lanes.map((lane) => lane.name)];
  return {
    ...base, barmode: "overlay", hovermode: "closest", showlegend: true, shapes: [], annotations: hidden.map((lane) => ({
      x: 1, xref: "paper", xanchor: "right", y: lane.name, yref: "y", yanchor: "bottom", yshift: 5, showarrow: false,
      text: `${lane.hidden.toLocaleString("en")} more`, font: { color: colour("muted"), size: 11 } })),
    xaxis: { ...base.xaxis, type: "date", dtick: null, exponentformat: undefined, title: null, showspikes: true, nticks: narrow ? 4 : 0 },
    yaxis: { ...base.yaxis, type: "category", categoryorder: "array", categoryarray: names.reverse(), dtick: 1, nticks: 0,
      range: [-0.6, names.length - 0.4], fixedrange: true, ticks: "", rangemode: "normal" },
    legend: { ...base.legend, y: narrow ? -0.24 : -0.14 },
  };
}
