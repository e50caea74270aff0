"""A cluster to simulate, as plain data: what stands in `cluster.yaml` (`cluster_file.py` reads it).

Names are those of the flags of `penstock serve` wherever there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """`count` equal instances. `hardware`: a name of `loadgen.costs` (gpu:model:dtype:tpN)."""

    name: str = "gpu"
    count: int
    hardware: str
    #: For good, where `pd` is "pools".
    role: Role = "any"
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int = 131_072
    enable_prefix_caching: bool = True
    #: Tokens of KV that fit; None: what the hardware has room for.
    kv_tokens: int | None = None
    #: Tokens of KV in slower tiers.
    host_kv_tokens: int = 0
    disk_kv_tokens: int = 0
    #: Steps take so many times as long as the cost model says.
    slowdown: float = 1.0
    #: In US dollars, of one GPU for one hour; None: nothing is said about cost.
    gpu_hour_usd: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """Between two processes: messages, and KV on its way from one instance to another. Between an
    instance and its slower tiers, each way: host memory over PCIe 4.0 x16 (25 GB/s), and a disk on
    NVMe (5 GB/s)."""

    latency_s: float = 0.0002
    jitter_s: float = 0.0003
    kv_gbit: float = 100.0
    host_kv_gbit: float = 200.0
    disk_kv_gbit: float = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSpec:
    """What happens to one instance (its pool's name and its number in it, as in gpu-0), `at_s`
    after the first arrival. `crash`: its process is gone, which its supervisor sees, and started
    again after `for_s`; `freeze`: it does nothing for so long; `slow`: steps take `times` as long
    for so long. None: for good."""

    at_s: float
    kind: Literal["crash", "freeze", "slow"]
    instance: str
    for_s: float | None = None
    times: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """`pd`: "off", "auto", "P:D", or "pools": every pool keeps its `role`. `admission`: refuse
    early what cannot meet the SLO (in production it does whenever there is a TTFT SLO; comparisons
    measure everybody)."""

    name: str = "cluster"
    pools: tuple[PoolSpec, ...]
    policy: str = "slo-aware"
    pd: str = "auto"
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    admission: bool = False
    kv_index: bool = True
    max_queue: int = 1_000_000
    link: LinkSpec = field(default_factory=LinkSpec)
    faults: tuple[FaultSpec, ...] = ()

    def __post_init__(self) -> None:
        if not self.pools or any(pool.count < 1 for pool in self.pools):
            raise ConfigError("a cluster has at least one pool of at least one instance")
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ConfigError(f"two pools have the same name: {', '.join(names)}")
        self._check_roles()
        names = [f"{pool.name}-{n}" for pool in self.pools for n in range(pool.count)]
        for fault in self.faults:
            if fault.instance not in names:
                raise ConfigError(
                    f"a fault is of the instance {fault.instance!r}; there are {names[0]} to "
                    f"{names[-1]}"
                )

    def _check_roles(self) -> None:
        roles = {pool.role for pool in self.pools}
        if self.pd != "pools":
            if roles != {"any"}:
                raise ConfigError(f"a pool has a role of its own and pd is {self.pd!r}: say pools")
        elif not (roles & {"any", "prefill"} and roles & {"any", "decode"}) or roles == {"any"}:
            raise ConfigError("pd is 'pools': one pool's role is prefill and another's decode")

    @property
    def num_instances(self) -> int:
        return sum(pool.count for pool in self.pools)

    @property
    def static_split(self) -> tuple[int, int] | None:
        """Raises `ConfigError` where `pd` is neither off, auto nor P:D."""
        if self.pd in ("off", "auto", "pools"):
            return None
        prefill, colon, decode = self.pd.partition(":")
        if not colon or not (prefill.isdigit() and decode.isdigit()):
            raise ConfigError(f"pd is {self.pd!r}: write off, auto, pools or P:D, as in 2:6")
        split = int(prefill), int(decode)
        if not all(split) or sum(split) > self.num_instances:
            raise ConfigError(
                f"pd is {self.pd!r} and there are {self.num_instances} instances: P and D are at "
                "least 1 and no more than those together"
            )
        return split
