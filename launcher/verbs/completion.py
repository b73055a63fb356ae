"""Tab completion. The shell calls `phidias -sc query=bash` with the line so far in COMP_LINE. Hydra completes overrides,
which it can only do with the verb taken out of the line."""

import os
import re
from collections.abc import Sequence

from launcher.verbs import VERBS
from launcher.verbs.app import call_hydra


def complete(words: Sequence[str]) -> int:
    """Answers install, uninstall and query of Hydra's completion scripts."""
    queried = "COMP_LINE" in os.environ and any(word.startswith("query=") for word in words)
    if not queried:
        call_hydra(_no_task, verb="plan", words=words)
        return 0
    line = os.environ["COMP_LINE"]
    found = re.match(r"\s*(\S+(?:\s+-m\s+launcher)?)\s+(\S+)(\s.*)", line)
    if found is None:
        print(" ".join(VERBS))
    elif found[2] in VERBS and VERBS[found[2]].composes:
        os.environ["COMP_LINE"] = f"phidias{found[3]}"
        call_hydra(_no_task, verb=found[2], words=words)
    return 0


def _no_task(config: object) -> None:
    """Hydra wants a task; with --shell-completion it does not run it."""
