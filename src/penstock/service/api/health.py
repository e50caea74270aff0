"""What operators ask: health, metrics, version and models."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock import __version__
from penstock.service.api.context import Context
from penstock.service.api.responses import (
    HealthResponse,
    InstanceHealth,
    ModelCard,
    ModelList,
    VersionResponse,
)
from penstock.service.metrics import CONTENT_TYPE


def json_response(found: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(found), status, media_type="application/json")


class OperatorEndpoints:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def health(self, _: Request) -> Response:
        """200 once an instance has produced a real token (and still lives), 503 with the reason."""
        status = self._context.generator.status()
        found = HealthResponse(
            "ok" if status.ready else "unavailable",
            status.reason,
            status.queue_depth,
            [InstanceHealth(str(i["name"]), str(i["state"])) for i in status.instances],
        )
        return json_response(found, 200 if status.ready else 503)

    async def live(self, _: Request) -> Response:
        """200 while this process works, whatever the engine does."""
        status = self._context.generator.status()
        found = HealthResponse("ok" if status.live else "unavailable", "", status.queue_depth, [])
        return json_response(found, 200 if status.live else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._context.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def version(self, _: Request) -> Response:
        return json_response(VersionResponse(__version__))

    async def models(self, _: Request) -> Response:
        names = self._context.config.served_model_names
        return json_response(ModelList(data=[self._card(name) for name in names]))

    async def model(self, http: Request) -> Response:
        return json_response(self._card(self._context.model(http.path_params["model_id"])))

    def _card(self, name: str) -> ModelCard:
        context = self._context
        card = context.generator.card
        return ModelCard(
            id=name,
            created=context.created_s,
            root=context.config.served_model_names[0],
            max_model_len=None if card is None else card.max_model_len,
        )
