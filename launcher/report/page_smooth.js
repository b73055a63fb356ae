// Curves over the stretches of the grid that figures.py made of a run's rows, stage by stage.

// Means over the rows around each point: as far as `part` of the stage's tokens in all. The window stays symmetric and, towards
// the beginning, shrinks to half of the way there, so that a steep start is not flattened; towards the end it loses only what is
// not there yet. Points without a value are passed over. Returns x and y with a null between stages, which lifts the pen.
function smoothed(grid, values, part) {
  const x = [], y = [];
  let begin = 0;
  for (const size of grid.sizes) {
    const places = [];
    for (let i = begin; i < begin + size; i++) if (values[i] !== null) places.push(i);
    begin += size;
    if (places.length === 0) continue;
    if (x.length > 0) {
      x.push(null);
      y.push(null);
    }
    const first = grid.tokens[places[0]], last = grid.tokens[places[places.length - 1]];
    let low = 0, high = 0, sum = 0, rows = 0;
    for (const place of places) {
      const at = grid.tokens[place], reach = Math.min(part * (last - first), at - first) / 2;
      for (; high < places.length && grid.tokens[places[high]] <= at + reach; high++) {
        sum += grid.rows[places[high]] * values[places[high]];
        rows += grid.rows[places[high]];
      }
      for (; grid.tokens[places[low]] < at - reach; low++) {
        sum -= grid.rows[places[low]] * values[places[low]];
        rows -= grid.rows[places[low]];
      }
      x.push(at);
      y.push(high - low === 1 ? values[place] : sum / rows);
    }
  }
  return { x, y };
}
