"""What stands before a block wherever it is kept outside of this process's memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from penstock.engine.memory.tiers.data import Block
from penstock.protocol.kv import KEY_BYTES

#: key, checksum and length of the block, its number in the order of storing, checksum of the header
_FIELDS = struct.Struct(f"<{KEY_BYTES}sQQQQ")
HEADER_BYTES = _FIELDS.size


@dataclass(frozen=True, slots=True)
class Header:
    key: bytes
    checksum: int
    length_bytes: int
    number: int

    @classmethod
    def of(cls, key: bytes, block: Block, number: int = 0) -> Header:
        return cls(key, xxhash.xxh3_64_intdigest(block.data), block.nbytes, number)

    def pack(self) -> bytes:
        fields = (self.key, self.checksum, self.length_bytes, self.number)
        return _FIELDS.pack(*fields, xxhash.xxh3_64_intdigest(_FIELDS.pack(*fields, 0)))

    @classmethod
    def unpack(cls, data: bytes) -> Header | None:
        """None: it is not a whole header."""
        if len(data) < HEADER_BYTES:
            return None
        found = cls(*_FIELDS.unpack(data[:HEADER_BYTES])[:4])
        return found if found.pack() == data[:HEADER_BYTES] else None


def why_not(head: bytes, key: bytes, block: Block) -> str:
    """Why what was read is not the block of `key`; empty if it is."""
    header = Header.unpack(head)
    if header is None or header.key != key or header.length_bytes != block.nbytes:
        return "a block is not where it was stored"
    if header.checksum != xxhash.xxh3_64_intdigest(block.data):
        return "the checksum of a block does not hold"
    return ""
