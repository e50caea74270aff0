"""The counters of placement, recounted from the journal."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from penstock.service.cluster.instances import Instance
from penstock.service.journal import Entry, Journal


def check(
    journal: Journal,
    instances: Mapping[str, Instance],
    homeless: Collection[Entry],
    num_queued: int,
) -> None:
    """Asserts that whatever is kept beside the journal equals what it says."""
    entries = list(journal)
    assert num_queued == sum(1 for e in entries if not e.emitted)
    for entry in entries:
        placed = entry.instance is not None
        assert placed != (entry.homeless_since_s is not None), entry.key
        assert (entry in homeless) != placed
        assert placed or entry.decode_on is None
        assert placed == (entry.record.present is not None)
    for instance in instances.values():
        mine = [e for e in entries if e.instance == instance.name]
        assert len(mine) == len(instance.entries)
        assert not mine or instance.state in ("active", "suspect")
        assert list(instance.waiting.values()) == [
            e for e in instance.entries.values() if e.queued_tokens
        ]
        assert instance.queued_tokens == sum(e.queued_tokens for e in mine)
        late = [e for e in instance.waiting.values() if e.deferred]
        assert instance.deferred == len(late)
        assert instance.deferred_tokens == sum(e.queued_tokens for e in late)
        running = [e for e in mine if not e.queued_tokens]
        assert instance.running == len(running)
        assert instance.running_tokens == sum(e.num_tokens for e in running)
        coming = [e for e in entries if e.decode_on and e.decode_on.instance == instance.name]
        assert len(coming) == len(instance.coming)
        assert not coming or instance.state in ("active", "suspect")
