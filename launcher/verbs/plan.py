"""phidias plan: what each stage comes to, before anything is written."""

import json

from launcher.plan.document import plan_document
from launcher.verbs.request import Request

OPTIONS = {"out": ("json",)}


def act(request: Request) -> int:
    if request.wants_json:
        print(json.dumps(plan_document(request.config), indent=None if request.in_sweep else 1))
        return 0
    from launcher.plan.page import print_plan

    print_plan(request.config)
    return 0
