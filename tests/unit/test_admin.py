"""/admin: who may ask, and what is said of instances, requests and their way."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.asgi_call import AsgiCall
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import small_texts

from penstock.protocol.errors import ConfigError
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.explain import Explanation, PlacementRecord, Record
from penstock.service.operations import LiveSequence, NotHere
from penstock.service.policies.routing import Candidate, Decision

SECRET = "admin-key"


class Recorded:
    """Operations with one explained request; remembers what was ordered."""

    records_kept = 7

    def __init__(self) -> None:
        self.found: dict[str, Explanation] = {}
        self.ordered: list[tuple[str, ...]] = []

    def explain(self, request_id: str) -> Explanation | None:
        return self.found.get(request_id)

    def live(self, limit: int) -> tuple[list[LiveSequence], int]:
        one = LiveSequence(
            id="r", choice=0, instance="a", phase="decoding", age_s=1.0, prompt_tokens=3,
            output_tokens=2, attempt=1, request_class="online",
        )  # fmt: skip
        return [one] * min(limit, 5), 5

    def drain(self, name: str) -> None:
        self._order("drain", name)

    def start(self, name: str) -> None:
        self._order("start", name)

    def assign(self, name: str, role: str) -> None:
        self._order("role", name, role)

    def _order(self, *words: str) -> None:
        if words[1] != "fake-0":
            raise NotHere(f"there is no instance {words[1]!r}")
        self.ordered.append(words)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_texts(tmp_path_factory.mktemp("model") / "m")


class Site:
    def __init__(self, texts: Any, **config: Any) -> None:
        self.generator = FakeGenerator(texts.tokenizer)
        self.operations = self.generator.operations = Recorded()
        self.app = create_app(self.generator, texts, ApiConfig(("m",), **config))

    async def call(self, method: str, path: str, body: object = b"", **given: Any) -> AsgiCall:
        return await AsgiCall(self.app, method, path, body, **given).finished()


def explanation(request_id: str) -> Explanation:
    record = Record(request_id=request_id, choice=0, accepted_s=10.0, prompt_tokens=32)
    decision = Decision(
        policy="least-load",
        instance="a",
        candidates=(
            Candidate(instance="a", predicted_ttft_s=0.05),
            Candidate(instance="b", predicted_ttft_s=0.08),
        ),
        reason="a answers first",
    )
    record.placed(
        PlacementRecord(
            attempt=1, instance="a", at_s=0.0, because="new", decision=decision, num_tokens=32,
            predicted_ttft_s=0.05, predicted_cached_tokens=16,
        ),
        10.0,
    )  # fmt: skip
    record.started(16, 0.02, 10.06)
    record.left("stop", 11, 10.16, 10.16)
    record.ended("stop", 11, 10.16)
    return Explanation(request_id, False, (record.explain(11, 10.16),))


# --- who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", ""])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", None])
async def test_open_on_loopback(texts: Any, client: str, host: str | None) -> None:
    headers = {} if host is None else {"host": host}
    call = await Site(texts).call("GET", "/admin/cluster", client=client, headers=headers)
    assert call.status == 200


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("10.0.0.9", {}),
        ("somewhere", {}),
        ("127.0.0.1", {"origin": "https://evil.example"}),
        ("127.0.0.1", {"host": "evil.example:8000"}),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}),
        ("127.0.0.1", {"forwarded": "for=10.0.0.9"}),
        ("127.0.0.1", {"host": "[::2]:80"}),
        ("127.0.0.1", {"host": "[broken"}),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}),
    ],
)
@pytest.mark.parametrize("path", ["/admin/cluster", "/admin", "/admin/nothing"])
async def test_closed_to_others(
    texts: Any, client: str, headers: dict[str, str], path: str
) -> None:
    site = Site(texts, api_keys=("k",))
    headers = headers | {"authorization": "Bearer k"}  # the API's key does not open it
    call = await site.call("GET", path, client=client, headers=headers)
    assert call.status == 401
    assert "admin key" in call.json()["error"]["message"]


@pytest.mark.parametrize(
    "sent", [None, "Bearer k", "Bearer ", "Bearer admin-key2", "Basic admin-key", "admin-key"]
)
async def test_a_wrong_key_is_refused_even_on_loopback(texts: Any, sent: str | None) -> None:
    site = Site(texts, api_keys=("k",), admin_keys=(SECRET,))
    headers = {} if sent is None else {"authorization": sent}
    for method, path in (("GET", "/admin/cluster"), ("POST", "/admin/instances/fake-0/drain")):
        call = await site.call(method, path, headers=headers)
        assert call.status == 401
        assert SECRET not in call.body.decode()
    assert site.operations.ordered == []


async def test_the_admin_key_opens_admin_and_nothing_else(texts: Any) -> None:
    site = Site(texts, api_keys=("k",), admin_keys=(SECRET,))
    headers = {"authorization": f"Bearer {SECRET}", "origin": "https://dashboard.example"}
    assert (
        await site.call("GET", "/admin/cluster", client="9.9.9.9", headers=headers)
    ).status == 200
    assert (await site.call("GET", "/v1/models", headers=headers)).status == 401


def test_an_empty_admin_key_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="empty"):
        ApiConfig(("m",), admin_keys=("",))


# --- what is said --------------------------------------------------------------------------------


async def test_cluster(texts: Any) -> None:
    site = Site(texts)
    await site.call("POST", "/v1/completions", {"prompt": "a", "n": 2})
    found = (await site.call("GET", "/admin/cluster")).json()
    (instance,) = found["instances"]
    wanted = {"name": "fake-0", "state": "active", "pid": 1, "queue": 1, "running": 2}
    assert {k: instance[k] for k in wanted} == wanted
    assert (instance["role"], instance["epoch"]) == ("any", 0)
    kv = instance["kv"]
    assert (kv["used"], kv["cached"], kv["total"]) == (25, 5, 100)
    assert kv["tiers"]["device"] == {
        "used": 30, "total": 100, "used_bytes": 30 * 1024, "total_bytes": 100 * 1024,
    }  # fmt: skip
    assert found["totals"]["finished"] == {"stop": 2}
    assert found["ttft_s"]["count"] == 2
    assert found["totals"]["tokens_per_s"] > 0


async def test_cluster_before_any_engine_has_attached(texts: Any) -> None:
    site = Site(texts)
    site.generator.behaviour.ready = False
    found = (await site.call("GET", "/admin/cluster")).json()
    assert not found["ready"] and "no engine" in found["reason"]


async def test_live_requests(texts: Any) -> None:
    found = (await Site(texts).call("GET", "/admin/requests")).json()
    assert found["total"] == len(found["requests"]) == 5


@pytest.mark.parametrize("prefix", ["chatcmpl-", "cmpl-", ""])
async def test_explain(texts: Any, prefix: str) -> None:
    site = Site(texts)
    site.operations.found = {"abc": explanation("abc"), "abc.1": explanation("abc.1")}
    found = (await site.call("GET", f"/admin/requests/{prefix}abc/explain")).json()
    assert (found["id"], found["live"]) == (f"{prefix}abc", False)
    assert [p["prompt"] for p in found["prompts"]] == [0, 1]
    (choice,) = found["prompts"][0]["choices"]
    assert choice["ttft_s"] == pytest.approx(0.06)
    assert choice["predicted_ttft_s"] == 0.05
    assert choice["tpot_s"] == pytest.approx(0.01)
    (placement,) = choice["placements"]
    assert [c["instance"] for c in placement["decision"]["candidates"]] == ["a", "b"]
    assert sum(choice["phases"].values()) == pytest.approx(0.16)
    words = "\n".join(found["prompts"][0]["in_words"])
    assert "least-load: a answers first" in words
    assert "not b: 80.0 ms predicted" in words
    assert "first token after 60.0 ms (50.0 ms predicted)" in words
    assert "time: queue 20.0 ms, prefill 40.0 ms, decode 100.0 ms" in words


async def test_what_the_client_sees_is_what_explain_takes(texts: Any) -> None:
    site = Site(texts)
    body = {"prompt": ["a", "b"]}
    answer = (await site.call("POST", "/v1/completions", body)).json()
    chat = (
        await site.call(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}
        )
    ).json()
    given = [spec.request_id for spec in site.generator.specs]
    assert [f"cmpl-{given[0]}", f"cmpl-{given[1]}"] == [answer["id"], answer["id"] + ".1"]
    assert chat["id"] == f"chatcmpl-{given[2]}"


@pytest.mark.parametrize("asked", ["chatcmpl-nothing", "x" * 8000, "%00", "a b", "ünknown"])
async def test_explain_of_an_unknown_id(texts: Any, asked: str) -> None:
    call = await Site(texts).call("GET", f"/admin/requests/{asked}/explain")
    assert call.status == 404
    error = call.json()["error"]
    assert error["type"] == "not_found_error" and "the last 7" in error["message"]
    assert len(error["message"]) < 500


async def test_orders(texts: Any) -> None:
    site = Site(texts)
    for order in ("drain", "start"):
        call = await site.call("POST", f"/admin/instances/fake-0/{order}")
        assert call.status == 202 and call.json()["asked"] == order
    call = await site.call("POST", "/admin/instances/fake-0/role", {"role": "decode"})
    assert call.status == 202 and call.json()["role"] == "decode"
    assert site.operations.ordered == [
        ("drain", "fake-0"),
        ("start", "fake-0"),
        ("role", "fake-0", "decode"),
    ]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/admin/instances/other/drain", b"", 404),
        ("/admin/instances/other/role", {"role": "any"}, 404),
        ("/admin/instances/fake-0/role", {"role": "king"}, 400),
        ("/admin/instances/fake-0/role", {}, 400),
        ("/admin/instances/fake-0/role", {"role": "any", "force": True}, 400),
        ("/admin/instances/fake-0/role", b"not json", 400),
        ("/admin/instances/fake-0/role", b"x" * 100_000, 413),
        ("/admin/instances/fake-0/drain", {"now": True}, 400),
        ("/admin/instances/other/start", b"", 404),
        ("/admin/instances/fake-0/start", {"now": True}, 400),
    ],
)
async def test_orders_that_make_no_sense(texts: Any, path: str, body: Any, status: int) -> None:
    site = Site(texts)
    call = await site.call("POST", path, body)
    assert call.status == status and call.json()["error"]["message"]
    assert site.operations.ordered == []


async def test_what_a_service_cannot_do_is_said(texts: Any) -> None:
    from penstock.service.operations import NO_OPERATIONS

    site = Site(texts)
    site.app.state.context.operations = NO_OPERATIONS
    call = await site.call("POST", "/admin/instances/fake-0/drain")
    assert call.status == 400 and "cannot drain" in call.json()["error"]["message"]
    call = await site.call("POST", "/admin/instances/fake-0/start")
    assert call.status == 400 and "cannot start" in call.json()["error"]["message"]


async def test_an_operators_mistakes_are_no_refused_requests(texts: Any) -> None:
    site = Site(texts)
    statuses = [
        (await site.call("POST", "/admin/instances/a/role", {"role": "king"})).status,
        (await site.call("GET", "/admin/requests/nobody/explain")).status,
        (await site.call("GET", "/admin/nothing")).status,
    ]
    assert statuses == [400, 404, 404]
    assert not site.app.state.context.metrics.refused
    assert (await site.call("POST", "/v1/completions", {"prompt": ""})).status == 400
    assert sum(site.app.state.context.metrics.refused.values()) == 1
