"""What a recording is made of: everything that went into a service's core, in order.

A file is `MAGIC`, then pieces: a head (lengths and a checksum) and deflated msgpack, the first with
the `Header`, each other one with many `Step`s. A piece that is torn or spoilt ends the recording:
what comes before it is whole. The cores have no clock, no randomness and no input beside these, so
the same steps into a new core give the same effects; a step carries a digest of its own.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import struct
import typing
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from penstock.protocol.codec import Message, decode, encode
from penstock.protocol.effects import Effect, Send
from penstock.protocol.errors import ConfigError, ErrorInfo, PenstockError, from_info
from penstock.protocol.tokens import Credit
from penstock.service.core import ServiceCore
from penstock.service.recipe import CoreRecipe

MAGIC = b"penstock recording\n"
FORMAT = 1
#: "PR", the length as stored, the length when inflated, crc32 of what is stored.
_HEAD = struct.Struct("<2sIII")
_MARK = b"PR"
#: A piece that says it is longer than this is no piece.
_MOST_BYTES = 1 << 30

#: The core's methods by which anything comes in; all others only look.
INPUTS = (
    "submit",
    "cancel",
    "on_message",
    "on_timer",
    "add_instance",
    "expect",
    "on_instance_lost",
    "on_instance_refused",
    "doubt",
    "lead",
    "assign",
    "drain_instance",
    "take_out",
    "bring_back",
    "on_drained",
    "remove_instance",
    "close_all",
)


def _struct_of(name: str) -> type[msgspec.Struct]:
    """A struct with the parameters of a method: what one call of it is on disk."""
    method = getattr(ServiceCore, name)
    hints = typing.get_type_hints(method)
    fields: list[Any] = []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        stored: Any = {Message: bytes, PenstockError: ErrorInfo}.get(
            hints[parameter.name], hints[parameter.name]
        )
        if parameter.default is inspect.Parameter.empty:
            fields.append((parameter.name, stored))
        else:
            fields.append((parameter.name, stored, parameter.default))
    return msgspec.defstruct(name, fields, tag=name, array_like=True, frozen=True, gc=False)


#: By the name of the method.
CALLS: dict[str, type[msgspec.Struct]] = {name: _struct_of(name) for name in INPUTS}
_KEYWORDS = {
    name: [
        p.name
        for p in inspect.signature(getattr(ServiceCore, name)).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in INPUTS
}


class Step(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One call: what went in, and what came of it. `sends`: who was sent what, in words (credits
    left out). `raised`: the code of an error of ours, or what broke the core."""

    call: Any
    digest: int
    num_effects: int
    sends: list[str] = []
    raised: str = ""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """`started_unix_s` is for people; the core's clock is that of the steps."""

    format: int = FORMAT
    version: str
    #: Of the source that decides (`code_digest`): releases are one thing, what runs is another.
    code: str = ""
    protocol: int
    python: str
    started_unix_s: float
    recipe: CoreRecipe
    #: What the service was told beside that: the model, names, seed of requests that bring none.
    facts: dict[str, str] = {}


_StoredStep = msgspec.defstruct(
    "_StoredStep",
    [
        ("call", typing.Union[tuple(CALLS.values())]),  # noqa: UP007
        ("digest", int),
        ("num_effects", int),
        ("sends", list[str], msgspec.field(default_factory=list)),
        ("raised", str, ""),
    ],
    array_like=True,
    frozen=True,
)
_encoder = msgspec.msgpack.Encoder()
# mypy cannot know a class that is made at run time.
_steps = msgspec.msgpack.Decoder(list[_StoredStep])  # type: ignore[valid-type]


