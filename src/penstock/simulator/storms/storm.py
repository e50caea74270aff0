"""A storm: a small cluster, its requests, and all that goes wrong, as plain data.

Everything is in the data, nothing in the seed that it was drawn from: so a storm can be shrunk,
printed, and pasted into a test. Times are virtual seconds since the start.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields

from penstock.protocol.instance import Role
from penstock.protocol.request import RequestClass

INSTANCES = ("a", "b", "c", "d", "e")
SERVICES = ("s", "t")
REGISTRY = "registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The cluster. Pools are small, so that memory is short and blocks are evicted."""

    num_instances: int = 2
    num_services: int = 1
    #: "in-turn" (every request is split, over all pairs in turn) or the name of a routing policy.
    policy: str = "in-turn"
    #: "off", "auto", or "P:D".
    pd: str = "off"
    #: Whether instances and services find each other, and a leader, in a registry.
    registry: bool = False
    num_blocks: int = 96
    num_windows: int = 64
    host_blocks: int = 0
    disk_blocks: int = 0
    #: Is there a store that all instances share?
    store: bool = False
    #: Keys that a service's KV index has room for.
    index_blocks: int = 2048
    #: How blocks move between instances, best first.
    means: tuple[str, ...] = ("map", "tcp")
    num_hosts: int = 1
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 128
    max_chunk_tokens: int | None = None
    enable_prefix_caching: bool = True
    #: Sequences that may wait in a service, and in an instance; one more is refused.
    max_queue: int = 1024
    max_waiting: int = 1024
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    #: A request that will be late is refused; otherwise it waits behind the others.
    refuses_late: bool = True
    #: A change of roles is judged, and maybe taken back, after so many requests that have SLOs.
    judged_after: int = 20
    #: Above 1: instances compute runs of steps, as in large worlds.
    max_run_steps: int = 1
    #: Of a frame, at the least.
    latency_s: float = 0.0002
    #: `Tokens` that an instance sends ahead of the service's credits.
    credit_window: int = 512
    #: Of each job of the data plane: that nothing comes of it, that it ends seconds late; and of
    #: each block that it arrives spoilt.
    job_fails: float = 0.0
    job_hangs: float = 0.0
    block_spoilt: float = 0.0

    @property
    def instances(self) -> tuple[str, ...]:
        return INSTANCES[: self.num_instances]

    @property
    def services(self) -> tuple[str, ...]:
        return SERVICES[: self.num_services]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. Its prompt begins with `shared_tokens` that others of the same `family` have
    too; the rest (`own_tokens`) follows from its number alone."""

    number: int
    at_s: float
    service: str = "s"
    family: int = 0
    shared_tokens: int = 0
    own_tokens: int = 16
    max_tokens: int = 16
    n: int = 1
    request_class: RequestClass = "online"
    #: The caller goes away so long after asking.
    cancel_after_s: float | None = None
    budget_s: float | None = None
    ttft_slo_s: float | None = None
    priority: int = 0
    #: Those of one salt share prefixes, and their turn.
    salt: str = ""


# --- faults --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    at_s: float

    @property
    def over_s(self) -> float:
        """From when on it does no more harm by itself."""
        return self.at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lasting(_Event):
    for_s: float

    @property
    def over_s(self) -> float:
        return self.at_s + self.for_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash(_Event):
    """The process of `node` is gone. `noticed`: a supervisor sees that at once, otherwise others
    notice the silence. `words_arrive`: what it had sent is still delivered. It starts again (as a
    new incarnation) after `again_after_s`, or never."""

    node: str
    noticed: bool = False
    words_arrive: bool = False
    again_after_s: float | None = None

    @property
    def over_s(self) -> float:
        return self.at_s + (self.again_after_s or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(_Event):
    """SIGTERM to a service: whatever still lives there ends with an error, and it starts again."""

    service: str
    again_after_s: float

    @property
    def over_s(self) -> float:
        return self.at_s + self.again_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt(_Lasting):
    """SIGSTOP, and SIGCONT after `for_s`."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow(_Lasting):
    """Steps of `node` take `factor` times as long."""

    node: str
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang(_Event):
    """The step under way on `node`, or the next one, never ends: its process gives up in the end,
    and a supervisor starts it again."""

    node: str

    @property
    def over_s(self) -> float:
        return self.at_s + 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise(_Event):
    """The next `count` steps of `node` raise."""

    node: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(_Lasting):
    """Nothing passes from any of `these` to any of `those`, nor (unless `one_way`) back."""

    these: tuple[str, ...]
    those: tuple[str, ...]
    one_way: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise(_Lasting):
    """Of the frames on every link, the shares that are lost, that come twice, and that are up to
    `late_s` late and overtaken; each takes up to `jitter_s` longer."""

    loss: float = 0.0
    duplicate: float = 0.0
    jitter_s: float = 0.0
    reorder: float = 0.0
    late_s: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryLoss(_Lasting):
    """The registry's process is gone for `for_s`, and has forgotten everything afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoilTiers(_Event):
    """Every block that the slower tiers of `node` hold is spoilt, which its checksum tells."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeBack(_Event):
    """`node` takes back every page that peers have mapped, as when their leases end unheard.
    `overwrites`: somebody there needs all of its memory for a moment."""

    node: str
    overwrites: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew(_Lasting):
    """The clock of `node` jumps forward by `jump_s`, and from then on gains `drift` seconds in
    each second, for `for_s`."""

    node: str
    jump_s: float = 0.0
    drift: float = 0.0
    for_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(_Event):
    """An operator has `service` empty `node`, whose process ends then. `out`: for good (scaling
    down); otherwise a supervisor starts it again."""

    service: str
    node: str
    out: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleUp(_Event):
    """Another instance starts."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment(_Event):
    """A change of role by hand."""

    service: str
    node: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead(_Event):
    """Without a registry: `service` leads, in a term above all before, and nobody tells the one
    that has led."""

    service: str


Fault = (
    Crash
    | Leave
    | Halt
    | Slow
    | Hang
    | Raise
    | Cut
    | Noise
    | RegistryLoss
    | SpoilTiers
    | TakeBack
    | Skew
    | Drain
    | ScaleUp
    | Assignment
    | Lead
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storm:
    """`seed` decides what the network and the data plane draw on the way."""

    seed: int
    shape: Shape = field(default_factory=Shape)
    asks: tuple[Ask, ...] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def healed_s(self) -> float:
        """From here on nothing new goes wrong."""
        return max((fault.over_s for fault in self.faults), default=0.0)

    @property
    def last_ask_s(self) -> float:
        return max((ask.at_s for ask in self.asks), default=0.0)

    def __str__(self) -> str:
        """Python that makes this storm again."""
        lines = [f"seed={self.seed},", f"shape={_source(self.shape)},"]
        for name, parts in (("asks", self.asks), ("faults", self.faults)):
            lines += [f"{name}=(", *(f"    {_source(part)}," for part in parts), "),"]
        return "\n".join(["Storm(", *(f"    {line}" for line in lines), ")"])


def _source(part: Shape | Ask | Fault) -> str:
    """Without what is as it would be anyway."""
    given = [
        f"{f.name}={getattr(part, f.name)!r}"
        for f in fields(part)
        if f.default is MISSING or getattr(part, f.name) != f.default
    ]
    return f"{type(part).__name__}({', '.join(given)})"
