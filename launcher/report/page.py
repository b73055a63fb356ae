"""The report page: one HTML file with everything in it, plotly.js too, that needs no network.

page.html, page.css and page.js lie beside this module; Python fills in tables and numbers and decimates the curves.
"""

import base64
import gzip
import json
import time
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from launcher.config.schema import ModelConfig, RunConfig
from launcher.report.figures import build_figures
from launcher.report.history import History, read_history
from launcher.report.report_charts import CHARTS, GROUPS, charts_html
from launcher.report.report_config import config_section
from launcher.report.report_contamination import contamination_section
from launcher.report.report_eval import eval_section
from launcher.report.report_plan import Plans, plan_section
from launcher.report.summary import Summary, summarise
from launcher.report.tables import cards, events_table, exposure_table, held_out_table, places_list, stages_table, time_table
from launcher.rundir.freeze import read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_json, write_atomic

SHOWN_PACKAGES = ("megatron-core", "torch", "transformer-engine")


class ReportError(Exception):
    """A report that cannot be written: what is missing and how to get it."""


def make_report(run: RunDir) -> Summary:
    """Writes report.html, of a run that goes on as far as it is, and returns what it sums up: a month's rows take seconds to
    read."""
    config, history = read_config(run), read_history(run)
    summary = summarise(run, config, history=history)
    write_atomic(run.report, render_page(run, config=config, history=history, summary=summary))
    return summary


def render_page(run: RunDir, *, config: RunConfig, history: History, summary: Summary) -> str:
    """The page as text, 2 MB to 4 MB, most of it plotly.js."""
    plans = Plans(run)
    figures = build_figures(history, config=config, summary=summary, plans=plans)
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Template(_asset("page.html")).substitute(
        title=escape(summary.name),
        state=escape(summary.state),
        subtitle=escape(describe_model(config.model)),
        code=escape(describe_code(run)),
        written=now,
        css=_asset("page.css"),
        js=_asset("page_smooth.js") + _asset("page_timeline.js") + _asset("page.js"),
        plotly=_plotly_base64(),
        figures=_script_json({**figures, "charts": CHARTS}),
        cards=cards(summary, history=history, plans=plans),
        plan=plan_section(history, plans=plans, bands=summary.bands),
        differences=config_section(config, history=history),
        **{f"{group}_charts": charts_html(group, traces=figures["traces"]) for group in GROUPS},
        evaluated=eval_section(run, stages=config.stage_names) + contamination_section(config),
        time=time_table(summary),
        stages=stages_table(summary, config=config),
        exposure=exposure_table(summary, config=config),
        held_out=held_out_table(summary),
        events=events_table(history.events),
        places=places_list(summary),
        config=escape(run.config.read_text()),
    )


def describe_model(model: ModelConfig) -> str:
    heads = f"{model.num_attention_heads} heads in {model.num_query_groups} groups"
    return f"{model.name} · {model.num_layers} layers · hidden {model.hidden_size} · {heads} · vocabulary {model.vocab_size:,}"


def describe_code(run: RunDir) -> str:
    """The code version that the run recorded, in a few words."""
    code = read_json(run.code) if run.code.exists() else {}
    packages = code.get("packages") or {}
    words = [
        f"Phidias {code.get('version') or 'of unknown version'}",
        str(code.get("commit") or "")[:12] + (" with uncommitted changes" if code.get("dirty") else ""),
        *(f"{name} {packages[name]}" for name in SHOWN_PACKAGES if packages.get(name)),
    ]
    return " · ".join(word for word in words if word)


def _asset(name: str) -> str:
    return (files("launcher.report") / name).read_text(encoding="utf-8")


def _plotly_base64() -> str:
    """plotly.js, gzipped: 4.8 MB become 2.0 MB, which the browser unpacks itself. ReportError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError("the report page needs plotly, which is not installed. Fix: pip install 'phidias[train]'") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _script_json(value: Any) -> str:
    """JSON that may stand in a <script>: no text in it can close the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
