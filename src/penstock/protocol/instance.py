"""Instances and services as each other sees them: cards, load, attachment, roles, life."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.protocol.kv import KvLayout, Tier

Role = Literal["any", "encode", "prefill", "decode", "prefill_to_decode", "decode_to_prefill"]

#: Where sequences that decode bound a step (`Submit.max_step_s`), it takes as many prompt tokens
#: beside them as fit; but never fewer than so many, or prompts would not move.
PACED_TOKENS = 64
#: Tokens that a prompt token beside them is taken to attend to.
PACED_CONTEXT = 1024


class CostModel(msgspec.Struct, frozen=True):
    """Step time, fitted on this very instance, never a constant of ours.

    step_s = base_s + per_token_s * new_tokens + per_row_s * rows
             + per_context_token_s * sum over rows of (context tokens read)
             + per_attention_s * sum over rows of (new tokens * context tokens)
    `residual_s` is the mean absolute error over the last steps; `num_steps` how many were seen.
    `prompt_tokens` were computed in steps with prompts: with few of them, or none, what a prompt
    costs is not known, whatever the coefficients say. None: who fitted it does not count them.
    """

    base_s: float = 0.0
    per_token_s: float = 0.0
    per_row_s: float = 0.0
    per_context_token_s: float = 0.0
    per_attention_s: float = 0.0
    residual_s: float = 0.0
    num_steps: int = 0
    prompt_tokens: int | None = None


class MapCounts(msgspec.Struct, frozen=True):
    """Blocks mapped into address ranges since the start, and what that took: ahead of the step that
    needs them, while another one computes, or at its start, where compute waits for it. What was
    still mapped from before is in neither."""

    ahead: int = 0
    ahead_s: float = 0.0
    at_start: int = 0
    at_start_s: float = 0.0


NO_MAPS = MapCounts()


class InstanceCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an instance is, as it says when a service attaches."""

    name: str
    incarnation: int
    pid: int
    model: str
    model_digest: str
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    layout: KvLayout
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    #: Where peers reach it: "control" for messages, and one for each means of moving blocks.
    endpoints: dict[str, str] = {}
    #: The host's boot id: instances that share it can map each other's pages.
    host: str = ""
    can: tuple[str, ...] = ()
    cost: CostModel = CostModel()
    #: What the weights are in memory: int8, int4, a format's name, or none; "": it does not say.
    quantization: str = ""
    #: Names of the kernels in use, e.g. {"attention": "cpu-native", "linear": "onednn-packed"}.
    kernels: dict[str, str] = {}


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """A service introduces itself. A newer incarnation of the same service replaces the old one,
    whose sequences are freed."""

    service: str
    incarnation: int
    protocol_version: int
    #: Ask for `KvEvents`; a service without a KV index saves itself the traffic.
    kv_events: bool = False


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    card: InstanceCard
    protocol_version: int
    role: Role = "any"
    epoch: int = 0


class Detach(msgspec.Struct, frozen=True, tag="detach"):
    """The service leaves; whatever it still has running is freed."""

    service: str
    incarnation: int


class Resync(msgspec.Struct, frozen=True, tag="resync"):
    """Ask for a `Snapshot`, which will carry the same nonce."""

    nonce: int = 0


class LiveRequest(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    attempt: int
    num_output_tokens: int


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """The sequences this service has here, and every key in the cache as of `kv_number`."""

    instance: str
    incarnation: int
    requests: list[LiveRequest]
    kv_number: int
    keys: bytes
    nonce: int = 0
    #: Keys in slower tiers, by tier.
    tier_keys: dict[Tier, bytes] = {}
    #: Number of the last `Tokens` before it; whoever has not seen that has lost some.
    tokens_sent: int = 0


class TierLoad(msgspec.Struct, frozen=True, array_like=True):
    """Blocks in a slower tier. `total` is 0 where the tier has no bound of its own."""

    tier: str
    used: int
    total: int


class MoveCounts(msgspec.Struct, frozen=True, array_like=True):
    """Since the instance's start, blocks that came by one means: "map", "mooncake" or "tcp" from
    peers, "host", "disk" or "store" from tiers. `failed` were wanted and did not come whole.
    `seconds` is the sum over jobs, in `busy_s` those that overlap count once."""

    means: str
    blocks: int
    failed: int
    num_bytes: int
    seconds: float
    busy_s: float = 0.0


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Heartbeat: sent from a thread that compute cannot starve, at every interval.

    `step` and `step_end_in_s` (predicted, from the sending on; 0 when idle) let a service tell a
    long step from a death.
    """

    instance: str
    incarnation: int
    number: int
    step: int
    step_end_in_s: float
    waiting: dict[str, int]  # by request class
    running: dict[str, int]
    waiting_tokens: int
    running_tokens: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    steps: int
    cost: CostModel
    #: Seconds of all steps; and of the pauses between two steps while there was work, how many
    #: there were and how long they were together.
    step_s: float = 0.0
    step_gaps: int = 0
    step_gap_s: float = 0.0
    maps: MapCounts = NO_MAPS
    role: Role = "any"
    epoch: int = 0
    draining: bool = False
    tiers: list[TierLoad] = []
    moves: list[MoveCounts] = []
    #: Sequences of all services that have had no token here yet, waiting or running; what they have
    #: to compute (the cache may have some of it); and the context of all others that run.
    prefills: int = 0
    prefill_tokens_left: int = 0
    decode_context_tokens: int = 0


class Assign(msgspec.Struct, frozen=True, tag="assign"):
    role: Role
    epoch: int


class Assigned(msgspec.Struct, frozen=True, tag="assigned"):
    instance: str
    role: Role
    epoch: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new; finish what runs."""


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    level: int = 1


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    pass


class LoadWeights(msgspec.Struct, frozen=True, tag="load_weights"):
    source: str


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    nonce: int


class Probed(msgspec.Struct, frozen=True, tag="probed"):
    instance: str
    incarnation: int
    nonce: int
    #: True once this incarnation has produced a real token.
    ready: bool
