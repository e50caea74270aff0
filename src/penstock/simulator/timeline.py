"""A replayed run in words: what came in, what was decided, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from penstock.protocol.codec import Message
from penstock.protocol.effects import Effect, Reply, Send
from penstock.protocol.instance import Assign, Assigned, Attached, Detach, Drain
from penstock.protocol.kv import Fetch, Fetched, Refused
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import TokenRow, Tokens
from penstock.service.core import ServiceCore
from penstock.service.explain import PlacementRecord
from penstock.service.explain_text import duration
from penstock.service.recording import message_of
from penstock.simulator.incident import Moment

#: Of one effect, where everything is shown.
_MOST_CHARACTERS = 600
#: Prompts and block keys, which are long and tell little.
_NUMBERS = re.compile(r"\[(\d+, \d+, \d+)(?:, \d+){5,}\]")
_BYTES = re.compile(r"b'(?:[^'\\]|\\.){32,}'|b\"(?:[^\"\\]|\\.){32,}\"")


@dataclass(frozen=True, slots=True)
class Line:
    """`requests`, `instances`: whom it is about. `why` has further lines."""

    at_s: float
    step: int
    text: str
    requests: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


@dataclass(slots=True)
class Timeline:
    """Of one `Replay`, whose moments are to be given in order, each before the next one is made."""

    core: ServiceCore
    _states: dict[str, str] = field(default_factory=dict)
    _begun: set[str] = field(default_factory=set)

    def lines(self, moment: Moment) -> list[Line]:
        """What is worth telling of it; nothing of a heartbeat."""
        said = [*self._came_in(moment), *self._went_out(moment)]
        changed = []
        for name, instance in self.core.instances.items():
            leaving = instance.state == "active" and not instance.takes_work
            state = "active, and takes nothing new" if leaving else instance.state
            if self._states.get(name) != state:
                before = self._states.get(name)
                self._states[name] = state
                why = (instance.refusal,) if instance.refusal else ()
                text = f"{name} is {state}" + (f", no more {before}" if before else "")
                changed.append(self._line(moment, text, instances=(name,), why=why))
        if moment.difference:
            said.append(self._line(moment, f"DIFFERS: {moment.difference}"))
        return [*said, *changed]

    # --- in ------------------------------------------------------------------------------------

    def _came_in(self, moment: Moment) -> Iterator[Line]:
        call: Any = moment.call
        match moment.name:
            case "submit":
                yield self._arrival(moment, call.spec)
            case "cancel":
                who = call.request_id
                yield self._line(moment, f"the client of {who} goes away", requests=(who,))
            case "on_message":
                yield from self._message(moment, call.peer, message_of(call))
            case "on_timer":
                pass
            case "lead":
                leads = "follows" if call.term is None else f"leads, in term {call.term}"
                yield self._line(moment, f"this service {leads}")
            case "close_all":
                yield self._line(moment, f"the service ends what is left: {call.error.message}")
            case name:
                yield self._line(moment, _ORDERS[name](call), instances=(call.name,))

    def _arrival(self, moment: Moment, spec: Any) -> Line:
        words = [f"{len(spec.prompt_ids)} prompt tokens, up to {spec.sampling.max_tokens} more"]
        if spec.n > 1:
            words.append(f"{spec.n} choices")
        if spec.request_class != "online":
            words.append(spec.request_class)
        if spec.ttft_slo_s is not None:
            words.append(f"first token wanted within {duration(spec.ttft_slo_s)}")
        text = f"{spec.request_id} arrives: {', '.join(words)}"
        if moment.raised:
            text += f"; it is refused ({moment.raised})"
        return self._line(moment, text, requests=(spec.request_id,))

    def _message(self, moment: Moment, peer: str, message: Message) -> Iterator[Line]:
        here = (peer,)
        match message:
            case Tokens():
                for row in message.rows:
                    yield from self._row(moment, peer, row)
            case Attached(card=card):
                text = f"{peer} attaches: {card.num_blocks} blocks, {card.device} {card.dtype}"
                yield self._line(moment, text, instances=here)
            case Assigned(role=role):
                yield self._line(moment, f"{peer} says that it is {role} now", instances=here)
            case Refused(what=what, reason=reason):
                text = f"{peer} refuses {what}: {reason}"
                whom = (_request(message.request_id),) if message.request_id else ()
                yield self._line(moment, text, requests=whom, instances=here)
            case Fetched(num_blocks=got, num_wanted=wanted, means=means) if wanted:
                whom = (_request(message.request_id),)
                text = f"{got} of {wanted} blocks of {message.request_id} are at {peer}"
                text += f", by {means} in {duration(message.seconds)}" if means else ""
                text += f" ({message.reason})" if message.reason else ""
                yield self._line(moment, text, requests=whom, instances=here)
            case _:
                pass

    def _row(self, moment: Moment, peer: str, row: TokenRow) -> Iterator[Line]:
        whom, here = (_request(row.request_id),), (peer,)
        placed = f"{row.request_id} {row.attempt}"
        if row.ids and placed not in self._begun:
            self._begun.add(placed)
            text = f"{row.request_id} has its first token of {peer}"
            if row.cached_tokens:
                text += f"; {row.cached_tokens} tokens were cached"
            yield self._line(moment, text, requests=whom, instances=here)
        if row.error is not None:
            text = f"{row.request_id} fails on {peer}: {row.error.message}"
            yield self._line(moment, text, requests=whom, instances=here)
        elif row.finish is not None:
            self._begun.discard(placed)
            tokens = row.start + len(row.ids)
            text = f"{row.request_id} ends on {peer} ({row.finish}) with {tokens} tokens"
            yield self._line(moment, text, requests=whom, instances=here)

    # --- out -----------------------------------------------------------------------------------

    def _went_out(self, moment: Moment) -> Iterator[Line]:
        for effect in moment.effects:
            match effect:
                case Send(peer=peer, message=Submit() as submit):
                    yield self._placed(moment, peer, submit)
                case Send(peer=peer, message=Cancel(request_id=key)):
                    text = f"{peer} is to drop {key}"
                    whom = (_request(key),)
                    yield self._line(moment, text, requests=whom, instances=(peer,))
                case Send(peer=peer, message=Fetch(request_id=key, source=source)):
                    text = f"{peer} is to fetch {source.num_blocks} blocks of {key} from "
                    text += source.instance
                    whom = (_request(key),)
                    yield self._line(moment, text, requests=whom, instances=(peer, source.instance))
                case Send(peer=peer, message=Assign(role=role)):
                    reason = self.core.roles.reasons.get(peer)
                    why = () if reason is None else (reason,)
                    text = f"{peer} is to be {role}"
                    yield self._line(moment, text, instances=(peer,), why=why)
                case Send(peer=peer, message=Drain() | Detach() as message):
                    text = f"{peer} is told to {type(message).__name__.lower()}"
                    yield self._line(moment, text, instances=(peer,))
                case Reply(request_id=who, event=event) if event.error is not None:
                    text = f"{who}/{event.choice} ends with an error: {event.error.message}"
                    yield self._line(moment, text, requests=(who,))
                case _:
                    pass

    def _placed(self, moment: Moment, peer: str, submit: Submit) -> Line:
        key = submit.request_id
        entry = self.core.journal.get(key)
        placement = None if entry is None else entry.record.present
        decision = None if placement is None else placement.decision
        text = f"{key} goes to {peer}"
        others: tuple[str, ...] = ()
        if decision is not None and decision.decode is not None:
            text += f", to be decoded on {decision.decode}"
            others = (decision.decode,)
        if submit.kv_source is not None:
            text += f", with {submit.kv_source.num_blocks} blocks of {submit.kv_source.instance}"
            others += (submit.kv_source.instance,)
        return self._line(
            moment,
            text,
            requests=(_request(key),),
            instances=(peer, *others),
            why=() if placement is None else tuple(_why(placement)),
        )

    @staticmethod
    def _line(
        moment: Moment,
        text: str,
        requests: tuple[str, ...] = (),
        instances: tuple[str, ...] = (),
        why: tuple[str, ...] = (),
    ) -> Line:
        return Line(moment.at_s, moment.number, text, requests, instances, why)


_ORDERS = {
    "add_instance": lambda call: f"{call.name} is connected to",
    "expect": lambda call: f"{call.name} is {'' if call.coming else 'not '}being started",
    "on_instance_lost": lambda call: f"{call.name} is reported lost",
    "on_instance_refused": lambda call: f"{call.name} may not be used: {call.reason}",
    "doubt": lambda call: f"{call.name}: {call.reason or 'nothing against it any more'}",
    "assign": lambda call: f"an operator wants {call.name} to be {call.role}",
    "drain_instance": lambda call: f"{call.name} is to be emptied",
    "take_out": lambda call: f"{call.name} is taken out",
    "bring_back": lambda call: f"{call.name} is taken back",
    "on_drained": lambda call: f"{call.name} has drained, and its process has ended",
    "remove_instance": lambda call: f"{call.name} is a part of the cluster no more",
}


def _request(key: str) -> str:
    """The request of a sequence: "req-1/0" is its first choice."""
    return key.rpartition("/")[0] or key


def _why(placement: PlacementRecord) -> Iterator[str]:
    decision = placement.decision
    if placement.because != "new":
        yield placement.because
    if decision is None:
        return
    predicted = placement.predicted_ttft_s
    in_time = f"; first token predicted in {duration(predicted)}" if predicted else ""
    yield f"{decision.policy}: {decision.reason}{in_time}"
    others = [
        f"{c.instance} ({duration(c.predicted_ttft_s)})"
        for c in decision.candidates
        if c.instance != placement.instance
    ]
    if others:
        yield f"rather than {', '.join(others)}"


def everything(moment: Moment) -> list[str]:
    """One moment with all that went in and came out."""
    shown: object = moment.call
    if moment.name == "on_message":
        shown = f"{moment.call.peer}: {_short(message_of(moment.call))}"
    lines = [f"in   {moment.name} {_short(shown)}"]
    if moment.raised:
        lines.append(f"out  raised {moment.raised}")
    lines += [f"out  {_effect(effect)}" for effect in moment.effects]
    if moment.difference:
        lines.append(f"DIFFERS: {moment.difference}")
    return lines


def _effect(effect: Effect) -> str:
    match effect:
        case Send(peer=peer, message=message):
            return f"to {peer}: {_short(message)}"
        case Reply(request_id=request_id, event=event):
            return f"reply to {request_id}: {_short(event)}"
        case _:
            return _short(effect)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = _NUMBERS.sub(lambda m: f"[{m[1]}, ... ({m[0].count(',') + 1})]", text)
    text = _BYTES.sub("b'...'", text)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def is_about(line: Line, request: str | None, instance: str | None) -> bool:
    """`request`: its id, or the beginning of it; of a choice, "id/choice"."""
    if request is not None and not any(_matches(known, request) for known in line.requests):
        return False
    return instance is None or instance in line.instances


def _matches(known: str, wanted: str) -> bool:
    return known.startswith(wanted) or known == _request(wanted)
