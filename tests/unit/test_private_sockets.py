"""What API workers say to each other, beside TLS towards clients."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.service.app import _Server, _uvicorn_config
from penstock.service.config import ServeConfig, TlsConfig
from penstock.service.listener import private_listener


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@pytest.fixture
def tls(tmp_path: Path) -> TlsConfig:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return TlsConfig(ssl_keyfile=str(key), ssl_certfile=str(cert))


async def test_private_sockets_are_plain_where_clients_speak_tls(
    tls: TlsConfig, tmp_path: Path
) -> None:
    config = replace(ServeConfig("m", ("m",)), tls=tls)
    private = str(tmp_path / "api-0.sock")
    with socket.socket() as public:
        public.bind(("127.0.0.1", 0))
        public.listen()
        url = f"https://127.0.0.1:{public.getsockname()[1]}/"
        server = _Server(_uvicorn_config(config, application), [private_listener(private)])
        serving = asyncio.ensure_future(server.serve(sockets=[public]))
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.01)
            way = httpx.AsyncHTTPTransport(uds=private)
            async with httpx.AsyncClient(transport=way) as sibling:
                assert (await sibling.get("http://localhost/")).text == "http"
            trusted = ssl.create_default_context(cafile=tls.ssl_certfile)
            async with httpx.AsyncClient(verify=trusted) as client:
                assert (await client.get(url)).text == "https"
            server.should_exit = True
            await serving
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(OSError):
        late.connect(private)
