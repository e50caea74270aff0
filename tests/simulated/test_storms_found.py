"""What storms have found: each of these has failed, and must not again."""

from __future__ import annotations

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.protocol.effects import SetTimer
from penstock.protocol.request import SamplingParams
from penstock.registry.leases import Leases
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec
from penstock.service.policies.view import Candidate, ClusterView, Decision, RouteRequest
from penstock.simulator.storms.play import play
from penstock.simulator.storms.storm import Ask, Crash, Cut, RegistryLoss, Shape, Storm
from penstock.simulator.world import World


def test_blocks_that_several_wants_share_are_given_up_for_who_cannot_come_in() -> None:
    """Nothing ran, the first in the queue did not fit, and no soft hold alone freed a block: for
    ever."""
    storm = Storm(
        seed=1421,
        shape=Shape(num_blocks=20),
        asks=(
            Ask(number=1, at_s=1.5, shared_tokens=48, own_tokens=15, max_tokens=2),
            Ask(number=2, at_s=0.6, shared_tokens=48, own_tokens=15, max_tokens=2),
            Ask(number=3, at_s=0.6, family=1, shared_tokens=48, own_tokens=200, max_tokens=30),
            Ask(number=11, at_s=1.1, max_tokens=1),
            Ask(number=12, at_s=1.0, shared_tokens=96, own_tokens=1, max_tokens=2),
        ),
    )
    assert play(storm).failure == ""


def test_an_instance_out_of_credit_whose_last_words_were_lost_goes_on() -> None:
    """It waited for credit, and the service for a token that would have shown what was lost."""
    storm = Storm(
        seed=202,
        shape=Shape(num_instances=1, policy="least-load", credit_window=48),
        asks=(Ask(number=0, at_s=0.6, max_tokens=100),),
        faults=(Cut(at_s=0.65, these=("s",), those=("a",), for_s=0.5),),
    )
    assert play(storm).failure == ""


def test_blocks_that_are_being_stored_are_not_freed_by_a_preemption() -> None:
    """Somebody was let in for whom there was no room then."""
    pool = BlockPool(4)
    held = [pool.allocate() for _ in range(3)]
    for block, key, parent in zip(held, (b"k0", b"k1", b"k2"), (b"", b"k0", b"k1")):
        pool.register(block, key, parent, public=True)
    assert list(pool.freed_by([held], besides=[])) == [3]
    pool.begin_store(held[1:])
    assert list(pool.freed_by([held], besides=[])) == [1]
    pool.release(held)
    assert pool.num_available == 1 + 1
    pool.end_store(held[1:])
    assert pool.num_available == 4


def first_of_all(view: ClusterView, request: RouteRequest) -> Decision:
    name = view.names[0]
    candidates = (Candidate(instance=name, predicted_ttft_s=0.0),)
    return Decision(policy="first", instance=name, candidates=candidates, reason="first")


def test_who_finds_no_room_in_a_queue_goes_elsewhere() -> None:
    """It was refused, though another instance had nothing to do: also in the middle of its answer,
    when many had to move at once."""
    world = World(1)
    for name in ("a", "b"):
        world.add_instance(
            name, scheduler=SchedulerConfig(max_num_seqs=1, max_waiting=1, max_model_len=1024)
        )
    world.add_service("s", ["a", "b"], policy=first_of_all)
    for number in range(4):
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        world.submit("s", GenerationSpec(f"r{number}", [number + 1] * 20, sampling), at_s=0.6)
    world.run(10.0)
    assert [answer.finish[0] for answer in world.outcomes.values()] == [["length"]] * 4


def test_instances_that_keep_coming_do_not_put_off_the_services_clock() -> None:
    """Each newcomer began the tick anew: deadlines and silences were seen late, or never."""
    core = ServiceCore(ServiceCoreConfig())
    due_s = []
    for number in range(10):
        effects = core.add_instance(f"i{number}", 0.2 * number)
        due_s += [effect.at_s for effect in effects if isinstance(effect, SetTimer)]
    assert due_s == [0.25] * 10
    (again,) = [e for e in core.on_timer(1.8) if isinstance(e, SetTimer)]
    assert again.at_s == 2.05
    newest = core.add_instance("last", 1.9)
    assert [e.at_s for e in newest if isinstance(e, SetTimer)] == [2.05]


def test_a_service_that_knows_no_instance_yet_keeps_to_what_its_requests_wait() -> None:
    """Its clock began to tick with the first instance. Who asked a service that had started while
    the registry was away waited for that, whatever budget of time he had."""
    storm = Storm(
        seed=10287,
        shape=Shape(num_instances=1, registry=True),
        asks=(Ask(number=1, at_s=1.6, family=1, max_tokens=1, budget_s=1.0),),
        faults=(
            Crash(at_s=1.0, node="s", again_after_s=0.0),
            RegistryLoss(at_s=1.0, for_s=3.0),
        ),
    )
    assert play(storm).failure == ""


def test_a_registration_that_was_overtaken_does_not_take_its_key_along() -> None:
    """A put that comes late, behind one with a newer lease, would end the key with the older lease,
    while its owner keeps the newer one alive and is never found again."""
    leases = Leases()
    older, newer = leases.grant(3.0, 0.0), leases.grant(3.0, 1.0)
    assert leases.put("instances/b", b"here", newer, 1.0)
    assert not leases.put("instances/b", b"here", older, 2.0)
    assert leases.keep_alive(newer, 2.5)
    assert leases.get("instances/b", 4.0) == b"here"
