"""`phidias <verb> ...`: finds the verb and runs it.

Imports nothing heavy: `phidias --help` must answer at once. A verb is a module of launcher/verbs, imported when it is named.
"""

import difflib
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from launcher.rundir.exits import ExitClass
from launcher.verbs import VERBS
from launcher.verbs.guard import guard, refuse

EXIT_CODES = (
    "exit codes: 0 done, 2 refused, 3 refused for state on disk, 10 to go on, 11 to retry, 13 needs a person, 130 stopped"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `phidias` with these arguments, the command line's by default."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":  # the name Hydra's users know; inside a Hydra app it is always set
        os.environ["PHIDIAS_DEBUG"] = "1"
    if any(word in ("-sc", "--shell-completion", "--shell_completion") for word in words[:1]):
        return guard(lambda: _module("completion").complete(words))
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return ExitClass.DONE
    if words[0] == "--version":
        from launcher.rundir.code import installed

        print(f"phidias {installed('phidias') or 'from source'}")
        return ExitClass.DONE
    return run_verb(words[0], words=words[1:])


def run_verb(name: str, *, words: list[str]) -> int:
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
        return refuse(f"no verb {name!r}: {hint}", code=ExitClass.REFUSED)
    verb = VERBS[name]
    if verb.composes:
        with uncollected():
            return guard(lambda: _module("app").run_config_verb(name, words=words))
    if any(word in ("-h", "--help") for word in words):
        print(f"usage: phidias {name} {verb.usage}\n\n{_module(name).__doc__}")
        return ExitClass.DONE
    return guard(lambda: _module(name).run(words))


@contextmanager
def uncollected() -> Iterator[None]:
    """Garbage collection off while Hydra and pydantic are imported and the config is composed: 6% of the time it takes. The app
    switches it on again for the verb itself."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def help_text() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: phidias <verb> ...",
            "",
            *lines,
            "",
            "phidias <verb> --help says more. plan, rehearse, exposure, data and train take Hydra overrides (run=phi4",
            "stage=pretrain model.num_layers=32), -m, --cfg job and --config-dir; the others take run names. out=json prints",
            "JSON alone.",
            'Tab completion: eval "$(phidias -sc install=bash)"',
            EXIT_CODES,
        ]
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"launcher.verbs.{name}")
