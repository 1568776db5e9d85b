"""The plan of a run, or one error with all that is missing for it."""

from __future__ import annotations

import contextlib

from harness.errors import HarnessError
from harness.plan import Plan, make_plan
from harness.store import Store
from harness.suite import Suite


def plan_to_run(suite: Suite, store: Store, only: tuple[str, ...]) -> Plan:
    """The plan; HarnessError with a line each where several things have to be mended before a run, else that of the one."""
    try:
        return make_plan(suite, store, only=only)
    except HarnessError:
        found: list[str] = []
        with contextlib.suppress(HarnessError):
            make_plan(suite, store, only=only, missing=found)
        found = list(dict.fromkeys(found))
        if len(found) < 2:
            raise
    raise HarnessError("to mend before a run:\n" + "\n".join(f"  {line}" for line in found))
