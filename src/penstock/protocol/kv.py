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

Tier = Literal["device", "host", "disk"]


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
    keys = bytearray()
    parent = root
    for start in range(0, len(ids) - block_tokens + 1, block_tokens):
        parent = next_key(parent, ids[start : start + block_tokens])
        keys += parent
    return bytes(keys)


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


class KvChange(msgspec.Struct, frozen=True, array_like=True):
    """`keys` (packed) were stored in, removed from, or moved to `tier`."""

    op: Literal["stored", "removed", "moved", "cleared"]
    keys: bytes = b""
    tier: Tier = "device"


class KvEvents(msgspec.Struct, frozen=True, tag="kv_events", array_like=True):
    """What changed in an instance's cache. Numbered, so that a gap is seen and resynchronised."""

    instance: str
    incarnation: int
    number: int
    changes: list[KvChange]


class BlockHandle(msgspec.Struct, frozen=True, array_like=True):
    """One physical block of one owner; stale once the owner's generation word has moved on."""

    block: int
    generation: int
    key: bytes
    checksum: int | None = None


class Reserve(msgspec.Struct, frozen=True, tag="reserve"):
    """Ask a decode instance for room: tokens of KV for a sequence that is prefilled elsewhere."""

    request_id: str
    attempt: int
    num_tokens: int
    layout_digest: str
    epoch: int


class Reserved(msgspec.Struct, frozen=True, tag="reserved"):
    request_id: str
    attempt: int
    reservation: str
    blocks: list[BlockHandle]
    lease_s: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A peer will not do what a message asked, and why. `what` is the tag of that message."""

    what: str
    reason: str
    request_id: str | None = None
    attempt: int = 0
    code: str = "refused"


class BlocksReady(msgspec.Struct, frozen=True, tag="blocks_ready"):
    request_id: str
    attempt: int
    owner: str
    owner_incarnation: int
    epoch: int
    first_index: int
    blocks: list[BlockHandle]
    last: bool


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    request_id: str
    attempt: int
    num_blocks: int


class Nack(msgspec.Struct, frozen=True, tag="nack"):
    request_id: str
    attempt: int
    reason: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    request_id: str
    attempt: int


class Encoded(msgspec.Struct, frozen=True, tag="encoded"):
    """An input's embeddings are ready at `reference` on `owner`."""

    content_hash: bytes
    owner: str
    owner_incarnation: int
    num_tokens: int
    reference: str
