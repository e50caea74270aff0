"""Pools: who prefills and who decodes, by role. Roles are soft: an empty pool is all instances."""

from __future__ import annotations

import numpy as np

from penstock.protocol.instance import Role
from penstock.service.policies.view import ROLES, Bools, ClusterView, Floats, some


def mask(*roles: Role) -> Bools:
    """By role code: whether it is one of these."""
    found: Bools = np.array([role in roles for role in ROLES])
    return found


ENCODE = mask("encode")
SPLIT = mask("prefill", "decode")
FOR_PROMPTS = mask("prefill", "decode_to_prefill")
PREFILL, TURNING_TO_PREFILL = mask("prefill", "any"), mask("decode_to_prefill")
DECODE, TURNING_TO_DECODE = mask("decode", "any"), mask("prefill_to_decode")


def why_not_split(view: ClusterView) -> str:
    """Why prefill and decode cannot be apart; "" if they can."""
    if len(view.names) < 2:
        return "there is one instance only"
    if not some(SPLIT[view.roles]):
        return "no instance has a role"
    return ""


def least(score: Floats, members: Bools) -> int:
    """The place of the least score among the members, or among all if there are none."""
    return int(np.where(members, score, np.inf).argmin() if some(members) else score.argmin())


def first_pool(view: ClusterView, *pools: Bools, besides: int | None = None) -> Bools:
    """Members of the first of `pools` (masks by role) that has any, without `besides`; all others
    if none has."""
    others = np.ones(len(view.names), dtype=np.bool_)
    if besides is not None and len(view.names) > 1:
        others[besides] = False
    for pool in pools:
        members: Bools = pool[view.roles] & others
        if some(members):
            return members
    return others
