"""Prints what a run came to, and writes report.html into its directory, with loss curves, exposure and what happened; one file,
no network needed.

Keys: runs_dir=runs"""

from collections.abc import Sequence

from launcher.rundir.exits import ExitClass
from launcher.verbs.guard import refuse
from launcher.verbs.request import read_run_words
from launcher.verbs.runs import RUNS_DIR, find_run, one_or_more


def run(words: Sequence[str]) -> int:
    from launcher.report.page import ReportError, make_report
    from launcher.report.summary import print_summary

    names, options = read_run_words(words, keys=("runs_dir",))
    try:
        for name in one_or_more(names):
            directory = find_run(name, runs_dir=options.get("runs_dir", RUNS_DIR))
            print_summary(make_report(directory))
            print(f"report: {directory.report}")
    except ReportError as error:
        return refuse(str(error), code=ExitClass.REFUSED)
    return ExitClass.DONE
