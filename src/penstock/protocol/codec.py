"""Messages as bytes: one version byte, then msgpack of a tagged struct."""

from __future__ import annotations

import msgspec

from penstock.protocol.errors import ProtocolError, VersionMismatch
from penstock.protocol.instance import (
    Assign,
    Assigned,
    Attach,
    Attached,
    Detach,
    Drain,
    Load,
    LoadWeights,
    Probe,
    Probed,
    Resync,
    Sleep,
    Snapshot,
    Wake,
)
from penstock.protocol.kv import (
    Ack,
    BlocksReady,
    Encoded,
    Fetch,
    Fetched,
    KvEvents,
    Pull,
    Refused,
    Release,
)
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import Credit, PromptLogprobs, Tokens

PROTOCOL_VERSION = 2

ToInstance = (
    Submit | Cancel | Attach | Detach | Resync | Assign | Drain | Sleep | Wake | LoadWeights
    | Probe | Credit | Fetch
)  # fmt: skip
ToService = (
    Attached | Tokens | PromptLogprobs | KvEvents | Load | Snapshot | Assigned | Probed | Refused
    | Fetched
)  # fmt: skip
BetweenInstances = Pull | Refused | BlocksReady | Ack | Release | Encoded
Message = ToInstance | ToService | BetweenInstances

# Tagged unions cannot mix array-like structs with map-like ones, so each kind has a decoder and the
# second byte of a frame says which.
_ARRAYS = Tokens | PromptLogprobs | KvEvents
_MAPS = (
    Submit | Cancel | Attach | Detach | Resync | Assign | Drain | Sleep | Wake | LoadWeights
    | Probe | Credit | Attached | Load | Snapshot | Assigned | Probed | Fetch | Fetched
    | Refused | Pull | BlocksReady | Ack | Release | Encoded
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_array_decoder = msgspec.msgpack.Decoder(_ARRAYS)
_map_decoder = msgspec.msgpack.Decoder(_MAPS)
_ARRAY_HEAD = bytes((PROTOCOL_VERSION, 1))
_MAP_HEAD = bytes((PROTOCOL_VERSION, 0))


def encode(message: Message) -> bytes:
    head = _ARRAY_HEAD if isinstance(message, (Tokens, PromptLogprobs, KvEvents)) else _MAP_HEAD
    return head + _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """Raises `VersionMismatch` for another version's frame and `ProtocolError` for garbage."""
    if len(frame) < 2:
        raise ProtocolError(f"a frame of {len(frame)} bytes is no message")
    if frame[0] != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the peer speaks protocol version {frame[0]}, this side {PROTOCOL_VERSION}: "
            "run the same Penstock release on both"
        )
    try:
        body = memoryview(frame)[2:]
        message: Message = (
            _array_decoder.decode(body) if frame[1] == 1 else _map_decoder.decode(body)
        )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"not a message of this protocol: {exc}") from exc
    return message
