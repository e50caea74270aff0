"""Which headers go through the router. Names are in lower case."""

from __future__ import annotations

Headers = list[tuple[bytes, bytes]]

#: Of a connection, not of the message: they end here (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection", b"http2-settings",
     b"proxy-authentication-info")
)  # fmt: skip
#: Never of a connection alone, whatever a Connection header says: without it a body has no end.
_FRAMING = b"content-length"


def end_to_end(headers: Headers) -> Headers:
    """Without those of the connection: the known ones, and those that Connection names."""
    named = {
        word.strip().lower()
        for name, value in headers
        if name == b"connection"
        for word in value.split(b",")
    }
    stay_here = _HOP_BY_HOP | (named - {_FRAMING})
    return [header for header in headers if header[0] not in stay_here]


def forwarded_for(headers: Headers, client: str) -> bytes:
    """For whom a request is asked: who asked us, after whoever they say that they ask for. A
    server that opens doors to its own machine (ours does) must not take us for the asker."""
    before = [value for name, value in headers if name == b"x-forwarded-for"]
    return b", ".join([*before, client.encode("ascii", "replace")])
