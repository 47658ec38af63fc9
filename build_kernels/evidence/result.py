"""The result of one rung for one artifact, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4_router_runtime.artifacts.evidence import FAILED as FAILED
from dsv4_router_runtime.artifacts.evidence import NOT_RUN, PASSED, STATUSES
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES
from dsv4_router_runtime.artifacts.json_reader import JsonNode

from .document import MAX_NAME

# How "not run" is shown if no artifact of this kind can climb the rung.
DOES_NOT_APPLY = "does not apply"

QUICK = "quick"
FULL = "full"
SCOPES = (QUICK, FULL)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one rung for one artifact.

    reason: why it failed or was not run. figures: measurements, as JSON values. assumptions: the
    premises of the result. applies: False if no artifact of this kind can climb the rung, so that
    "not run" is no failure. SentryWard does not support wgmma, for instance. checker: see `Rung`.
    """

    status: str
    scope: str = FULL
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    applies: bool = True
    checker: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES} (got {self.status!r})")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {SCOPES} (got {self.scope!r})")
        if self.status != PASSED and not self.reason:
            raise ValueError(
                f"reason: expected a text for a result that is {self.status!r} (got none)"
            )

    @property
    def shown_status(self) -> str:
        """Return the status for `list`, such as "passed (quick)" or "does not apply"."""
        if not self.applies:
            return DOES_NOT_APPLY
        quick = self.status == PASSED and self.scope == QUICK
        return f"{self.status} (quick)" if quick else self.status


def not_run(reason: str, *, applies: bool = True) -> Result:
    """Return the result of a rung that was not climbed."""
    return Result(status=NOT_RUN, reason=reason, applies=applies)


def result_json(result: Result) -> dict[str, Any]:
    """Return a result as stored, without the fields that have their default."""
    stored: dict[str, Any] = {"status": result.status, "scope": result.scope}
    if result.reason:
        stored["reason"] = result.reason
    if result.figures:
        stored["figures"] = dict(result.figures)
    if result.assumptions:
        stored["assumptions"] = list(result.assumptions)
    if not result.applies:
        stored["applies"] = False
    if result.checker:
        stored["checker"] = result.checker
    return stored


def parse_result(node: JsonNode) -> Result:
    """Parse a stored result."""
    optional = ("reason", "figures", "assumptions", "applies", "checker")
    at = node.members("status", "scope", optional=optional)
    status = at["status"].choice(STATUSES)
    reason = at["reason"].text("a reason", MAX_JSON_BYTES) if "reason" in at else ""
    if status != PASSED and not reason:
        raise node.error(f'a result that is "{status}" gives no reason')
    figures = at["figures"].plain() if "figures" in at else {}
    if not isinstance(figures, dict):
        raise at["figures"].expected("an object")
    texts = at["assumptions"].items("a list of assumptions") if "assumptions" in at else []
    return Result(
        status=status,
        scope=at["scope"].choice(SCOPES),
        reason=reason,
        figures=figures,
        assumptions=tuple(item.text("an assumption", MAX_JSON_BYTES) for item in texts),
        applies=at["applies"].boolean() if "applies" in at else True,
        checker=at["checker"].text("a checker", MAX_NAME) if "checker" in at else "",
    )
