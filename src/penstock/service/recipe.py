"""What a service's core is made from, as plain data: to make one, and the same one again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from penstock.service.cluster.finder import Finder, IndexFinder, NoFinder
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.policies.routing import (
    ClusterView,
    Decision,
    Policy,
    RouteRequest,
    policy_named,
)

Make = Callable[[ServiceCoreConfig, Policy, Finder], ServiceCore]


@dataclass(frozen=True, slots=True)
class CoreRecipe:
    """`in_one_place`: no request is ever split between two instances."""

    config: ServiceCoreConfig = field(default_factory=ServiceCoreConfig)
    policy: str = "least-load"
    in_one_place: bool = False
    kv_index: bool = False

    def make(self, kind: Make = ServiceCore) -> ServiceCore:
        """Raises `ConfigError` for a policy that there is not."""
        policy = policy_named(self.policy)
        return kind(
            self.config,
            _in_one_place(policy) if self.in_one_place else policy,
            IndexFinder() if self.kv_index else NoFinder(),
        )


def _in_one_place(policy: Policy) -> Policy:
    def decide(view: ClusterView, request: RouteRequest) -> Decision:
        return policy(view, replace(request, aggregated_because="the server has --pd off"))

    return decide
