"""What every endpoint needs, made once by `create_app`."""

from __future__ import annotations

import time
import uuid
from typing import TypedDict

from penstock import __version__
from penstock.protocol.errors import EngineUnavailable, ModelNotFound, UnsupportedFeature
from penstock.protocol.instance import InstanceCard
from penstock.service.api.config import ApiConfig
from penstock.service.api.constrain import Constraints
from penstock.service.api.sampling import Seeds, usable_defaults
from penstock.service.generation import Generator
from penstock.service.metrics import Metrics
from penstock.service.text.chat_template import ChatTemplate, Template
from penstock.service.text.texts import Texts
from penstock.service.tracing import open_tracing


class Context:
    def __init__(self, generator: Generator, texts: Texts, config: ApiConfig) -> None:
        self.generator = generator
        self.operations = generator.operations
        self.tracing = open_tracing(config.otlp_traces_endpoint)
        self.texts = texts
        self.config = config
        self.metrics = Metrics(config.served_model_names[0], generator.status)
        self.seeds = Seeds(config.seed)
        self.sampling_defaults = usable_defaults(config.generation_config)
        self.constraints = Constraints(texts.tokenizer)
        self.created_s = int(time.time())

    def card(self) -> InstanceCard:
        """Raises `EngineUnavailable` before the first instance has attached."""
        card = self.generator.card
        if card is None:
            reason = self.generator.status().reason or "no engine instance is attached yet"
            raise EngineUnavailable(f"not ready: {reason}", retry_after_s=1.0)
        return card

    def model(self, name: str | None) -> str:
        """The name to answer with. Raises `ModelNotFound`; no name means the one model."""
        names = self.config.served_model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ModelNotFound(
                f"the model '{name[:200]}' does not exist here; served: {', '.join(names)}",
                param="model",
            )
        return name

    def template(self, requested: str | None) -> Template:
        """The checkpoint's chat template, or the request's own where the server trusts it."""
        if requested is None:
            return self.texts.template
        if not self.config.trust_request_chat_template:
            raise UnsupportedFeature(
                "'chat_template' in a request is a program to run: the server must be started "
                "with --trust-request-chat-template to allow it",
                param="chat_template",
            )
        return ChatTemplate({"default": requested}, self.texts.tokenizer.special_tokens)

    def envelope(self, prefix: str, model: str, card: InstanceCard) -> Envelope:
        fingerprint = f"fp_{__version__}_{card.model_digest[:10]}"
        return Envelope(
            id=f"{prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model,
            system_fingerprint=fingerprint,
        )


class Envelope(TypedDict):
    """What all chunks of one answer repeat."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def sequence_id(envelope: Envelope, prompt: int = 0) -> str:
    """What the service's core calls prompt number `prompt` of that answer: what the client sees,
    without the endpoint's prefix, so that either finds the other."""
    bare = bare_id(envelope["id"])
    return f"{bare}.{prompt}" if prompt else bare


def bare_id(client_id: str) -> str:
    return client_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
