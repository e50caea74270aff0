"""Naming KV blocks, and the messages that say where they are and move them between instances.

A block's key is sha256 truncated to 128 bits, chained: key[i] = H(key[i-1] | token ids of block i),
with a root that covers whatever else decides the content (model digest, adapter, image hashes,
cache salt). Equal keys therefore mean equal prefixes, not only equal blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

BLOCK_TOKENS = 16
KEY_BYTES = 16
#: Has taken in nothing: a copy of it costs half of what a new one does.
_NOTHING = hashlib.sha256()

#: "store" is shared with other instances: nobody's `KvChange` speaks of it.
Tier = Literal["device", "host", "disk", "store"]


def root_key(
    model_digest: str, adapter: str | None = None, salt: str = "", inputs: Sequence[bytes] = ()
) -> bytes:
    """The key that stands before block 0. Length-prefixed, so that no two settings collide."""
    h = hashlib.sha256()
    for part in (model_digest.encode(), (adapter or "").encode(), salt.encode(), *inputs):
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()[:KEY_BYTES]


def next_key(parent: bytes, block_ids: Sequence[int]) -> bytes:
    """The key of a whole block that follows `parent`; ids are hashed as little-endian uint32."""
    words = array("I", block_ids)
    return hashlib.sha256(parent + words.tobytes()).digest()[:KEY_BYTES]


def block_keys(root: bytes, ids: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> bytes:
    """Keys of all whole blocks of `ids`, 16 bytes each, one after the other."""
    words = array("I", ids).tobytes()
    keys: list[bytes] = []
    parent, step, fresh = root, 4 * block_tokens, _NOTHING.copy
    for start in range(0, len(words) - step + 1, step):
        block = fresh()
        block.update(parent + words[start : start + step])
        parent = block.digest()[:KEY_BYTES]
        keys.append(parent)
    return b"".join(keys)


def split_keys(packed: bytes) -> list[bytes]:
    """The packed keys of `block_keys`, one by one."""
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


class KvLayout(msgspec.Struct, frozen=True):
    """What two instances must agree on before one can read the other's blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    block_bytes: int
    tp_rank: int = 0
    tp_size: int = 1

    def digest(self) -> str:
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]


KvOp = Literal["stored", "removed", "moved", "cleared"]


class KvChange(msgspec.Struct, frozen=True, array_like=True):
    """`keys` (packed) were stored in, removed from, or moved to `tier`; "moved": from the tier
    before it ("disk": from the host). A key may be in several tiers."""

    op: KvOp
    keys: bytes = b""
    tier: Tier = "device"


class KvEvents(msgspec.Struct, frozen=True, tag="kv_events", array_like=True):
    """What changed in an instance's cache. Numbered, so that a gap is seen and resynchronised."""

    instance: str
    incarnation: int
    number: int
    changes: list[KvChange]


class KvSource(msgspec.Struct, frozen=True, array_like=True):
    """Where leading blocks of a sequence can be had: an instance that holds them, or is computing
    them at this moment. A hint: what cannot be had (in time, unspoilt, at all) is computed."""

    instance: str
    incarnation: int
    #: Where its peers reach it (`InstanceCard.endpoints["control"]`).
    address: str
    #: Leading whole blocks that it has or will have.
    num_blocks: int


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """Service to instance: bring these blocks here, for a sequence whose `Submit` will follow, and
    keep room for `num_tokens` of it. Answered by `Fetched`, or `Refused` where there is no room.

    The blocks stay until the Submit of this request comes, or `lease_s` ends.
    """

    request_id: str
    attempt: int
    #: 16 bytes for each leading whole block, as in `Submit.block_keys`.
    keys: bytes
    source: KvSource
    num_tokens: int
    lease_s: float
    epoch: int = 0


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """What became of a `Fetch`, or of the source that a `Submit` named."""

    instance: str
    incarnation: int
    request_id: str
    attempt: int
    #: Blocks that came, of those that were not here already.
    num_blocks: int
    num_wanted: int
    num_bytes: int
    seconds: float
    #: How they came: "map", "mooncake", "tcp", "host", "disk", "store"; "" if none did.
    means: str
    #: Why some did not come; empty if all did.
    reason: str = ""


class BlockHandle(msgspec.Struct, frozen=True, array_like=True):
    """One physical block of one owner; stale once the owner's generation word has moved on.

    `checksum` (xxh3-64 of the block's bytes) is there where the means of transport wants it.
    """

    block: int
    generation: int
    key: bytes
    checksum: int | None = None


class Pull(msgspec.Struct, frozen=True, kw_only=True, tag="pull"):
    """Instance to instance: offer me these blocks. Answered by `BlocksReady`s as they are there
    (some may still be computed: wait up to `wait_s` for them), or by `Refused`."""

    #: The receiver's name for this transfer, unique for its incarnation.
    transfer: str
    receiver: str
    receiver_incarnation: int
    owner_incarnation: int
    model_digest: str
    layout_digest: str
    keys: bytes
    #: What the receiver can do, best first: "map", "mooncake", "tcp"; with what each needs to know
    #: of it (for "map": the host's boot id).
    means: dict[str, str]
    wait_s: float
    lease_s: float
    #: The first of `keys` that is wanted; those before it are there already. (All are said, since
    #: the owner holds whole chains.) The same transfer again: say again what has been offered.
    first_index: int = 0


class BlocksReady(msgspec.Struct, frozen=True, tag="blocks_ready"):
    """The owner holds these blocks for the receiver, until a `Release` or the end of the lease.
    Without blocks it only says that the owner lives, and where it stands."""

    transfer: str
    owner: str
    owner_incarnation: int
    #: Place of blocks[0] among the keys of the `Pull`.
    first_index: int
    blocks: list[BlockHandle]
    #: No more will come; those that are missing cannot be had here.
    last: bool
    means: str
    #: Where and how to get at the bytes, as the means wants it.
    endpoint: str


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """The receiver still wants this transfer's blocks, having taken in `num_blocks`: the lease
    begins anew."""

    transfer: str
    num_blocks: int


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The receiver has no further use for the first `num_blocks` offered ones (None: for any, and
    wants no more)."""

    transfer: str
    num_blocks: int | None = None


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A peer will not do what a message asked, and why. `what` is the tag of that message; of a
    pull, `request_id` is the transfer's."""

    what: str
    reason: str
    request_id: str | None = None
    attempt: int = 0
    code: str = "refused"


class Encoded(msgspec.Struct, frozen=True, tag="encoded"):
    """An input's embeddings are ready at `reference` on `owner`."""

    content_hash: bytes
    owner: str
    owner_incarnation: int
    num_tokens: int
    reference: str
