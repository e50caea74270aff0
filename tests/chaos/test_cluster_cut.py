"""Two instances on hosts of their own, both within reach of the router, and the cable between the
two is cut: blocks do not come any more, answers do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.cluster import Answer, body, cluster_report, instances, load
from tests.helpers.hosts import NoHosts, Pair, pair_of_hosts
from tests.helpers.processes import Processes
from tests.helpers.server import free_port

FLAGS = (
    "--dtype", "float32", "--kv-cache-memory-bytes", "32M", "--num-threads", "1",
)  # fmt: skip
SECRET = "0123456789abcdef0123456789abcdef"


def answers(url: str, salt: str) -> list[Answer]:
    """With a salt of its own each round finds nothing of the others in a cache."""
    bodies = [body(i, cache_salt=salt, max_tokens=40) for i in range(8)]
    return asyncio.run(load(url, bodies))


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(pair_of_hosts())
        except NoHosts as exc:
            pytest.skip(str(exc))
        yield found


def test_two_instances_that_cannot_reach_each_other(
    pair: Pair, started: Processes, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=2)
    (tmp_path / "secret").write_text(SECRET)
    secret = ("--cluster-secret-file", str(tmp_path / "secret"))
    model, port = str(tmp_path / "model"), free_port()
    router = started.server(
        "router", model, "--served-model-name", "m", *secret, "--pd", "static=1:1",
        "--registry-address", f"tcp://0.0.0.0:{port}",
    )  # fmt: skip
    for name, host in (("a", pair.a), ("b", pair.b)):
        started.start(
            "worker", model, *FLAGS, *secret, "--name", name,
            "--registry", f"penstock://{host.here}:{port}", namespace=host.namespace,
        )  # fmt: skip
    started.until(lambda: router.active() == {"a", "b"})
    split = ["decode", "prefill"]
    started.until(lambda: sorted(i["role"] for i in instances(router.url).values()) == split)
    undisturbed = answers(router.url, "before")
    assert all(a.ends == ["length"] for a in undisturbed)
    pair.cut()
    assert [a.outcome for a in answers(router.url, "cut")] == [a.outcome for a in undisturbed]
    assert router.active() == {"a", "b"}, "the router reaches both"
    pair.mend()
    assert [a.outcome for a in answers(router.url, "mended")] == [a.outcome for a in undisturbed]
    assert cluster_report(router.url)["totals"]["handovers"] >= 2 * len(undisturbed)
