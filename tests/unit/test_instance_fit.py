"""Instances that compute something else than what is in use, or was asked for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.unit.test_cluster_flags import read
from tests.unit.test_service_core import Bench, card, ends_of, ids_of

from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import Attached, InstanceCard
from penstock.protocol.request import Submit
from penstock.protocol.tokens import TokenRow
from penstock.service.cluster.fit import Wanted
from penstock.service.core import ServiceCoreConfig


def other(name: str, incarnation: int = 1) -> InstanceCard:
    return msgspec.structs.replace(
        card(name, incarnation), model_digest="of bfloat16", dtype="bfloat16"
    )


def come(bench: Bench, found: InstanceCard) -> str:
    if found.name not in bench.core.instances:
        bench._take(bench.core.add_instance(found.name, bench.now))
    bench.say(found.name, Attached(found, PROTOCOL_VERSION))
    return bench.core.instances[found.name].state


def test_tokens_are_never_continued_by_another_kind_and_end_with_an_error() -> None:
    bench = Bench("a")
    bench.submit()
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    assert come(bench, other("b")) == "refused"
    bench._take(bench.core.on_instance_lost("a", bench.now))
    bench.taken(Submit)
    assert come(bench, other("b")) == "refused", "one of the first kind may still come"
    bench.submit("new")
    bench.wait(2.5)
    assert ends_of(bench) == ["engine_unavailable"] and ids_of(bench) == [5]
    # Nobody's tokens are left: now the other kind serves.
    assert come(bench, other("b")) == "active"
    assert come(bench, card("a", 2)) == "refused"


def test_tokens_go_on_where_the_right_kind_comes_in_time() -> None:
    bench = Bench("a")
    bench.submit()
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    bench._take(bench.core.on_instance_lost("a", bench.now))
    bench.taken(Submit)
    assert come(bench, other("b")) == "refused"
    assert come(bench, card("c", 1)) == "active"
    ((where, again),) = bench.taken(Submit)
    assert (where, again.resumed_ids) == ("c", [5])


def test_a_name_that_comes_back_as_another_kind_does_not_go_on_with_what_it_had() -> None:
    bench = Bench("a")
    bench.submit()
    bench.row("a", TokenRow("r/0", 1, 0, [5]))
    bench.core.expect("a", True)
    assert come(bench, other("a", 2)) == "refused"
    bench.wait(2.5)
    assert ends_of(bench) == ["engine_unavailable"], "nothing else is on its way"
    assert come(bench, other("a", 2)) == "active"


def test_who_is_silent_for_a_moment_still_decides() -> None:
    bench = Bench("a")
    bench.wait(1.5)
    assert bench.core.instances["a"].state == "suspect"
    assert come(bench, other("b")) == "refused"


def test_another_layout_of_kv_is_another_kind() -> None:
    bench = Bench("a")
    layout = msgspec.structs.replace(card("b", 1).layout, dtype="int8")
    assert come(bench, msgspec.structs.replace(card("b", 1), layout=layout)) == "refused"
    assert "--kv-cache-dtype" in bench.core.instances["b"].refusal


@pytest.mark.parametrize(
    ("wanted", "found", "flag"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"kv_cache_dtype": "int8"}, {}, "--kv-cache-dtype float32"),
        ({"quantization": "int4"}, {"quantization": "none"}, "--quantization none"),
        ({"max_model_len": 100}, {}, "--max-model-len 256"),
    ],
)
def test_what_is_asked_for_by_flag_is_held_against_the_first_as_well(
    wanted: dict[str, Any], found: dict[str, Any], flag: str
) -> None:
    bench = Bench(wanted=Wanted(**wanted))
    assert come(bench, msgspec.structs.replace(card("a", 1), **found)) == "refused"
    assert flag in bench.core.instances["a"].refusal
    bench = Bench(wanted=Wanted(**{k: v for k, v in wanted.items() if k == "none"}))
    assert come(bench, msgspec.structs.replace(card("a", 1), **found)) == "active"


def test_other_names_of_a_format_and_silence_are_no_reason() -> None:
    gptq = msgspec.structs.replace(card("a", 1), quantization="gptq")
    assert not Wanted(quantization="gptq_marlin").refuses(gptq)
    assert not Wanted(quantization="gptq").refuses(card("a", 1))


def test_flags_of_a_router_say_what_instances_must_be() -> None:
    config = read("--dtype", "half", "--kv-cache-dtype", "auto", "-q", "int8", command="router")
    assert config.wanted == Wanted(dtype="float16", quantization="int8")
    there = ("--engine-address", "tcp://127.0.0.1:1")
    assert read("--max-model-len", "4k", *there).wanted == Wanted(max_model_len=4000)
    assert read("--dtype", "float32").wanted == Wanted() == ServiceCoreConfig().wanted


@pytest.mark.parametrize(
    "words", [["--num-threads", "2"], ["--max-num-seqs", "8"], ["--enforce-eager"]]
)
def test_flags_that_mean_nothing_to_a_router_are_refused_by_name(words: list[str]) -> None:
    flag = "--graph-mode" if words == ["--enforce-eager"] else words[0]
    with pytest.raises(ConfigError, match=flag):
        read(*words, command="router")
    with pytest.raises(ConfigError, match="no engine is started here"):
        read(*words, "--engine-address", "tcp://127.0.0.1:1")
    assert read(*words).wanted == Wanted()
