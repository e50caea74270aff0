"""The routing policies by name, and the nouns they speak in."""

from __future__ import annotations

from penstock.protocol.errors import ConfigError
from penstock.service.policies.kv_aware import kv_aware
from penstock.service.policies.simple import least_load, round_robin
from penstock.service.policies.slo_aware import slo_aware, split
from penstock.service.policies.view import (
    ROLES,
    Candidate,
    ClusterView,
    Decision,
    Floats,
    Ints,
    Policy,
    RouteRequest,
    TransferCosts,
)

__all__ = [
    "POLICIES",
    "ROLES",
    "Candidate",
    "ClusterView",
    "Decision",
    "Floats",
    "Ints",
    "Policy",
    "RouteRequest",
    "TransferCosts",
    "kv_aware",
    "least_load",
    "policy_named",
    "round_robin",
    "slo_aware",
    "split",
]

#: What `--policy` may name.
POLICIES: dict[str, Policy] = {
    "round-robin": round_robin,
    "least-load": least_load,
    "kv-aware": kv_aware,
    "slo-aware": slo_aware,
    "split": split,
}


def policy_named(name: str) -> Policy:
    """Raises `ConfigError` for a name that is none."""
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join(POLICIES)
        raise ConfigError(f"{name!r} is not a policy: choose one of {known}") from None
