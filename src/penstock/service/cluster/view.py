"""The cluster as the policies see it: one table of numbers, kept up to date row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.service.cluster.instances import Changes, Instance
from penstock.service.policies.view import ROLES, ClusterView, Floats, Ints, TransferCosts

#: Columns of the table. The names of fields of `ClusterView` and `TransferCosts` stand for
#: themselves. Those that change with what is placed on an instance, and with its tokens ...
_PLACED = (
    "queued_tokens", "queued", "running", "running_tokens", "ttft_ratio", "ttft_error",
    "prefill_share", "deferred_tokens", "deferred", "coming", "coming_tokens",
)  # fmt: skip
#: ... those that change with what it says of itself (`Instance.has_news`) ...
_SAID = (
    "step_ends_s", "base_s", "per_token_s", "per_row_s", "per_context_token_s", "per_attention_s",
    "residual_s", "num_steps", "step_tokens", "max_running", "free_blocks", "total_blocks",
    "prompt_tokens", "map_s", "map_token_s", "copy_s", "copy_token_s", "tier_s", "tier_token_s",
    "link_token_s",
)  # fmt: skip
#: ... and one that is worked out at each look.
_COLUMNS = (*_PLACED, *_SAID, "step_left_s")
_PLACED_ROWS = slice(0, len(_PLACED))
_SAID_ROWS = slice(len(_PLACED), len(_PLACED) + len(_SAID))
_AT = {name: place for place, name in enumerate(_COLUMNS)}
_CODES = ("roles", "hosts")
_HOSTS = _CODES.index("hosts")


class LiveView:
    """Only rows of instances that have changed since the last look are written anew."""

    def __init__(self) -> None:
        self._table = np.zeros((len(_COLUMNS), 16))
        self._codes = np.zeros((len(_CODES), 16), np.int64)
        self._rows: dict[str, int] = {}
        self._hosts: dict[str, int] = {}
        self._written: dict[str, tuple[int, int]] = {}  # codes, which hardly ever change
        #: Whom the leading rows are of, what has happened to them, and the view of these rows.
        self._seen: tuple[Instance, ...] | None = None
        self._changes = Changes()
        self._view: ClusterView | None = None

    def of(self, instances: Sequence[Instance], now: float) -> ClusterView:
        """`instances` have shown their cards. Asked for the same tuple again, it answers with the
        same arrays, brought up to date: they are good until the next look."""
        if instances is not self._seen and isinstance(instances, tuple) and len(instances) > 1:
            self._see(instances, now)
        if instances is self._seen and self._view is not None:
            self._write_touched(now)
            left_s = self._table[_AT["step_left_s"], : len(instances)]
            np.subtract(self._table[_AT["step_ends_s"], : len(instances)], now, out=left_s)
            np.maximum(left_s, 0.0, out=left_s)
            return self._view
        rows = [self._row(instance, now) for instance in instances]
        table = self._table[:, rows]
        table[_AT["step_left_s"]] = np.maximum(table[_AT["step_ends_s"]] - now, 0.0)
        return _view(instances, table, self._codes[:, rows])

    def place_of(self, name: str, view: ClusterView) -> int:
        """Where `name` stands in `view`. In the view that is kept its row says so."""
        return self._rows[name] if view is self._view else view.names.index(name)

    def forget(self, name: str) -> None:
        """Rows move up, so that the table does not grow with every instance that ever was."""
        self._written.pop(name, None)
        row = self._rows.pop(name, None)
        if row is not None:
            self._order([r for r in self._rows.values()])
            left = self._codes[_HOSTS, : len(self._rows)]
            self._hosts = {host: code for host, code in self._hosts.items() if code in left}

    # --- rows ----------------------------------------------------------------------------------

    def _see(self, instances: tuple[Instance, ...], now: float) -> None:
        """From now on the leading rows are theirs, in this order."""
        rows = [self._row(instance, now) for instance in instances]
        self._seen = self._view = None
        if any(instance.changes is not instances[0].changes for instance in instances):
            return  # no one list says who of them has changed
        among = set(rows)  # membership only
        self._order(rows + [row for row in self._rows.values() if row not in among])
        self._seen, self._changes = instances, instances[0].changes
        size = len(instances)
        table, codes = self._table[:, :size], self._codes[:, :size]
        table.flags.writeable = codes.flags.writeable = False
        self._view = _view(instances, table, codes)

    def _row(self, instance: Instance, now: float) -> int:
        """Of an instance; written anew if it has to be."""
        row = self._rows.get(instance.name)
        if row is None:
            row = self._new_row(instance)
            self._write(instance, row, now)
        elif instance.touched:
            self._write(instance, row, now)
        return row

    def _write_touched(self, now: float) -> None:
        placed_at, placed = [], []
        said_at, said = [], []
        for instance in self._changes.touched.values():
            row = self._rows.get(instance.name)
            if row is None or not instance.touched:
                continue
            placed_at.append(row)
            placed.append(_placed_on(instance, now))
            if instance.has_news:
                said_at.append(row)
                said.append(_said_by(instance))
                self._write_codes(instance, row)
                instance.has_news = False
            instance.touched = False
        self._changes.touched.clear()
        if placed_at:
            self._table[_PLACED_ROWS, placed_at] = np.array(placed).T
        if said_at:
            self._table[_SAID_ROWS, said_at] = np.array(said).T

    def _write(self, instance: Instance, row: int, now: float) -> None:
        self._table[_PLACED_ROWS, row] = _placed_on(instance, now)
        self._table[_SAID_ROWS, row] = _said_by(instance)
        self._write_codes(instance, row)
        instance.touched = instance.has_news = False

    def _write_codes(self, instance: Instance, row: int) -> None:
        card = instance.card
        assert card is not None, "an active instance has shown its card"
        codes = ROLES.index(instance.role), self._host(card.host or instance.name)
        if self._written.get(instance.name) != codes:
            self._written[instance.name] = codes
            self._codes[:, row] = codes

    def _order(self, rows: list[int]) -> None:
        """Row number n is what was row number `rows[n]`."""
        self._seen = self._view = None
        names = {row: name for name, row in self._rows.items()}
        self._rows = {names[row]: place for place, row in enumerate(rows)}
        for old in (self._table, self._codes):
            old[:, : len(rows)] = old[:, rows]

    def _new_row(self, instance: Instance) -> int:
        row = self._rows[instance.name] = len(self._rows)
        if row == self._table.shape[1]:
            self._seen = self._view = None
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
            self._codes = np.concatenate([self._codes, np.zeros_like(self._codes)], axis=1)
        return row

    def _host(self, host: str) -> int:
        """A number that no other host among the rows has."""
        code = self._hosts.get(host)
        if code is None:
            code = self._hosts[host] = max(self._hosts.values(), default=-1) + 1
        return code


def _placed_on(i: Instance, now: float) -> tuple[float, ...]:
    """Values of `_PLACED`: work of this service, and what the last `Load` says of others. Sequences
    that wait for a prompt which another instance computes count as running: they will be."""
    seen, others, coming_tokens = i.experience, i.others, i.coming_tokens
    return (
        i.queued_tokens - i.deferred_tokens + others.queued_tokens,
        len(i.waiting) - i.deferred + others.queued,
        i.running + others.running + len(i.coming),
        i.running_tokens + others.running_tokens + coming_tokens,
        seen.ttft.ratio,
        seen.ttft.error,
        seen.prefill.share(now),
        i.deferred_tokens,
        i.deferred,
        len(i.coming),
        coming_tokens,
    )


def _said_by(i: Instance) -> tuple[float, ...]:
    """Values of `_SAID`."""
    card, load, transfer = i.card, i.load, i.experience.transfer
    assert card is not None, "an active instance has shown its card"
    cost = load.cost if load else card.cost
    return (
        i.step_ends_s,
        cost.base_s,
        cost.per_token_s,
        cost.per_row_s,
        cost.per_context_token_s,
        cost.per_attention_s,
        cost.residual_s,
        cost.num_steps,
        card.max_num_batched_tokens,
        card.max_num_seqs,
        float(load.kv_blocks_total - load.kv_blocks_used) if load else np.inf,
        card.num_blocks,
        np.inf if cost.prompt_tokens is None else cost.prompt_tokens,
        *transfer.line("map"),
        *transfer.line("copy"),
        *transfer.line("tier"),
        transfer.link_token_s,
    )


def _view(instances: Sequence[Instance], table: Floats, codes: Ints) -> ClusterView:
    """`table` and `codes`: a column of the view in each row."""

    def column(name: str) -> Floats:
        found: Floats = table[_AT[name]]
        return found

    return ClusterView(
        names=tuple([i.name for i in instances]),
        roles=codes[_CODES.index("roles")],
        hosts=codes[_HOSTS],
        queued_tokens=column("queued_tokens"),
        queued=column("queued"),
        running=column("running"),
        running_tokens=column("running_tokens"),
        step_left_s=column("step_left_s"),
        base_s=column("base_s"),
        per_token_s=column("per_token_s"),
        per_row_s=column("per_row_s"),
        per_context_token_s=column("per_context_token_s"),
        per_attention_s=column("per_attention_s"),
        residual_s=column("residual_s"),
        num_steps=column("num_steps"),
        ttft_ratio=column("ttft_ratio"),
        ttft_error=column("ttft_error"),
        step_tokens=column("step_tokens"),
        max_running=column("max_running"),
        free_blocks=column("free_blocks"),
        total_blocks=column("total_blocks"),
        prefill_share=column("prefill_share"),
        prompt_tokens=column("prompt_tokens"),
        deferred_tokens=column("deferred_tokens"),
        deferred=column("deferred"),
        coming=column("coming"),
        coming_tokens=column("coming_tokens"),
        transfer=TransferCosts(
            map_s=column("map_s"),
            map_token_s=column("map_token_s"),
            copy_s=column("copy_s"),
            copy_token_s=column("copy_token_s"),
            tier_s=column("tier_s"),
            tier_token_s=column("tier_token_s"),
            link_token_s=column("link_token_s"),
        ),
    )
