"""Which release policy holds for a run: a file of its own, or the `[gate]` that the suite had when the run was made. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import SuiteError
from harness.mistakes import Mistakes
from harness.schema_gate import Gate, Policy
from harness.toml_file import read_toml

if TYPE_CHECKING:
    from harness.evidence import RunEvidence

OF_THE_SUITE = "suite"


def load_policy(path: Path) -> Policy:
    """The policy in a TOML file; SuiteError with one line a mistake."""
    raw = read_toml(path, what="policy", example="suites/gates/release.toml")
    return _parsed(Policy, raw, path, where="")


def resolve_policy(run: RunEvidence, policy_path: Path | None) -> tuple[Gate, str]:
    """The policy for a run and where it is from: the file if one is given, else "suite", for the `[gate]` that its run.json recorded.

    SuiteError with one line a mistake, or where there is neither.
    """
    if policy_path is not None:
        return load_policy(policy_path), str(policy_path)
    recorded = (run.about.get("resolved") or {}).get("gate")
    if recorded is None:
        raise SuiteError(
            f"{run.folder}: its suite has no [gate]; give a policy with --policy, such as suites/gates/release.toml, or add [gate] to "
            "the suite and run it again (nothing is computed again for that)"
        )
    return _parsed(Gate, recorded, run.folder / "run.json", where="resolved.gate"), OF_THE_SUITE


def as_plain(policy: Gate) -> dict[str, Any]:
    """The policy as JSON has it, with what was left out."""
    return dict(json.loads(json.dumps(policy.model_dump(by_alias=True), allow_nan=False)))


def _parsed(schema: type[Any], raw: Any, path: Path, *, where: str) -> Any:
    mistakes = Mistakes(path)
    policy = mistakes.parse(schema, raw, where)
    if policy is None:
        raise SuiteError("\n".join(mistakes.found))
    return policy
