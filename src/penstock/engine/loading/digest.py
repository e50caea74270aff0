"""A short name for what a model computes: the root of every KV block's key.

Two instances with equal digests write the same KV for the same tokens, so it covers every byte of
the weights, and of the settings those that KV depends on; what it does not depend on (such as how
long a context is served, with most rotary embeddings) is left out, so that partners stay partners.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from penstock.checkpoint import Checkpoint
from penstock.engine.layers.rotary import length_that_decides
from penstock.engine.loading.tensors import CheckpointTensors
from penstock.engine.models.config import ModelConfig
from penstock.engine.platforms.cpu.kernels import cache_folder
from penstock.engine.quantization.select import SETTINGS_FILES, quantization_of
from penstock.protocol.errors import CheckpointError

log = logging.getLogger(__name__)

#: A file is hashed in pieces, side by side: what a file's digest is depends on this number.
PIECE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_THREADS = 2
#: A file that changed so lately may change again within one tick of its file system's clock.
_SETTLED_NS = 2_000_000_000


def model_digest(checkpoint_digest: str, config: ModelConfig) -> str:
    """64 hex digits: what is stored, and what decides how `config` computes with it. Equal for
    served lengths that make no difference to the rotary embedding."""
    h = hashlib.sha256()
    _add(h, checkpoint_digest.encode(), config.dtype.encode())
    if (length := length_that_decides(config.rope, config.max_model_len)) is not None:
        _add(h, b"rotary length", str(length).encode())
    return h.hexdigest()


def checkpoint_digest(
    checkpoint: Checkpoint,
    *,
    load_format: str = "auto",
    seed: int = 0,
    quantization: str = "auto",
    stop: threading.Event | None = None,
) -> str:
    """64 hex digits: sha256 over config.json, what `quantization` makes of the weights, and each
    weight file's name and content. Equal for a copy of the folder elsewhere. Raises
    `CheckpointError`, and `ConfigError` as `quantization_of` does; if `stop` is set, soon."""
    _ = checkpoint.config  # says what is wrong with it
    h = hashlib.sha256()
    for name in ("config.json", *SETTINGS_FILES):
        if (text := checkpoint.text(name)) is not None:
            _add(h, name.encode(), text.encode())
    if label := quantization_of(checkpoint, quantization).label:
        _add(h, b"quantization", label.encode())
    if load_format == "dummy":
        _add(h, b"dummy", str(seed).encode())
        return h.hexdigest()
    with CheckpointTensors(checkpoint) as tensors:  # says what is wrong with the files
        paths = [file.path for file in tensors.files]
    for path in paths:
        _add(h, path.name.encode(), _remembered(path, stop or threading.Event()))
    return h.hexdigest()


@contextmanager
def computed_beside(
    checkpoint: Checkpoint, *, load_format: str, seed: int, quantization: str
) -> Iterator[Callable[[], str]]:
    """Hash on a thread while the caller loads the same files; what is given waits for the
    `checkpoint_digest`. A caller that fails does not wait."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, "digest") as thread:
        hashing = thread.submit(
            checkpoint_digest,
            checkpoint,
            load_format=load_format,
            seed=seed,
            quantization=quantization,
            stop=stop,
        )
        try:
            yield hashing.result
        finally:
            stop.set()


def file_digest(path: Path, stop: threading.Event | None = None) -> bytes:
    """16 bytes: xxh3-128 over the file's size and the xxh3-128 of each piece. It names what was
    published or written by mistake; it is no proof against who forges weights on purpose. Raises
    `CheckpointError`."""
    never = threading.Event()
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_THREADS) as threads:
            fd = file.fileno()
            num_bytes = os.fstat(fd).st_size

            def piece(start: int) -> bytes:
                return _piece(fd, start, min(PIECE_BYTES, num_bytes - start), stop or never)

            pieces = threads.map(piece, range(0, num_bytes, PIECE_BYTES))
            return xxhash.xxh3_128_digest(num_bytes.to_bytes(8, "little") + b"".join(pieces))
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _piece(fd: int, start: int, num_bytes: int, stop: threading.Event) -> bytes:
    """Read rather than mapped: a mapped file that is cut short kills its reader."""
    h = xxhash.xxh3_128()
    buffer = bytearray(min(_READ_BYTES, num_bytes))
    at, end = start, start + num_bytes
    while at < end:
        if stop.is_set():
            raise CheckpointError("nobody waits for the digest any more")
        taken = os.preadv(fd, [memoryview(buffer)[: end - at]], at)
        if not taken:
            raise CheckpointError("a weight file became shorter while it was read")
        h.update(memoryview(buffer)[:taken])
        at += taken
    return h.digest()


def _remembered(path: Path, stop: threading.Event) -> bytes:
    """`file_digest`, from the cache if the file has not been touched since.

    The time of the last change of status (ctime) is part of its name: unlike mtime, nobody can set
    it back.
    """
    before = _stamp(path)
    kept = cache_folder() / "digests" / hashlib.sha256(repr(before).encode()).hexdigest()[:32]
    with suppress(OSError):
        content = kept.read_bytes()
        if len(content) == 32 and hashlib.sha256(content[:16]).digest()[:16] == content[16:]:
            return content[:16]
    digest = file_digest(path, stop)
    settled = time.time_ns() - before[-1] > _SETTLED_NS
    if settled and _stamp(path) == before:
        _keep(kept, digest + hashlib.sha256(digest).digest()[:16])
    return digest


def _stamp(path: Path) -> tuple[str, int, int, int, int, int]:
    """Another one for another file, and for another content of this one."""
    try:
        real = path.resolve()
        s = real.stat()
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    return str(real), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _keep(kept: Path, content: bytes) -> None:
    """Where that is impossible (a full disk, a read-only home), the next start hashes again."""
    scratch = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(kept)  # atomic: another process sees all of it or nothing
    except OSError as exc:
        log.debug("the digest of weights is not kept: %s", exc)


def _add(h: hashlib._Hash, *parts: bytes) -> None:
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
