"""Which instances may serve together: what was asked for by flag, and what is in use already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from penstock.protocol.instance import InstanceCard
from penstock.registry.base import InstanceEntry

if TYPE_CHECKING:  # the command line imports this module, and no numpy
    from penstock.service.cluster.instances import Instance
    from penstock.service.journal import Entry

#: Other names of the same checkpoints' formats.
_SAME = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "compressed_tensors": "compressed-tensors",
    "finegrained_fp8": "fp8",
}


class Kind(NamedTuple):
    """Instances of one kind compute the same for the same tokens, and can exchange blocks."""

    model_digest: str
    layout_digest: str

    @classmethod
    def of(cls, card: InstanceCard) -> Kind:
        return cls(card.model_digest, card.layout.digest())

    def differs(self, other: Kind, who: str) -> str:
        """Why this is another kind than that of `who`; "" if it is not."""
        if self.model_digest != other.model_digest:
            return (
                f"it computes with another model than {who}, or with another dtype (digest "
                f"{self.model_digest[:12]}, not {other.model_digest[:12]}): give the same MODEL, "
                "--dtype and --quantization everywhere (with dynamic rope --max-model-len "
                "too), or another cluster's name in --registry"
            )
        if self.layout_digest != other.layout_digest:
            return (
                f"its KV has another layout than that of {who} (digest {self.layout_digest}, not "
                f"{other.layout_digest}): give the same --dtype and --kv-cache-dtype everywhere"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a service was told that its instances are; None: as they come, the first decides."""

    dtype: str | None = None
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    max_model_len: int | None = None

    @classmethod
    def among(cls, said: Mapping[str, Any]) -> Wanted:
        """What flags say of it; "auto" says nothing."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: said[name] for name in names if said.get(name) not in (None, "auto")})

    def refuses(self, found: InstanceEntry | InstanceCard) -> str:
        """Why `found` is not what is wanted; "" if it is. What it does not say is not held against
        it."""
        kv = found.layout.dtype if isinstance(found, InstanceCard) else found.kv_cache_dtype
        method = None if self.quantization is None else _SAME.get(self.quantization)
        for flag, wanted, has in (
            ("--dtype", self.dtype, found.dtype),
            ("--kv-cache-dtype", self.kv_cache_dtype, kv),
            ("--quantization", method or self.quantization, found.quantization),
            ("--max-model-len", self.max_model_len, found.max_model_len),
        ):
            if wanted is not None and has and has != wanted:
                return (
                    f"it runs with {flag} {has}, and this service was given {flag} {wanted}: give "
                    "both the same, or leave the flag out here and the first instance decides"
                )
        return ""


ANYTHING = Wanted()


def why_not(
    card: InstanceCard,
    instance: Instance,
    wanted: Wanted,
    instances: Iterable[Instance],
    entries: Iterable[Entry],
    in_use: Kind | None,
) -> str:
    """Why `instance` may not be used with this card; "" if it may.

    While an instance of one kind lives, or a sequence whose tokens one has drawn, none of another
    kind is let in: an answer that two of them share is the answer of neither.
    """
    if reason := wanted.refuses(card):
        return reason
    if in_use is None or (kind := Kind.of(card)) == in_use:
        return ""
    for other in instances:
        if other is not instance and other.state in ("active", "suspect"):
            return kind.differs(in_use, other.name)
    if any(entry.emitted for entry in entries):
        return kind.differs(in_use, "the one that answers which are under way began with")
    return ""
