"""The view of `phidias watch`: a run that somebody else has started, seen from another terminal or machine."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Literal

from rich.console import Console

from launcher.config.schema import RunConfig
from launcher.report.live import PLAIN_INTERVAL_S, LiveView
from launcher.report.standing import Standing, ended_in_silence, stands
from launcher.report.surroundings import Surroundings, event_line
from launcher.rundir.exits import ExitClass
from launcher.rundir.paths import RunDir
from launcher.rundir.records import parse_status


class WatchView(LiveView):
    """As the launcher's own, but status.json is the truth as long as the run's events do not say otherwise, and what happens to
    the run is news. Reads the run directory alone."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        mode: Literal["auto", "rich", "plain"] = "auto",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = PLAIN_INTERVAL_S,
    ):
        super().__init__(run, config, mode, console=console, clock=clock, interval_s=interval_s)
        self._standing, self._good_status, self._told = Standing("not started"), parse_status("{}"), len(self._around.events)

    @property
    def ended(self) -> ExitClass | None:
        """How the run has ended; None of one that is at work or waits."""
        return self._standing.ended

    def _harmless(self) -> contextlib.AbstractContextManager[None]:
        # A closed pipe (`| head`) is a SystemExit of rich's: then nobody looks any more.
        return contextlib.suppress(Exception)

    def _surroundings(self) -> Surroundings:
        around = Surroundings(self._run, self._config.cluster)
        around.read(now=self._clock())
        return around

    def _read_shares(self) -> Mapping[str, Mapping[str, float]]:
        return {stage: plan.get("sources", {}) for stage, plan in self._around.plan.items()}

    def _read_status(self, *, final: bool) -> None:
        """A status that is torn is left for the next one."""
        self._good_status = parse_status(self._status_text()) or self._good_status
        events, stages = self._around.events, self._config.stage_names
        standing = stands(events, status=self._good_status, stages=stages)
        if standing.ended is None and standing.state not in ("queued", "not started"):
            standing = ended_in_silence(self._run, events, status=self._good_status) or standing
        self._standing = standing
        self._around.stand(ended=standing.ended is not None, waits=standing.state == "queued")
        self._progress.status = {**self._good_status, "state": standing.state}
        self._tell_events()

    def _tell_events(self) -> None:
        """Those that are new, where they are not in a panel."""
        events = self._around.events
        for event in [] if self._live else events[self._told :]:
            self._print(event_line(event, now=time.time()))
        self._told = len(events)
