"""Packed weights in one segment of memory that engines on a host share.

The segment is a file without a name (memfd) that whoever started the engines holds open and passes
on. The first engine reads and packs the weights into it; its siblings and successors map them, read
only: no file is read, nothing is packed, and the weights are in memory once.

It is complete or absent. The header is written last, in one write, so a publisher that is killed
leaves none, and the next one begins anew; a file lock, which goes with the process, lets one
publish at a time while the others wait. What is mapped is verified against its digest first. A
segment that is damaged is written again by whoever finds it so: the same weights give the same
bytes at the same places, so whoever has it mapped only gets right what was wrong. One of other
weights (the checkpoint has changed under a server that runs) is left alone while anybody uses it,
and the engine keeps its own copy; once nobody does, the memory is given back. Who uses it says so
with a lock on its first byte. Where a system call refuses, an engine has its own copy, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import xxhash

from penstock import __version__
from penstock.engine.memory.keeper import PRIVATE, Fill, Keeper
from penstock.engine.memory.shared_pages import SharedPages
from penstock.engine.platforms.base import Platform

log = logging.getLogger(__name__)

#: The first bytes of a segment that is complete; the number changes with what follows them.
_MAGIC = b"penstock weights 1\n"
_HEADER_BYTES = 4096
_ALIGN_BYTES = 64
_PIECE_BYTES = 64 << 20
#: How long to wait for a sibling that publishes.
_WAIT_S = 600.0
_LOOK_S = 0.02

T = TypeVar("T")


class CannotShare(Exception):
    """Why a segment is not used; the message is for the log."""


@contextlib.contextmanager
def _system_calls() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CannotShare(f"the system refuses: {exc.strerror}") from None


@dataclass(frozen=True, slots=True)
class _Header:
    key: str
    data_bytes: int
    digest: str
    #: What is kept, in order: [dtype, shape, offset], or a note.
    records: list[Any]

    def encode(self) -> bytes:
        fields = [self.key, self.data_bytes, self.digest, self.records]
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, text: bytes) -> _Header:
        return cls(*json.loads(text))


class Segment:
    """`fd` is a memfd; it stays open for as long as this process lives."""

    def __init__(self, fd: int) -> None:
        # A description of our own: locks of siblings that inherited `fd` would be one lock.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._uses = False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises `CannotShare` if somebody else holds it for too long."""
        until_s = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise CannotShare(f"nobody published them within {_WAIT_S:g} s") from None
                time.sleep(_LOOK_S)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def use(self) -> None:
        """From now on, and for as long as this process lives."""
        self._lock_first_byte(fcntl.F_RDLCK)

    def is_used(self) -> bool:
        """By anybody, ourselves included. Asked by who has it `locked`, it stays as it is."""
        if self._uses:
            return True
        try:
            self._lock_first_byte(fcntl.F_WRLCK)
        except BlockingIOError:
            return True
        self._lock_first_byte(fcntl.F_UNLCK)
        return False

    def _lock_first_byte(self, kind: int) -> None:
        # A lock of the open file description (fcntl(2)), which has nothing to do with `flock`.
        flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, flock)
        self._uses = kind == fcntl.F_RDLCK

    @_system_calls()
    def clear(self) -> None:
        """Give its memory back. Whoever has it mapped reads zeros."""
        num_bytes = os.fstat(self._fd).st_size
        if num_bytes:
            with mmap.mmap(self._fd, num_bytes) as pages:
                pages.madvise(mmap.MADV_REMOVE)

    @_system_calls()
    def header(self) -> _Header | None:
        """None: nothing has been published, or what describes it is damaged."""
        first = os.pread(self._fd, _HEADER_BYTES, 0)
        start = len(_MAGIC)
        if not first.startswith(_MAGIC) or len(first) < _HEADER_BYTES:
            return None
        at, length = (
            int.from_bytes(first[start + 8 * i : start + 8 * i + 8], "little") for i in range(2)
        )
        digest = first[start + 16 : start + 32]
        if length > os.fstat(self._fd).st_size:
            return None
        text = os.pread(self._fd, length, at)
        return _Header.decode(text) if xxhash.xxh3_128_digest(text) == digest else None

    @_system_calls()
    def declare_absent(self) -> None:
        os.pwrite(self._fd, bytes(_HEADER_BYTES), 0)

    @_system_calls()
    def complete(self, header: _Header) -> None:
        """Behind the data comes what describes it, and last, in one write, that it is there."""
        text = header.encode()
        at = _HEADER_BYTES + header.data_bytes
        self.resize(at + len(text))
        os.pwrite(self._fd, text, at)
        numbers = at.to_bytes(8, "little") + len(text).to_bytes(8, "little")
        first = _MAGIC + numbers + xxhash.xxh3_128_digest(text)
        os.pwrite(self._fd, first.ljust(_HEADER_BYTES, b"\0"), 0)

    @_system_calls()
    def resize(self, num_bytes: int) -> None:
        """Never shorter: a sibling that has it mapped would die of what is missing."""
        if os.fstat(self._fd).st_size < num_bytes:
            os.ftruncate(self._fd, num_bytes)

    @_system_calls()
    def map(self, num_bytes: int) -> SharedPages:
        return SharedPages(self._fd, num_bytes)


