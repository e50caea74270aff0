"""The cluster as the policies see it: one table of numbers, kept up to date row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.service.cluster.instances import Instance
from penstock.service.policies.view import ROLES, ClusterView, Floats, Ints, TransferCosts

#: Columns of the table. The names of fields of `ClusterView` stand for themselves.
_COLUMNS = (
    "roles", "queued_tokens", "queued", "running", "running_tokens", "step_ends_s",
    "base_s", "per_token_s", "per_row_s", "per_context_token_s", "per_attention_s", "residual_s",
    "num_steps", "ttft_ratio", "ttft_error", "step_tokens", "max_running", "free_blocks",
    "total_blocks", "hosts", "prefill_share", "prompt_tokens",
    "map_s", "map_token_s", "copy_s", "copy_token_s", "tier_s", "tier_token_s",
)  # fmt: skip
_AT = {name: place for place, name in enumerate(_COLUMNS)}


class LiveView:
    """Only rows of instances that have changed since the last look are written anew."""

    def __init__(self) -> None:
        self._table = np.zeros((16, len(_COLUMNS)))
        self._rows: dict[str, int] = {}
        self._hosts: dict[str, int] = {}

    def of(self, instances: Sequence[Instance], now: float) -> ClusterView:
        """`instances` have shown their cards. The arrays are the caller's own."""
        rows = []
        for instance in instances:
            row = self._rows.get(instance.name)
            if row is None:
                row = self._new_row(instance)
            if instance.touched:
                self._table[row] = self._values(instance, now)
                instance.touched = False
            rows.append(row)
        columns = np.ascontiguousarray(self._table[rows].T)

        def column(name: str) -> Floats:
            found: Floats = columns[_AT[name]]
            return found

        def whole(name: str) -> Ints:
            found: Ints = columns[_AT[name]].astype(np.int64)
            return found

        return ClusterView(
            names=tuple(i.name for i in instances),
            roles=whole("roles"),
            queued_tokens=column("queued_tokens"),
            queued=column("queued"),
            running=column("running"),
            running_tokens=column("running_tokens"),
            step_left_s=np.maximum(column("step_ends_s") - now, 0.0),
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
            hosts=whole("hosts"),
            prefill_share=column("prefill_share"),
            prompt_tokens=column("prompt_tokens"),
            transfer=TransferCosts(
                map_s=column("map_s"),
                map_token_s=column("map_token_s"),
                copy_s=column("copy_s"),
                copy_token_s=column("copy_token_s"),
                tier_s=column("tier_s"),
                tier_token_s=column("tier_token_s"),
            ),
        )

    def forget(self, name: str) -> None:
        """Rows move up, so that the table does not grow with every instance that ever was."""
        row = self._rows.pop(name, None)
        if row is not None:
            self._table[row:-1] = self._table[row + 1 :]
            self._rows = {n: r - (r > row) for n, r in self._rows.items()}
            left = self._table[: len(self._rows), _AT["hosts"]]
            self._hosts = {host: code for host, code in self._hosts.items() if code in left}

    def _host(self, host: str) -> int:
        """A number that no other host among the rows has."""
        code = self._hosts.get(host)
        if code is None:
            code = self._hosts[host] = max(self._hosts.values(), default=-1) + 1
        return code

    def _new_row(self, instance: Instance) -> int:
        row = self._rows[instance.name] = len(self._rows)
        if row == len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        instance.touched = True
        return row

    def _values(self, i: Instance, now: float) -> tuple[float, ...]:
        """Work of this service, and what the last `Load` says of others. Sequences that wait for a
        prompt which another instance computes count as running: they will be."""
        card, load, seen = i.card, i.load, i.experience
        assert card is not None, "an active instance has shown its card"
        cost = load.cost if load else card.cost
        host = self._host(card.host or i.name)
        return (
            ROLES.index(i.role),
            i.queued_tokens + i.others.queued_tokens,
            len(i.waiting) + i.others.queued,
            i.running + i.others.running + len(i.coming),
            i.running_tokens + i.others.running_tokens + i.coming_tokens,
            i.step_ends_s,
            cost.base_s,
            cost.per_token_s,
            cost.per_row_s,
            cost.per_context_token_s,
            cost.per_attention_s,
            cost.residual_s,
            cost.num_steps,
            seen.ttft.ratio,
            seen.ttft.error,
            card.max_num_batched_tokens,
            card.max_num_seqs,
            float(load.kv_blocks_total - load.kv_blocks_used) if load else np.inf,
            card.num_blocks,
            host,
            seen.prefill.share(now),
            np.inf if cost.prompt_tokens is None else cost.prompt_tokens,
            *seen.transfer.line("map"),
            *seen.transfer.line("copy"),
            *seen.transfer.line("tier"),
        )
