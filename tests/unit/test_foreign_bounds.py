"""A router that meets what nobody had in mind: URLs, figures, names and failures of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.helpers import raw_http
from tests.helpers.live_router import Live, live_router
from tests.helpers.mock_openai import Exchange, MockEngine, dies, refuses
from tests.helpers.routed import CHAT, chat, idle, only

from penstock.cli.router_foreign import config_of
from penstock.protocol.errors import ConfigError
from penstock.service.foreign import exchange as routed_exchange
from penstock.service.foreign.attempt import Attempt
from penstock.service.foreign.config import RouterConfig, engine_name
from penstock.service.foreign.model_counts import MOST_NAMES
from penstock.service.foreign.upstream import Pool, UpstreamError


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


# --- URLs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "name"),
    [("http://a:8000", "a:8000"), ("HTTP://A:8000/", "a:8000"), ("https://a/v1/", "a:443"),
     ("http://10.0.0.1", "10.0.0.1:80"), ("http://[::1]:1", "[::1]:1"),
     ("http://vllm-0.vllm.default.svc.cluster.local:8000/v1",
      "vllm-0.vllm.default.svc.cluster.local:8000")],
)  # fmt: skip
def test_engines_are_called_by_host_and_port(url: str, name: str) -> None:
    assert engine_name(url) == name


WRONG = [
    "foo", "foo:8000", "10.0.0.1:8000", "//a:8000", "ftp://a", "http://", "http://:8000",
    "http://a..b:8000", "http://.a", "http://a b", "http://a,b", f"http://{'x' * 64}:1",
    "http://b\xfccher:1", "http://a:99999", "http://a:0", "http://a:x", "http://[::1", "http://[x]",
    "http://a/?x=1", "http://a?", "http://a#x", "http://a/x", "http://a/v1/chat/completions",
]  # fmt: skip


@pytest.mark.parametrize("url", WRONG)
def test_what_is_no_base_url_is_refused_with_one_that_is(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--engines .*http://10\.0\.0\.1:8000"):
        RouterConfig(engines=("http://ok:1", url))


@pytest.mark.parametrize("urls", [(), ("http://a:1", "http://A:1/v1"), ("http://a", "http://a:80")])
def test_no_engines_and_engines_twice_are_refused(urls: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--engines (needs|names)"):
        RouterConfig(engines=urls)


def test_a_secret_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="--engine-api-key") as caught:
        RouterConfig(engines=("http://me:secret@a:1",))
    assert "secret" not in str(caught.value)


def test_the_command_says_the_same() -> None:
    with pytest.raises(ConfigError, match="http://foo"):
        config_of(["--engines", "foo"], {})
    with pytest.raises(ConfigError, match="twice"):
        config_of(["--engines", "http://a:1,http://a:1"], {})


# --- what may not end a watch, or stay on an engine's account ------------------------------------


async def test_a_name_that_cannot_be_resolved_is_an_engine_that_cannot_be_reached() -> None:
    with pytest.raises(UpstreamError, match="cannot be reached"):
        await Pool("http://a..b:8000", 1.0).connect()


@pytest.mark.parametrize("value", ["+Inf", "-Inf", "NaN", "1e400", "-5", "+", "nonsense", "1e300"])
async def test_figures_that_are_none_are_left_out(value: str) -> None:
    async with MockEngine() as mock, live_router(mock) as live:
        engine = live.router.fleet.engines[0]
        mock.metrics = b"vllm:num_requests_waiting 3\nvllm:num_requests_running %b\n" % (
            value.encode()
        )
        await until(lambda: engine.others_queued == 3.0)
        assert engine.others_running == 0.0
        assert only(await raw_http.request(live.port, CHAT, chat())) == "a"
        await mock.stop()
        await until(lambda: engine.state == "lost")


async def test_a_watch_survives_what_nobody_thought_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with MockEngine() as mock, live_router(mock) as live:
        engine, rounds = live.router.fleet.engines[0], 0

        async def fails(_: object) -> None:
            nonlocal rounds
            rounds += 1
            raise RuntimeError("nobody thought of it")

        monkeypatch.setattr(live.watch, "ask_load", fails)
        with caplog.at_level(logging.ERROR):
            await until(lambda: rounds >= 5)
        told = [r for r in caplog.records if "could not be looked at" in r.message]
        assert len(told) == 1 and told[0].exc_info, "once, with its traceback"
        await mock.stop()
        await until(lambda: engine.state == "lost")


def breaks(monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
    async def connect() -> Any:
        raise RuntimeError("nobody thought of it")

    pool = live.router.fleet.engines[0].pool
    pool.close()
    monkeypatch.setattr(pool, "connect", connect)


async def test_a_failure_of_ours_stays_on_nobodys_account(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"health_every_s": 60.0, "breaker_failures": 2, "breaker_open_s": 0.05}
    async with MockEngine() as mock, live_router(mock, **settings) as live:
        engine = live.router.fleet.engines[0]
        with monkeypatch.context() as patch:
            breaks(patch, live)
            for _ in range(2):
                answer = await raw_http.request(live.port, CHAT, chat())
                assert answer.status == 500
            idle(live)
            assert engine.breaker.state == "open"
            await asyncio.sleep(0.06)
            # The one that tries fails so too, and does not keep the place of the next.
            assert (await raw_http.request(live.port, CHAT, chat())).status == 500
            idle(live)
        await asyncio.sleep(0.12)
        assert only(await raw_http.request(live.port, CHAT, chat())) == "a"
        assert engine.breaker.state == "closed"


async def test_a_failure_of_ours_leaves_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise RuntimeError("nobody thought of it")

    async with MockEngine() as mock, live_router(mock, health_every_s=60.0) as live:
        monkeypatch.setattr(routed_exchange.Exchange, "_head_for", fails)
        for _ in range(3):
            assert (await raw_http.request(live.port, CHAT, chat())).status == 500
        await until(lambda: not mock._tasks)
        idle(live)


async def test_a_failure_of_ours_in_an_answer_does_not_begin_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("nobody thought of it")

    async def streams(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.event(0)
        await asyncio.sleep(0.05)
        exchange.die()

    async with MockEngine() as mock, live_router(mock) as live:
        mock.behave = streams
        monkeypatch.setattr(Attempt, "end_with", fails)
        async with raw_http.connection(live.port) as (reader, writer):
            writer.write(raw_http.encoded(CHAT, chat(True)))
            try:
                seen = await reader.read()
            except ConnectionError:
                seen = b"HTTP/1.1"
        assert seen.count(b"HTTP/1.1") == 1
        idle(live)


@pytest.mark.parametrize("count", [-1, 10**30, "many", 1.5])
async def test_counts_that_are_none_end_up_in_no_sum(count: object) -> None:
    async def miscounts(exchange: Exchange) -> None:
        usage = {"prompt_tokens": count, "completion_tokens": count}
        await exchange.answer({"id": "x", "choices": [], "usage": usage})

    async with MockEngine() as mock, live_router(mock) as live:
        mock.behave = miscounts
        assert (await raw_http.request(live.port, CHAT, chat())).status == 200
        counts = live.router.fleet.engines[0].counts
        assert 0 < counts.prompt_tokens < 1000 and counts.generation_tokens == 0
        assert (await raw_http.request(live.port, "/metrics")).status == 200
        idle(live)


# --- what clients name ---------------------------------------------------------------------------


async def test_one_request_id_for_everything_grows_nothing() -> None:
    async with MockEngine() as mock, live_router(mock) as live:
        for _ in range(150):
            await raw_http.request(live.port, CHAT, chat(), x_request_id="same")
        assert 1 <= len(live.router.explainer.of_request("same")) <= 128
        idle(live)


async def samples(live: Live, family: str) -> dict[str, float]:
    """By model. Parsed by prometheus_client, which refuses what is not well-formed."""
    text = (await raw_http.request(live.port, "/metrics")).body.decode()
    return {
        sample.labels["model_name"]: sample.value
        for found in text_string_to_metric_families(text)
        for sample in found.samples
        if sample.name == family
    }


async def test_models_have_figures_of_their_own_up_to_a_number() -> None:
    names = tuple(f"m{n}" for n in range(MOST_NAMES + 10))
    async with MockEngine(models=names) as mock, live_router(mock) as live:
        for name in (*names, "m1", 'nobody"s\nmodel', "x" * 100_000):
            await raw_http.request(live.port, CHAT, chat(model=name))
        mock.behave = refuses(400)
        await raw_http.request(live.port, CHAT, chat(model="m1"))
        mock.behave = dies
        await raw_http.request(live.port, CHAT, chat(model="m2"))
        requests = await samples(live, "penstock:model_requests_total")
        assert requests["m0"] == 1 and requests["m1"] == 3
        assert requests["other"] == 12, "ten too many, and two that no engine serves"
        assert len(requests) == MOST_NAMES + 1
        failures = await samples(live, "penstock:model_failures_total")
        assert failures["m1"] == failures["m2"] == 1 and failures["other"] == 2
        assert (await samples(live, "penstock:model_prompt_tokens_total"))["m1"] == 80
        assert (await samples(live, "penstock:model_generation_tokens_total"))["m1"] == 4


async def test_names_that_engines_take_without_a_list_have_their_bounds_too() -> None:
    async with MockEngine() as mock, live_router(mock) as live:
        live.router.fleet.engines[0].models = None
        live.watch._tasks[0].cancel()  # so that it does not ask for the list again
        for name in ('a"b\\\n', "", "x" * 300, "other"):
            assert only(await raw_http.request(live.port, CHAT, chat(model=name))) == "a"
        requests = await samples(live, "penstock:model_requests_total")
        assert requests == {'a"b\\\n': 1, "other": 3}
        assert len(live.router.fleet.bytes_per_token._ratio) <= 3
