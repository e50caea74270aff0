"""A host's clock is put back: who is started again then has a smaller incarnation than before.

Nothing waits by the wall clock; it only tells a process from its predecessor of the same name. The
registry's part is in test_membership.py.
"""

from __future__ import annotations

from tests.unit.test_instance_core import Bench as Engine
from tests.unit.test_service_core import Bench as Service
from tests.unit.test_service_core import ends_of, ids_of

from penstock.protocol.kv import Refused
from penstock.protocol.request import Submit
from penstock.protocol.tokens import TokenRow, Tokens


def test_a_worker_started_again_on_an_earlier_clock_is_taken_once_the_old_one_is_silent() -> None:
    bench = Service()
    bench._take(bench.core.add_instance("a", bench.now))
    bench.attached("a", incarnation=9)
    bench.submit()
    bench.say("a", Tokens("a", 9, 1, [TokenRow("r/0", 1, 0, [5])]))
    bench.attached("a", incarnation=5)
    assert bench.core.instances["a"].incarnation == 9, "it might be a late word of the one before"
    bench.core.expect("a", True)  # so that the request waits
    bench.wait(4.0)
    assert bench.core.instances["a"].state == "lost"
    bench.taken(Submit)
    bench.attached("a", incarnation=5)
    assert (bench.core.instances["a"].state, bench.core.instances["a"].incarnation) == ("active", 5)
    ((_, again),) = bench.taken(Submit)
    assert (again.attempt, again.resumed_ids) == (2, [5])
    # Its words count from now on, and those of number 9 no more.
    bench.say("a", Tokens("a", 9, 1, [TokenRow("r/0", 2, 1, [66])]))
    bench.say("a", Tokens("a", 5, 1, [TokenRow("r/0", 2, 1, [6], "stop")]))
    assert ids_of(bench) == [5, 6] and ends_of(bench) == ["stop"]


def test_a_router_started_again_on_an_earlier_clock_is_let_in_within_the_bound() -> None:
    engine = Engine(service_silent_s=5.0)
    engine.attach(incarnation=9)
    engine.submit(service_incarnation=9)
    knocks = 0  # number 9 is dead and says nothing; its successor keeps knocking
    while refused := [m for m in engine.attach(incarnation=4) if isinstance(m, Refused)]:
        assert refused[0].code == "stale_incarnation"
        engine.wait(1.0)
        knocks += 1
        assert knocks < 8, "it is locked out"
    assert engine.core.scheduler.live("s") == []
    assert not [m for m in engine.submit(service_incarnation=4) if isinstance(m, Refused)]
