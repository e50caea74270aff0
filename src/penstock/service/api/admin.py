"""/admin: what an operator sees of the cluster, and what he may tell it. Who may ask: auth.py."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.protocol.errors import InvalidRequest
from penstock.protocol.instance import Role
from penstock.service.api.body import decode, read_body
from penstock.service.api.context import Context, bare_id
from penstock.service.api.health import json_response
from penstock.service.explain import Explanation, SequenceExplanation
from penstock.service.explain_text import in_words
from penstock.service.operations import LiveSequence, NotHere
from penstock.service.report import ClusterReport, cluster_report

#: Of /admin/requests; a page more would tell nobody anything.
MAX_LIVE = 1000
_MAX_BODY_BYTES = 64 * 1024
#: Prompts of one completion request that an explanation is looked for.
_MAX_PROMPTS = 2048


class ExplainedPrompt(msgspec.Struct, kw_only=True):
    #: Place among the prompts of a completion request with several.
    prompt: int
    live: bool
    choices: list[SequenceExplanation]
    #: The same for people, a line each.
    in_words: list[str]


class ExplainResponse(msgspec.Struct, kw_only=True):
    """`GET /admin/requests/{id}/explain`. Times in seconds, from the request's acceptance."""

    id: str
    live: bool
    prompts: list[ExplainedPrompt]


class LiveResponse(msgspec.Struct, kw_only=True):
    """`GET /admin/requests`: the oldest ones."""

    total: int
    requests: list[LiveSequence]


class RoleRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: Role


class ScaleRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    instances: int


class Done(msgspec.Struct, kw_only=True):
    instance: str
    asked: Literal["drain", "start", "role"]
    role: Role | None = None


class AdminEndpoints:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def cluster(self, _: Request) -> Response:
        context = self._context
        found: ClusterReport = cluster_report(context.generator.status(), context.metrics)
        return json_response(found)

    async def requests(self, _: Request) -> Response:
        found, total = self._context.operations.live(MAX_LIVE)
        return json_response(LiveResponse(total=total, requests=found))

    async def explain(self, http: Request) -> Response:
        asked: str = http.path_params["request_id"]
        prompts = [_explained(i, found) for i, found in enumerate(self._find(bare_id(asked)))]
        if not prompts:
            kept = self._context.operations.records_kept
            raise NotHere(
                f"nothing is known of the request {asked[:200]!r}: live requests can be explained, "
                f"and the last {kept} that ended on this service (they are not kept over a restart)"
            )
        live = any(p.live for p in prompts)
        return json_response(ExplainResponse(id=asked, live=live, prompts=prompts))

    def _find(self, request_id: str) -> list[Explanation]:
        """Of each prompt of the request, up to the first that nothing is known of."""
        explain = self._context.operations.explain
        found: list[Explanation] = []
        while len(found) < _MAX_PROMPTS:
            one = explain(f"{request_id}.{len(found)}" if found else request_id)
            if one is None:
                break
            found.append(one)
        return found

    async def drain(self, http: Request) -> Response:
        name: str = http.path_params["name"]
        await _no_body(http)
        self._context.operations.drain(name)
        return json_response(Done(instance=name, asked="drain"), 202)

    async def start(self, http: Request) -> Response:
        name: str = http.path_params["name"]
        await _no_body(http)
        self._context.operations.start(name)
        return json_response(Done(instance=name, asked="start"), 202)

    async def scale(self, http: Request) -> Response:
        body = await read_body(http.scope, http.receive, _MAX_BODY_BYTES)
        wanted = decode(body, msgspec.json.Decoder(ScaleRequest))
        return json_response(self._context.operations.scale(wanted.instances), 202)

    async def role(self, http: Request) -> Response:
        name: str = http.path_params["name"]
        body = await read_body(http.scope, http.receive, _MAX_BODY_BYTES)
        wanted = decode(body, msgspec.json.Decoder(RoleRequest))
        self._context.operations.assign(name, wanted.role)
        return json_response(Done(instance=name, asked="role", role=wanted.role), 202)


async def _no_body(http: Request) -> None:
    if await read_body(http.scope, http.receive, _MAX_BODY_BYTES) not in (b"", b"{}"):
        raise InvalidRequest("this order takes no body")


def _explained(number: int, found: Explanation) -> ExplainedPrompt:
    return ExplainedPrompt(
        prompt=number,
        live=found.live,
        choices=list(found.choices),
        in_words=in_words(found),
    )
