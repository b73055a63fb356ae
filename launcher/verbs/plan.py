"""phidias plan: what each stage comes to, before anything is written."""

import json

from launcher.plan.document import plan_document
from launcher.plan.prepared import known_sizes
from launcher.verbs.request import Request

OPTIONS = {"out": ("json",)}


def act(request: Request) -> int:
    sizes = known_sizes(request.config)
    if request.wants_json:
        print(json.dumps(plan_document(request.config, sizes=sizes), indent=None if request.in_sweep else 1))
        return 0
    from launcher.plan.page import print_plan

    print_plan(request.config, sizes=sizes)
    return 0
