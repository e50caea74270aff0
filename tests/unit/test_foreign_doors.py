"""What a router lets through to engines: paths, headers, and the word for whom it asks."""

from __future__ import annotations

import asyncio
import posixpath
from urllib.parse import unquote

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.helpers import raw_http
from tests.helpers.live_router import Live, live_router
from tests.helpers.mock_openai import Exchange, MockEngine, answers
from tests.helpers.routed import CHAT, chat, idle, only

from penstock.protocol.errors import AuthenticationFailed, InvalidRequest
from penstock.service.api.auth import AdminDoor
from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.headers import end_to_end
from penstock.service.foreign.router import Router
from penstock.service.foreign.target import COMPUTES, for_engines, origin_form


async def ask(live: Live, target: str, method: str = "GET", *lines: str) -> raw_http.Answer:
    head = [f"{method} {target} HTTP/1.1", "Host: pub", "Content-Length: 0", *lines]
    async with raw_http.connection(live.port) as (reader, writer):
        writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1"))
        return await raw_http.read_answer(reader)


# --- targets -------------------------------------------------------------------------------------

ADMIN = [
    "/admin/requests", "http://x/admin/requests", "HTTPS://x:1/admin/requests", "//admin/requests",
    "/v1/../admin/requests", "/v1/%2e%2e/admin/requests", "/%61dmin/requests", "/v1//../admin",
    "/./admin/requests", "/v1/..%2fadmin/requests", "http://x//v1/../admin?a=/v1/",
]  # fmt: skip
NO_PATH = [
    "*", "x:443", "ftp://x/v1/models", "http:///admin", "/v1/..%5cadmin", "/v1/..\\admin",
    "/v1/%252e%252e/admin", "/v1/..;/admin", "/v1/x%00", "/v1/x#/../../admin", "/v1/%ff",
    "/v1/\xff",
]  # fmt: skip
NOBODYS = [
    "/", "/adminx/requests", "/ADMIN/requests", "/flush_cache", "/docs", "/metrics/x", "/v1",
    "http://x/update_weights_from_disk", "/health/admin", "/sleep",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("targets, status", [(ADMIN, 401), (NO_PATH, 400), (NOBODYS, 404)])
async def test_engines_never_see_what_is_not_for_them(
    targets: list[str], status: int, method: str
) -> None:
    settings = {"api_keys": ("user",), "admin_keys": ("root",)}
    async with MockEngine() as engine, live_router(engine, **settings) as live:
        for target in targets:
            answer = await ask(live, target, method, "Authorization: Bearer user")
            assert answer.status == status, (target, answer.body)
        assert not engine.exchanges
        idle(live)


async def test_nobody_drains_with_a_key_for_text() -> None:
    settings = {"api_keys": ("user",), "admin_keys": ("root",)}
    async with MockEngine() as engine, live_router(engine, **settings) as live:
        name = live.router.fleet.engines[0].name
        for before in ("", "http://x", "/", "/v1/..", "/%2e", "x"):
            for door in ("admin", "adminx", "%61dmin"):
                target = f"{before}/{door}/instances/{name}/drain"
                answer = await ask(live, target, "POST", "Authorization: Bearer user")
                assert answer.status in (400, 401, 404), target
        assert live.router.fleet.engines[0].state == "active"
        target = f"http://x/admin/instances/{name}/drain"
        assert (await ask(live, target, "POST", "Authorization: Bearer root")).status == 202


async def test_an_open_admin_door_opens_to_its_own_path_only() -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        assert (await ask(live, "/admin/requests", "GET")).status == 401  # Host: pub
        for target in ("//admin/cluster", "http://127.0.0.1/admin/cluster"):
            assert (await ask(live, target)).status == 401
        assert (await raw_http.request(live.port, "/admin/cluster")).status == 401  # Host: test
        assert not engine.exchanges


@pytest.mark.parametrize(
    ("target", "goes_on"),
    [("http://x/v1/files/1?a=b", "/v1/files/1?a=b"), ("//v1//files/1", "/v1/files/1"),
     ("/v1/x/../files/./1", "/v1/files/1"), ("/v1/models/../files/a%20b", "/v1/files/a%20b"),
     ("/v1/files/a%2Fb?q=%2e%2e", "/v1/files/a%2Fb?q=%2e%2e"), ("/v1/files/", "/v1/files/")],
)  # fmt: skip
async def test_a_target_goes_on_as_it_came_or_plainly_written(target: str, goes_on: str) -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        assert (await ask(live, target)).status == 200
        assert engine.exchanges[0].path == goes_on


_PIECES = ["/", "//", ".", "..", "v1", "admin", "%2e", "%2F", "%61", "%25", "\\", "%5c", ";", "?",
           "#", "http://", "x", ":", "@", "*", "%", "%c3%a9", "\xe9"]  # fmt: skip


@given(st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
@example("http://v1/admin")
def test_what_engines_read_in_a_target_is_what_was_checked(target: str) -> None:
    try:
        goes_on, path = origin_form(target.encode("latin-1"))
    except InvalidRequest:
        return
    assert path.startswith("/") and not path.startswith("//")
    assert origin_form(goes_on) == (goes_on, path)
    # As uvicorn reads it; and as a server that resolves dots, before or after unescaping.
    read = unquote(httptools.parse_url(goes_on).path.decode("ascii"))
    assert read == path
    for seen in (read, unquote(read), posixpath.normpath(goes_on.partition(b"?")[0].decode())):
        resolved = posixpath.normpath(unquote(seen))
        assert resolved == posixpath.normpath(path)
        if for_engines(path):
            assert resolved == "/v1" or resolved.startswith("/v1/") or resolved in COMPUTES


# --- headers -------------------------------------------------------------------------------------


async def test_headers_of_the_clients_connection_stay_here() -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        body = b"{}"
        head = [
            f"POST {CHAT} HTTP/1.1", "Host: pub", "Connection: close, X-Mine,x-forwarded-for",
            "Connection: Authorization , content-length", "X-Mine: 1", "Authorization: Bearer a",
            "Keep-Alive: timeout=5", "TE: trailers", "Trailer: X-T", "Proxy-Connection: close",
            "Proxy-Authorization: Basic x", "X-Forwarded-For: 127.0.0.1", "X-Kept: 2",
            "Expect: 100-continue", "Accept-Encoding: gzip", "Transfer-Encoding: chunked",
        ]  # fmt: skip
        async with raw_http.connection(live.port) as (reader, writer):
            writer.write("\r\n".join([*head, "", ""]).encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"%x\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(body), body))
            assert (await raw_http.read_answer(reader)).status == 200
        seen = engine.exchanges[0].headers
        assert seen.pop("x-request-id")
        assert seen == {
            "host": f"127.0.0.1:{engine.port}", "x-kept": "2", "x-forwarded-for": "127.0.0.1",
            "content-length": "2",
        }  # fmt: skip


async def test_headers_of_the_engines_connection_stay_here() -> None:
    async def answers_with(exchange: Exchange) -> None:
        await exchange.send(
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Its, Content-Length\r\nX-Its: 1\r\n"
            b"Keep-Alive: timeout=5\r\nTrailer: X-T\r\nProxy-Authenticate: Basic\r\n"
            b"Upgrade: h2c\r\nX-Kept: 2\r\nContent-Length: 2\r\n\r\n{}"
        )

    async with MockEngine() as engine, live_router(engine, hold_bytes=0) as live:
        engine.behave = answers_with
        answer = await raw_http.request(live.port, CHAT, chat(), close=False)
        names = {line.partition(b":")[0] for line in answer.head.split(b"\r\n")[1:] if line}
        assert names == {b"x-kept", b"content-length", b"x-request-id"}
        assert answer.body == b"{}"


@pytest.mark.parametrize(
    "line",
    [b"x: a\rset-cookie: b", b"x: a\nset-cookie: b", b"x: a\x00b", b"x: a\r\n set-cookie: b"],
)
async def test_what_an_engine_puts_into_a_header_adds_none(line: bytes) -> None:
    async def injects(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n" + line + b"\r\ncontent-length: 2\r\n\r\n{}")

    async with MockEngine() as engine, live_router(engine, max_retries=0) as live:
        engine.behave = injects
        answer = await raw_http.request(live.port, CHAT, chat())
        fields = answer.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        assert not any(b"\r" in f or b"\n" in f or b"\x00" in f for f in fields)
        assert not any(field.lower().startswith(b"set-cookie") for field in fields)
        assert not any(field.startswith((b" ", b"\t")) for field in fields)


@pytest.mark.parametrize("value", ["a\rx-two: 2", "a\x00b", "a b", "\xe9", "x" * 129, ""])
async def test_a_request_id_that_is_none_is_replaced(value: str) -> None:
    async with MockEngine() as engine, live_router(engine) as live:
        await ask(live, "/v1/files/1", "GET", f"X-Request-Id: {value}")
        for exchange in engine.exchanges:  # none, where the whole request is refused
            assert exchange.headers["x-request-id"] != value
            assert "x-two" not in exchange.headers


def test_length_is_not_of_a_connection() -> None:
    headers = [(b"connection", b"content-length, Foo"), (b"content-length", b"1"), (b"foo", b"")]
    assert end_to_end(headers) == [(b"content-length", b"1")]


async def test_our_own_admin_door_takes_no_router_for_its_client() -> None:
    """With a Host of loopback and from there, as an engine beside the router sees it."""
    async with MockEngine() as engine, live_router(engine) as live:
        for more in ((), ("X-Forwarded-For: 10.1.2.3",), ("Connection: X-Forwarded-For",)):
            await ask(live, "/v1/files/1", "GET", *more)
            seen = engine.exchanges[-1].headers
            headers = [(k.encode(), v.encode()) for k, v in seen.items()]
            scope = {"headers": headers, "client": ("127.0.0.1", 1)}
            with pytest.raises(AuthenticationFailed):
                AdminDoor(()).check(scope)
            bare = [header for header in headers if header[0] != b"x-forwarded-for"]
            AdminDoor(()).check({**scope, "headers": bare})  # it is the header that shuts it
        assert engine.exchanges[1].headers["x-forwarded-for"] == "10.1.2.3, 127.0.0.1"


async def test_on_a_unix_socket_the_client_has_no_address(tmp_path: object) -> None:
    async with MockEngine() as engine:
        engine.behave = answers
        router = Router(RouterConfig(engines=(engine.url,)))
        path = f"{tmp_path}/r.sock"
        server = await asyncio.get_running_loop().create_unix_server(router.connection, path)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(raw_http.encoded(CHAT, chat()))
        assert only(await raw_http.read_answer(reader)) == "a"
        assert engine.exchanges[0].headers["x-forwarded-for"] == "unknown"
        writer.close()
        server.close()
        await router.finished(0.0)