class Publishing(Keeper):
    """Fills tensors in the segment and notes down where they are. Raises `CannotShare` as soon as
    something of the model is not to be in it, so that little is read twice."""

    def __init__(self, segment: Segment, most_bytes: int) -> None:
        segment.declare_absent()
        segment.resize(_HEADER_BYTES + most_bytes)
        self._segment = segment
        self._pages = segment.map(_HEADER_BYTES + most_bytes)
        self._end = 0
        self._most = most_bytes
        self._records: list[Any] = []

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        start = -(-self._end // _ALIGN_BYTES) * _ALIGN_BYTES
        if start + math.prod(shape) * dtype.itemsize > self._most:
            raise CannotShare("they take more room than was reckoned")
        out = _tensor(self._pages, shape, dtype, start)
        fill(out)
        self._end = start + out.nbytes
        self._records.append([str(dtype).removeprefix("torch."), list(shape), start])
        return out

    def note(self, decide: Callable[[], str]) -> str:
        noted = decide()
        self._records.append(noted)
        return noted

    def leaves_out(self, what: str) -> None:
        raise CannotShare(what)

    def publish(self, key: str) -> None:
        with _system_calls():
            self._pages.read_only()
        data_bytes = -(-self._end // mmap.PAGESIZE) * mmap.PAGESIZE
        digest = _digest(self._pages, data_bytes)
        self._segment.complete(_Header(key, data_bytes, digest, self._records))
        self._pages.collapse(_HEADER_BYTES + data_bytes)


class Mapped(Keeper):
    """Hands out, in order, what somebody has published."""

    def __init__(self, segment: Segment, header: _Header) -> None:
        self._pages = segment.map(_HEADER_BYTES + header.data_bytes)
        with _system_calls():
            self._pages.read_only()
        self._header = header
        self._next = 0

    @property
    def intact(self) -> bool:
        return _digest(self._pages, self._header.data_bytes) == self._header.digest

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        name, found, start = self._take(list)
        if (name, tuple(found)) != (str(dtype).removeprefix("torch."), tuple(shape)):
            raise CannotShare(f"{name}{found} stands where {dtype}{list(shape)} is wanted")
        return _tensor(self._pages, shape, dtype, start)

    def note(self, decide: Callable[[], str]) -> str:
        return self._take(str)

    def leaves_out(self, what: str) -> None:
        raise CannotShare(what)

    def finish(self) -> None:
        if self._next != len(self._header.records):
            raise CannotShare("there is more in the segment than the model wants")
        self._pages.collapse(_HEADER_BYTES + self._header.data_bytes)

    def _take(self, kind: type[T]) -> T:
        if self._next == len(self._header.records):
            raise CannotShare("there is less in the segment than the model wants")
        record = self._header.records[self._next]
        self._next += 1
        if not isinstance(record, kind):
            raise CannotShare("what is in the segment is in another order than the model wants it")
        return record


@dataclass(frozen=True, slots=True)
class Sharing:
    """How one engine comes to its weights where a segment is passed on to it. `digest` waits for
    the digest of the model."""

    segment: Segment
    digest: Callable[[], str]

    def load(
        self, platform: Platform, read: Callable[[], T], adopt: Callable[[], T], most_bytes: int
    ) -> T:
        """The model, by `adopt` from what the segment has, or by `read`, which fills it where it
        is empty. While either runs, the platform's `keeper` says where weights are."""
        try:
            if platform.packing is None:
                raise CannotShare("this platform packs them in a form of its own")
            return self._load(platform, read, adopt, most_bytes)
        except CannotShare as exc:
            log.info("the weights are not shared: %s", exc)
        finally:
            platform.keeper = PRIVATE
        return read()  # here the half of a model is gone that the exception knew of

    def _load(
        self, platform: Platform, read: Callable[[], T], adopt: Callable[[], T], most_bytes: int
    ) -> T:
        segment = self.segment
        with segment.locked():
            header = segment.header()
            if header is not None and not header.key:
                raise CannotShare("another engine could not share all of them")
            if header is not None and header.key != self._key(platform):
                if segment.is_used():
                    raise CannotShare("they are others than those that the first engine read")
                segment.clear()
                header = None
            if header is None:
                return self._publish(platform, read, most_bytes)
            segment.use()
        mapped = Mapped(segment, header)
        if not mapped.intact:
            log.warning("the shared weights are damaged: they are read and written again")
            with segment.locked():
                header = segment.header()  # perhaps a sibling has been faster
                if header is None or not (mapped := Mapped(segment, header)).intact:
                    return self._publish(platform, read, most_bytes)
        platform.keeper = mapped
        model = adopt()
        mapped.finish()
        log.info("the weights are shared with the engines beside this one")
        return model

    def _publish(self, platform: Platform, read: Callable[[], T], most_bytes: int) -> T:
        """To be called by who has the segment locked."""
        try:
            platform.keeper = publishing = Publishing(self.segment, most_bytes)
            model = read()
            publishing.publish(self._key(platform))
            self.segment.use()
            return model
        except CannotShare:
            self._withdraw(most_bytes)
            raise

    def _withdraw(self, most_bytes: int) -> None:
        """Nobody else is to try. What siblings have mapped stays theirs."""
        with contextlib.suppress(CannotShare):
            is_used = self.segment.is_used()
            if not is_used:
                self.segment.clear()
            self.segment.complete(_Header("", most_bytes if is_used else 0, "", []))

    def _key(self, platform: Platform) -> str:
        """Equal where the same weights are packed in the same way."""
        parts = [self.digest(), str(platform.packing), __version__]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tensor(
    pages: SharedPages, shape: tuple[int, ...], dtype: torch.dtype, start: int
) -> torch.Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    offset = _HEADER_BYTES + start
    return torch.frombuffer(pages.buffer, dtype=dtype, count=count, offset=offset).view(shape)


def _digest(pages: SharedPages, num_bytes: int) -> str:
    """xxh3-128 over the digests of pieces, which are computed side by side."""
    whole = memoryview(pages.buffer).cast("B")[_HEADER_BYTES : _HEADER_BYTES + num_bytes]

    def piece(start: int) -> bytes:
        return xxhash.xxh3_128_digest(whole[start : start + _PIECE_BYTES])

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        pieces = threads.map(piece, range(0, num_bytes, _PIECE_BYTES))
        return xxhash.xxh3_128_hexdigest(b"".join(pieces))


def room_for(declared_bytes: int) -> int:
    """More than packing and padding can come to. What is not used is never there."""
    return -(-(2 * declared_bytes + (64 << 20)) // mmap.PAGESIZE) * mmap.PAGESIZE
