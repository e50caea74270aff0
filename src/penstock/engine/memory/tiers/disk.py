"""Blocks in one preallocated file: a head page, then slots, each a header with its block behind it.

What is read back is believed only if its header names the key and its checksum holds, so a torn
write, a flipped bit or a file that somebody else has cut short is a miss. The file outlives the
process: a restarted instance of the same name, model and layout finds the blocks whose headers are
whole (their contents are checked as they are read). Nothing is synced; after a crash of the machine
the checksums sort out what did not reach the disk.

The file is private to its owner (mode 0600): KV says what was in the prompts.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from penstock.engine.memory.sizing import GIB, PAGE_BYTES
from penstock.engine.memory.tiers.data import Block, Health
from penstock.engine.memory.tiers.header import HEADER_BYTES, Header, why_not
from penstock.engine.memory.tiers.slots import Slots
from penstock.protocol.errors import ConfigError

log = logging.getLogger(__name__)

_MAGIC = b"penstkv1"
#: magic, digest of what the blocks are of, block bytes, slots
_HEAD = struct.Struct("<8s32sQQ")
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DiskTier:
    """See `TierData`. `recovered` are the keys that were in the file already, oldest first."""

    def __init__(
        self, folder: Path, name: str, num_blocks: int, block_bytes: int, digest: bytes
    ) -> None:
        """`digest` (32 bytes) stands for model and layout: under another one, nothing in the file
        is of use. Raises `ConfigError` where the folder cannot be written to. A disk without room
        is no error: then `num_blocks` is 0."""
        assert len(digest) == 32
        self._block_bytes = block_bytes
        self._stride = -(-(HEADER_BYTES + block_bytes) // PAGE_BYTES) * PAGE_BYTES
        self._head = _HEAD.pack(_MAGIC, digest, block_bytes, num_blocks)
        self._health = Health(f"disk KV cache in {folder}")
        self._fd = _open(folder, f"penstock-kv-{name}")
        self.num_blocks = self._allocate(num_blocks)
        held = self._recover() if self.num_blocks else {}
        self.recovered = [header.key for header in held.values()]
        self._numbers = itertools.count(max((h.number for h in held.values()), default=0) + 1)
        self._slots = Slots(self.num_blocks, {h.key: slot for slot, h in held.items()})

    def _allocate(self, num_blocks: int) -> int:
        """Make the file what it should be; how many blocks it has then."""
        num_bytes = PAGE_BYTES + num_blocks * self._stride
        try:
            if os.pread(self._fd, len(self._head), 0) != self._head:
                os.ftruncate(self._fd, 0)
            # Asked first: a fallocate that fails may have filled the disk before it noticed.
            space, held_bytes = os.fstatvfs(self._fd), os.fstat(self._fd).st_blocks * 512
            if num_bytes > space.f_bavail * space.f_frsize + held_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._fd, 0, num_bytes)
            os.pwrite(self._fd, self._head, 0)
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise ConfigError(f"the disk KV cache cannot be made: {exc.strerror}") from exc
            os.ftruncate(self._fd, 0)
            log.warning(
                "no disk KV cache: there is no room for %.2f GiB (%s)",
                num_bytes / GIB, exc.strerror,
            )  # fmt: skip
            return 0
        return num_blocks

    def _recover(self) -> dict[int, Header]:
        """Slots with whole headers, oldest first; of two with the same key the younger."""
        found: dict[bytes, tuple[int, Header]] = {}
        for slot in range(self.num_blocks):
            header = Header.unpack(os.pread(self._fd, HEADER_BYTES, self._offset(slot)))
            if header is None or header.length_bytes != self._block_bytes:
                continue
            older = found.get(header.key)
            if older is None or older[1].number < header.number:
                found[header.key] = (slot, header)
        by_age = sorted(found.values(), key=lambda item: item[1].number)
        return dict(by_age)

    def load(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        return [self._load(key, destination) for key, destination in blocks]

    def _load(self, key: bytes, destination: Block) -> bool:
        with self._slots.reading(key) as slot:
            if slot is None or self._health.given_up:
                return False
            why = self._read(slot, key, destination)
        if why:
            self._slots.drop(key)
            self._health.failed(why)
        else:
            self._health.succeeded()
        return not why

    def _read(self, slot: int, key: bytes, destination: Block) -> str:
        """Why the slot does not hold the block of `key`; empty if it does."""
        head = bytearray(HEADER_BYTES)
        try:
            num_read = os.preadv(self._fd, [head, destination.data], self._offset(slot))
        except OSError as exc:
            return f"reading: {exc.strerror}"
        if num_read != HEADER_BYTES + self._block_bytes:
            return "the file has been cut short"
        return why_not(bytes(head), key, destination)

    def store(self, blocks: Sequence[tuple[bytes, Block]]) -> list[bool]:
        return [self._store(key, source) for key, source in blocks]

    def _store(self, key: bytes, source: Block) -> bool:
        if key in self._slots:
            return True
        slot = None if self._health.given_up else self._slots.take()
        if slot is None:
            return False
        why = self._write(slot, key, source)
        if why:
            self._slots.give_back(slot)
            self._health.failed(why)
        else:
            self._slots.publish(key, slot)
            self._health.succeeded()
        return not why

    def _write(self, slot: int, key: bytes, source: Block) -> str:
        header = Header.of(key, source, next(self._numbers)).pack()
        try:
            num_written = os.pwritev(self._fd, [header, source.data], self._offset(slot))
        except OSError as exc:
            return f"writing: {exc.strerror}"
        return "" if num_written == len(header) + self._block_bytes else "the disk is full"

    def _offset(self, slot: int) -> int:
        return PAGE_BYTES + slot * self._stride

    def drop(self, key: bytes) -> None:
        """Its header stays until the slot is written again; a restart may find the key once more,
        which does no harm: it is what it says it is."""
        self._slots.drop(key)

    def close(self) -> None:
        os.close(self._fd)


def _open(folder: Path, name: str) -> int:
    """The instance's own file; where a living process has that one, a file without a name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(f"--kv-disk-path {folder}: {exc.strerror}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        log.info(
            "%s is in use by another process: this one's disk cache ends with it", folder / name
        )
        own = folder / f"{name}.{os.getpid()}"
        fd = os.open(own, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_TRUNC, 0o600)
        own.unlink()
    return fd