@functools.cache
def code_digest() -> str:
    """Of the source of the service and the protocol: where it is the same, so are decisions."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in ("protocol", "service"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# --- calls ----------------------------------------------------------------------------------------


def pack_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> msgspec.Struct:
    if name == "on_message":
        peer, message, now = args
        return CALLS[name](peer, encode(message), now)
    if name == "close_all":
        return CALLS[name](args[0].info())
    return CALLS[name](*args, **kwargs)


def name_of(call: Any) -> str:
    return type(call).__name__


def message_of(call: Any) -> Message:
    """Of an `on_message`. Raises `ProtocolError`."""
    return decode(call.message)


def make_call(core: ServiceCore, call: Any) -> list[Effect]:
    """The recorded call, once more. Raises what it raises."""
    name = name_of(call)
    values = {f: getattr(call, f) for f in call.__struct_fields__}
    if name == "on_message":
        values["message"] = decode(values["message"])
    elif name == "close_all":
        values["error"] = from_info(values["error"])
    keywords = {k: values.pop(k) for k in _KEYWORDS[name]}
    effects: list[Effect] | None = getattr(core, name)(*values.values(), **keywords)
    return effects or []


def digest_of(effects: Sequence[Effect]) -> int:
    return xxhash.xxh3_64_intdigest(_encoder.encode(effects)) if effects else 0


def sends_of(effects: Sequence[Effect]) -> list[str]:
    """ "engine-1 submit req-4/0" and its like."""
    return [_words(e) for e in effects if type(e) is Send and type(e.message) is not Credit]


def _words(send: Send) -> str:
    message = send.message
    words = [send.peer, type(message).__name__.lower()]
    if (request_id := getattr(message, "request_id", None)) is not None:
        words.append(f"{request_id} attempt {getattr(message, 'attempt', 0)}")
    if (role := getattr(message, "role", None)) is not None:
        words.append(str(role))
    return " ".join(words)


# --- pieces ---------------------------------------------------------------------------------------


def piece(body: bytes) -> bytes:
    stored = zlib.compress(body, 1)
    return _HEAD.pack(_MARK, len(stored), len(body), zlib.crc32(stored)) + stored


def encode_header(header: Header) -> bytes:
    return MAGIC + piece(_encoder.encode(header))


def encode_step(step: Step) -> bytes:
    return _encoder.encode(step)


def array_of(steps: Sequence[bytes]) -> bytes:
    """Encoded steps as one msgpack array."""
    return b"\xdd" + len(steps).to_bytes(4, "big") + b"".join(steps)


@dataclass(slots=True)
class Recording:
    """A file that was read up to its header. Iterate once; then `problem` says whether it ends as
    it should ("" if it does)."""

    path: Path
    header: Header
    problem: str = ""
    _after_header: int = field(default=0, repr=False)

    def __iter__(self) -> Iterator[Any]:
        """`Step`s. Raises `ConfigError` where this release cannot read one."""
        with self.path.open("rb") as file:
            file.seek(self._after_header)
            while True:
                at = file.tell()
                body, self.problem = _read_piece(file)
                if body is None:
                    if self.problem:
                        self.problem = _lost(self.problem, at)
                    return
                try:
                    steps = _steps.decode(body)
                except UnicodeDecodeError:
                    self.problem = _lost("it is damaged", at)
                    return
                except (msgspec.DecodeError, msgspec.ValidationError) as exc:
                    raise ConfigError(
                        f"{self.path} was recorded by release {self.header.version} and this one "
                        f"reads it differently ({exc}): replay it with that release"
                    ) from None
                yield from steps


def _lost(problem: str, at: int) -> str:
    return f"{problem} at byte {at}: what follows cannot be replayed"


def open_recording(path: Path) -> Recording:
    """Raises `ConfigError` for what is no recording, or one of another format."""
    try:
        with path.open("rb") as file:
            found = file.read(len(MAGIC))
            if not found:
                raise ConfigError(f"{path} is empty: the service ended before it began")
            if found != MAGIC:
                raise ConfigError(f"{path} is no recording of a service (see --record)")
            body, problem = _read_piece(file)
            after = file.tell()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from None
    if body is None:
        raise ConfigError(f"{path}: {problem or 'there is nothing'} in its header")
    try:
        found = msgspec.msgpack.decode(body)["format"]
        if found != FORMAT:
            raise ConfigError(f"{path} has format {found} and this release reads {FORMAT}")
        header = msgspec.msgpack.decode(body, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path}: its header cannot be read ({exc})") from None
    return Recording(path, header, "", after)


def _read_piece(file: typing.BinaryIO) -> tuple[bytes | None, str]:
    """(what it holds, "") or (None, what is wrong, "" at the end)."""
    head = file.read(_HEAD.size)
    if not head:
        return None, ""
    if len(head) < _HEAD.size:
        return None, "it ends within a piece"
    mark, stored_bytes, inflated_bytes, checksum = _HEAD.unpack(head)
    if mark != _MARK or max(stored_bytes, inflated_bytes) > _MOST_BYTES:
        return None, "it is damaged"
    stored = file.read(stored_bytes)
    if len(stored) < stored_bytes:
        return None, "it ends within a piece"
    if zlib.crc32(stored) != checksum:
        return None, "it is damaged"
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(stored, inflated_bytes + 1)
    except zlib.error:
        return None, "it is damaged"
    if len(body) != inflated_bytes or not inflate.eof or inflate.unused_data:
        return None, "it is damaged"
    return body, ""
