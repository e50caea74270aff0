"""Schemathesis over our OpenAPI document, against a live server: no 500, no undocumented answer.

Requests are made from the document, valid ones and broken ones. That data of the right shape is
accepted is not asked: much of it is wrong all the same (a token id beyond this model's vocabulary,
`tool_choice` without tools), and test_api_errors has those cases one by one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.checks import CHECKS, load_all_checks

from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.text.texts import Texts
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import LiveFake, live_fake, small_texts

load_all_checks()
WANTED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
    ]
)


def texts() -> Texts:
    with tempfile.TemporaryDirectory() as folder:
        return small_texts(Path(folder) / "m")


TEXTS = texts()
#: What a server serves at /openapi.json; its operations are the test's parameters.
DOCUMENT = create_app(FakeGenerator(TEXTS.tokenizer), TEXTS, ApiConfig(("m",))).openapi()
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveFake]:
    with live_fake(TEXTS) as found:
        yield found


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_surprises(case: Case, server: LiveFake) -> None:
    case.call_and_validate(base_url=server.url, checks=WANTED)


def test_the_document_is_the_one_served(server: LiveFake) -> None:
    assert httpx.get(f"{server.url}/openapi.json").json() == json.loads(json.dumps(DOCUMENT))


def test_nothing_is_left_behind(server: LiveFake) -> None:
    """After all of that, the gauges are at zero and the server still answers."""
    metrics = server.context.metrics
    assert (metrics.waiting, metrics.running, server.generator.num_live) == (0, 0, 0)
    assert metrics.finished["stop"] > 0, "no generated request was ever served"
