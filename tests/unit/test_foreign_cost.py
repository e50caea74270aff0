"""What is fitted and estimated about servers that say nothing."""

from __future__ import annotations

import json
import math
import random

import pytest

from penstock.service.foreign import asked
from penstock.service.foreign.cost import STEP_TOKENS, CostFit
from penstock.service.foreign.engine import BytesPerToken


def test_the_fit_finds_the_coefficients_of_a_server_that_has_them() -> None:
    base_s, token_s, row_s = 0.004, 5e-5, 2e-4
    rng = random.Random(1)
    fit = CostFit()
    for _ in range(600):
        rows, tokens = rng.randrange(0, 60), rng.randrange(20, 20_000)
        steps = math.ceil(tokens / STEP_TOKENS)
        fit.first_token(tokens, rows, steps * (base_s + rows * row_s) + tokens * token_s)
        rows = max(1, rows)
        fit.further_tokens(100, rows, 100 * (base_s + rows * (row_s + token_s)))
    model = fit.model()
    assert model.base_s == pytest.approx(base_s, rel=0.1)
    assert model.per_token_s == pytest.approx(token_s, rel=0.05)
    assert model.per_row_s == pytest.approx(row_s, rel=0.1)
    assert model.residual_s < 0.1 * base_s and model.num_steps == 1200


def test_one_answer_that_was_held_up_changes_little() -> None:
    fit = CostFit()
    for tokens in range(100, 3000, 20):
        fit.first_token(tokens, 0, 0.01 + 1e-4 * tokens)
    before = fit.model()
    fit.first_token(1000, 0, 500.0)
    after = fit.model()
    assert after.per_token_s == pytest.approx(before.per_token_s, rel=0.5)
    assert after.base_s < 0.2


def body(**fields: object) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def read(**fields: object) -> asked.Asked:
    return asked.read("POST", "/v1/chat/completions", b"application/json", body(**fields))


def test_a_longer_conversation_begins_with_the_keys_of_the_shorter_one() -> None:
    turns = [{"role": "user", "content": f"turn {n}: " + "words " * 100} for n in range(8)]
    shorter, longer = read(messages=turns[:5]), read(messages=turns)
    assert len(shorter.keys) > 8
    assert longer.keys[: len(shorter.keys)] == shorter.keys
    other = asked.read("POST", "/v1/completions", b"", body(messages=turns).replace(b'"m"', b'"n"'))
    assert not set(other.keys) & set(longer.keys), "another model has another cache"


@pytest.mark.parametrize(
    "data", [b"", b"not json", b"[1]", b'"x"', b'{"model": 5, "messages": 7}', b"\xff", b"[" * 9999]
)
def test_what_is_no_request_is_left_to_the_engine(data: bytes) -> None:
    found = asked.read("POST", "/v1/chat/completions", b"application/json", data)
    assert found.model is None and not found.stream


def test_forms_images_and_limits() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
    found = asked.read("POST", "/v1/audio/transcriptions", b"multipart/form-data; boundary=x", form)
    assert found.model == "whisper" and not found.repeatable
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}]
    assert read(messages=[{"role": "user", "content": image}]).prompt_bytes < 10_000
    assert read(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert read(max_tokens=True).max_tokens is None
    assert asked.read("GET", "/v1/responses/resp_1/input_items", b"", b"").response_id == "resp_1"


def test_bytes_per_token_follow_what_engines_count() -> None:
    ratio = BytesPerToken()
    assert ratio.of("m") == 4.0
    for _ in range(60):
        ratio.observe("m", 3000, 1000)
    ratio.observe("m", 1_000_000, 2)  # too short to tell
    assert ratio.of("m") == pytest.approx(3.0, rel=0.01) and ratio.of("n") == 4.0
