"""phidias exposure: how often each source is read over the stages of a run. Counts of prepared sources come from manifests."""

import json
from dataclasses import asdict

from launcher.plan.exposure import plan_exposure
from launcher.plan.preflight import counted_tokens
from launcher.verbs.request import Request

OPTIONS = {"out": ("json",)}


def act(request: Request) -> int:
    rows = plan_exposure(request.config, unique_tokens=counted_tokens(request.config))
    if request.wants_json:
        print(json.dumps([asdict(row) for row in rows], indent=None if request.in_sweep else 1))
        return 0
    from launcher.plan.page import print_exposure

    print_exposure(request.config, rows=rows)
    return 0
