"""Blocks that leave the host are sealed: TLS for the bytes, the cluster's secret for who is there.

TLS 1.2 with an anonymous key exchange (ADH over ffdhe3072, RFC 7919; AES-128-GCM) keeps what passes
from whoever listens or writes, and says nothing about who the other side is. That is said by the
greeting inside: its HMACs cover `tls-unique` (RFC 5929), a value that both ends of one TLS
connection know and two connections never share. Somebody in the middle has two, so what the ends
prove to each other through him does not fit, as with SCRAM-PLUS (RFC 5802). No certificates, no
keys on disks; and who learns the secret later cannot read what he has recorded.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from functools import cache
from pathlib import Path

from penstock.protocol.errors import ConfigError

#: Anonymous suites are switched off above level 0; nothing but this one suite is ever offered.
_SUITE = "ADH-AES128-GCM-SHA256:@SECLEVEL=0"
_GROUP = Path(__file__).with_name("ffdhe3072.pem")


def leaves_host(connection: socket.socket) -> bool:
    """Whether the other end may be elsewhere. What comes from outside under an address of this host
    is dropped by the kernel, so two equal addresses are one host."""
    ours, theirs = (
        ipaddress.ip_address(name[0].partition("%")[0])
        for name in (connection.getsockname(), connection.getpeername())
    )
    return ours != theirs and not (ours.is_loopback and theirs.is_loopback)


def wrap(connection: socket.socket, *, server: bool) -> ssl.SSLSocket:
    """Not shaken hands yet: `do_handshake` is the caller's, within the connection's timeout.
    Raises `OSError`."""
    context = _context(server)
    return context.wrap_socket(connection, server_side=server, do_handshake_on_connect=False)


def binding(connection: socket.socket) -> bytes:
    """What proofs made over this connection must cover; nothing where it is not sealed."""
    if not isinstance(connection, ssl.SSLSocket):
        return b""
    found = connection.get_channel_binding("tls-unique")
    # A session that is taken up again would have a binding that others may have arranged.
    if not found or connection.session_reused:
        raise ssl.SSLError("the connection cannot be told from others")
    return found


def cut(connection: socket.socket) -> None:
    """End it from any thread: whoever reads or writes there is told. Raises `OSError`."""
    # Not `SSLSocket.shutdown`, behind which the same object would read on without TLS.
    socket.socket.shutdown(connection, socket.SHUT_RDWR)


@cache
def _context(server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    try:
        context.set_ciphers(_SUITE)
        if server:
            context.load_dh_params(str(_GROUP))
    except ssl.SSLError as exc:
        raise ConfigError(
            f"this Python's TLS ({ssl.OPENSSL_VERSION}) cannot seal KV blocks between hosts "
            f"({exc.reason}): use --kv-transfer map, or off"
        ) from exc
    return context


def require() -> None:
    """Raises `ConfigError` where nothing can be sealed."""
    for server in (False, True):
        _context(server)
