"""Compares runs by held-out loss, at equal tokens: phidias compare 'ablation-*'. Runs that differ in their seed alone are one
group. From enough mixtures it fits the loss over them and proposes one (docs/comparing.md).

    phidias compare 'ablation-*' out=compare.html
    phidias compare 'ablation-*' write_mixture=proposed config_dir=my_configs

Keys: runs_dir=runs  stage=X  at_tokens=N  out=json|<page>.html  write_mixture=NAME  config_dir=FOLDER"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from launcher.config.errors import ConfigError, Problem
from launcher.rundir.exits import ExitClass
from launcher.verbs.guard import refuse
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_runs, one_or_more

KEYS = ("runs_dir", "stage", "at_tokens", "out", "write_mixture", "config_dir")


def run(words: Sequence[str]) -> int:
    from launcher.report.compare import compare_runs
    from launcher.report.compare_document import document
    from launcher.report.compare_mixture import path_of_mixture, write_mixture
    from launcher.report.page import ReportError

    names, options = read_run_words(words, keys=KEYS)
    runs = find_runs(one_or_more(names), runs_dir=options.get("runs_dir", RUNS_DIR))
    page, folder = page_of(options.get("out")), options.get("config_dir")
    mixture = path_of_mixture(options["write_mixture"], folder=folder) if "write_mixture" in options else None
    comparison = compare_runs(runs, stage=options.get("stage"), at_tokens=tokens_of(options.get("at_tokens")))
    try:
        if page is not None:
            from launcher.report.compare_page import write_page

            write_page(page, comparison)  # before anything is printed: `| head` must not cost it
    except ReportError as error:
        return refuse(str(error), code=ExitClass.REFUSED)
    if options.get("out") == "json":
        print(json.dumps(document(comparison), indent=1))
    else:
        from launcher.report.compare_table import print_comparison

        print_comparison(comparison)
    if page is not None:
        print(f"page: {page}")
    if mixture is not None:
        write_mixture(mixture, comparison)
        if options.get("out") != "json":
            print(f"written: {mixture}\nnext: phidias plan --config-dir={folder} mixture={mixture.stem} ...")
    return ExitClass.DONE


def page_of(out: str | None) -> Path | None:
    if out is None or out == "json":
        return None
    if not out.endswith(".html"):
        raise ConfigError(Problem("out", repr(out), "it is json or the path of a page", "out=json or out=compare.html"))
    return Path(out)


def tokens_of(text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(Problem("at_tokens", repr(text), "it is a number of tokens above 0", "at_tokens=1e9"))
    return value
