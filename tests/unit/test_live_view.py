"""The view that is kept up to date says what one made anew says, whoever comes and goes."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_service_core import card, load

from penstock.protocol.instance import CostModel
from penstock.service.cluster.instances import Changes, Instance
from penstock.service.cluster.view import LiveView
from penstock.service.policies.view import ROLES, ClusterView

NAMES = tuple("abcdef")  # few, so that names come back


def newcomer(name: str, changes: Changes, turn: int) -> Instance:
    instance = Instance(name, changes)
    instance.attached(card(name, turn), 0.0)
    return instance


def happens(draw: st.DrawFn, instance: Instance, turn: int) -> None:
    match draw(st.sampled_from(["load", "role", "queue", "silence"])):
        case "load":
            cost = CostModel(base_s=0.01 * turn, per_token_s=1e-4, per_row_s=1e-4, num_steps=turn)
            instance.loaded(load(instance.name, turn, cost), float(turn))
        case "role":
            instance.is_now(draw(st.sampled_from(ROLES)), turn)
        case "queue":
            instance.queued_tokens += 7
            instance.touched = True


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kept_view_equals_one_made_anew(data: st.DataObject) -> None:
    kept, changes = LiveView(), Changes()
    known = {name: newcomer(name, changes, 1) for name in NAMES[:3]}
    gone: list[Instance] = []
    takers = tuple(known.values())
    for turn in range(2, data.draw(st.integers(5, 25))):
        what = data.draw(
            st.sampled_from(["happens", "happens", "comes", "goes", "others", "one", "late"])
        )
        if what == "happens":
            for name in data.draw(st.lists(st.sampled_from(sorted(known)), max_size=4)):
                happens(data.draw, known[name], turn)
        elif what == "comes" and len(known) < len(NAMES):
            name = data.draw(st.sampled_from([n for n in NAMES if n not in known]))
            known[name] = newcomer(name, changes, turn)
            takers = tuple(known.values())
        elif what == "goes" and len(known) > 2:
            name = data.draw(st.sampled_from(sorted(known)))
            before = known.pop(name)
            before.left()
            kept.forget(name)
            gone.append(before)
            takers = tuple(known.values())
        elif what == "others":
            chosen = data.draw(st.sets(st.sampled_from(sorted(known)), min_size=2))
            takers = tuple(i for i in known.values() if i.name in chosen)
        elif what == "one":
            kept.of([takers[0]], float(turn))
        elif what == "late" and gone:
            happens(data.draw, gone[-1], turn)
        same(kept.of(takers, turn + 0.5), LiveView().of(list(takers), turn + 0.5))


def test_an_instance_that_is_back_under_its_name_is_another_one() -> None:
    kept, changes = LiveView(), Changes()
    one, other = (newcomer(name, changes, 1) for name in "ab")
    kept.of((one, other), 1.0)
    one.loaded(load("a", 1, CostModel(base_s=9.0, num_steps=500)), 1.0)
    one.left()
    kept.forget("a")
    back = newcomer("a", changes, 2)
    one.is_now("prefill", 3)
    same(kept.of((back, other), 2.0), LiveView().of([back, other], 2.0))


def test_one_instance_alone_does_not_pile_up_changes() -> None:
    kept, changes = LiveView(), Changes()
    alone = newcomer("a", changes, 1)
    for turn in range(50):
        alone.touched = True
        kept.of((alone,), float(turn))
    assert len(changes.touched) <= 1


def same(one: ClusterView, other: ClusterView) -> None:
    assert one.names == other.names
    assert (one.hosts[:, None] == one.hosts[None]).tolist() == (
        other.hosts[:, None] == other.hosts[None]
    ).tolist()
    for field in fields(ClusterView):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray) and field.name != "hosts":
            assert mine.tolist() == theirs.tolist(), field.name
    for field in fields(one.transfer):
        assert (getattr(one.transfer, field.name) == getattr(other.transfer, field.name)).all()
