"""Whole conversations, drawn at random: small exchanges strung together, with or without tools."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.train_toy import json_talk, sums, toolset, world
from tools.train_toy.exchange import Exchange, dress, held_out
from tools.train_toy.facts import NAMES
from tools.train_toy.template import Message

CATEGORIES = (
    "small talk",
    "arithmetic",
    "capitals",
    "colours",
    "counting",
    "spelling",
    "repeating",
    "beyond",
    "json",
    "name memory",
    "tools: call",
    "tools: two calls",
    "tools: none fits",
    "tools: result",
)


@dataclass
class Dialogue:
    """A conversation that ends on the assistant turn that `category` is about."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    category: str
    held: bool  # something in it belongs to the held-out split: not for training
    fresh: bool  # its last turn does: fit for the held-out check


_SYSTEMS = (
    "You are a helpful assistant.",
    "You are Penstock Toy.",
    "Be brief.",
    "You are a friendly bot.",
    "Answer the user's questions.",
    "You are a helpful assistant. Be polite.",
    "You are an assistant with tools.",
    "Be kind and precise.",
    "Answer in one sentence.",
)


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Maker:
    """Draws conversations. `sentences` are lines of books, used as things people might say."""

    def __init__(self, rng: random.Random, sentences: list[str]) -> None:
        self.rng, self.sentences = rng, sentences
        self._kinds: list[tuple[float, Callable[[], Exchange]]] = [
            (0.9, lambda: world.small_talk(rng)),
            (2.4, lambda: sums.arithmetic(rng)),
            (1.2, lambda: world.capital(rng)),
            (0.6, lambda: world.colour(rng)),
            (0.8, lambda: world.counting(rng)),
            (1.6, lambda: world.spelling(rng)),
            (2.2, lambda: world.repeating(rng, sentences)),
            (0.8, lambda: world.beyond(rng, sentences)),
            (0.3, self._misfit),
            (0.9, lambda: json_talk.json_record(rng)),
            (1.8, lambda: json_talk.json_answer(rng)),
        ]

    def dialogue(self, tools: float = 0.3) -> Dialogue:
        """A conversation; `tools` is the chance of one in which tools are offered."""
        if self.rng.random() < tools:
            return self._with_tools()
        if self.rng.random() < 0.12:
            return self._name_chat()
        return self.chat(self.rng.choice((1, 1, 1, 2, 2, 3, 4, 6)))

    def _exchange(self, without: Callable[[], Exchange] | None = None) -> Exchange:
        kinds = [kind for kind in self._kinds if kind[1] != without]
        return self.rng.choices(kinds, [weight for weight, _ in kinds])[0][1]()

    def _system(self, chance: float) -> list[Message]:
        if self.rng.random() >= chance:
            return []
        if self.sentences and self.rng.random() < 0.25:
            return [_say("system", self.rng.choice(self.sentences))]
        return [_say("system", self.rng.choice(_SYSTEMS))]

    def _misfit(self, offered: Sequence[toolset.Tool] = ()) -> Exchange:
        """A request that some tool would serve, were it offered."""
        taken = {tool.ability.names for tool in offered}
        free = [
            ability
            for ability in toolset.ABILITIES
            if ability.names not in taken and not ability.names.startswith(tuple(toolset.CONTESTED))
        ]
        tool = toolset.make_tool(self.rng, self.rng.choice(free))
        ask, _ = toolset.ask_of(self.rng, tool)
        return Exchange(dress(self.rng, ask), world.SORRY, "beyond", held_out("misfit", ask))

    def chat(self, turns: int) -> Dialogue:
        exchanges = [self._exchange() for _ in range(turns)]
        messages = self._system(0.35)
        for exchange in exchanges:
            messages += [_say("user", exchange.ask), _say("assistant", exchange.answer)]
        return Dialogue(
            messages, [], exchanges[-1].category, any(e.held for e in exchanges), exchanges[-1].held
        )

    def _name_chat(self) -> Dialogue:
        """The user gives a name (or does not), other talk comes between, and the name is asked."""
        rng = self.rng
        name = rng.choice(NAMES) if rng.random() < 0.8 else toolset.syllables(rng).capitalize()
        told = rng.random() < 0.8
        form = rng.choice(
            (
                "My name is {}.",
                "I am {}.",
                "Hi, I'm {}.",
                "Hello, my name is {}.",
                "Call me {}.",
                "I'm {}",
                "My name's {}!",
                "Hi! My name is {}.",
            )
        )
        fresh = told and held_out("name", name)
        messages, held = self._system(0.3), fresh
        if told:
            messages += [
                _say("user", form.format(name)),
                _say("assistant", f"Nice to meet you, {name}!"),
            ]
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            between = self._exchange()
            held = held or between.held
            messages += [_say("user", between.ask), _say("assistant", between.answer)]
        ask = rng.choice(
            (
                "What is my name?",
                "Who am I?",
                "Do you know my name?",
                "Do you remember my name?",
                "What's my name?",
                "What am I called?",
            )
        )
        known = f"Your name is {name}." if told else "You have not told me your name yet."
        messages += [_say("user", dress(rng, ask)), _say("assistant", known)]
        return Dialogue(messages, [], "name memory", held, fresh)

    def _offer(self) -> list[toolset.Tool]:
        """One to four tools of different kinds, with names that do not clash."""
        rng, tools = self.rng, []
        kinds = rng.sample(toolset.ABILITIES, 4)
        for i in range(rng.choice((1, 1, 2, 2, 3, 3, 4))):
            ability = toolset.odd_ability(rng) if rng.random() < 0.3 else kinds[i]
            tool = toolset.make_tool(rng, ability)
            if tool.name not in [other.name for other in tools]:
                tools.append(tool)
        return tools

    def _with_tools(self) -> Dialogue:
        rng, tools = self.rng, self._offer()
        messages, held = self._system(0.4), False
        # Schemas are long: several turns upon one set of them make the most of the tokens.
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3))):
            if rng.random() < 0.35:
                held |= self._plain_turn(messages, tools)
            else:
                held |= self._call_turn(messages, tools)[1]
                self._result_turn(messages)
        if rng.random() < 0.28:
            category, more = "tools: none fits", self._plain_turn(messages, tools)
        else:
            category, more = self._call_turn(messages, tools)
            if rng.random() < 0.4:
                self._result_turn(messages)
                category = "tools: result"
        return Dialogue(messages, [tool.schema for tool in tools], category, held or more, more)

    def _plain_turn(self, messages: list[Message], tools: list[toolset.Tool]) -> bool:
        """A turn that none of the offered tools serves; says whether it is held out."""
        contested = {
            category
            for tool in tools
            for kind, categories in toolset.CONTESTED.items()
            if tool.ability.names.startswith(kind)
            for category in categories
        }
        while True:
            misfit = self.rng.random() < 0.4
            exchange = self._misfit(tools) if misfit else self._exchange(self._misfit)
            if exchange.category not in contested:
                break
        messages += [_say("user", exchange.ask), _say("assistant", exchange.answer)]
        return exchange.held

    def _call_turn(self, messages: list[Message], tools: list[toolset.Tool]) -> tuple[str, bool]:
        rng = self.rng
        tool = rng.choice(tools)
        ask, arguments = toolset.ask_of(rng, tool)
        calls, category = [(tool, arguments)], "tools: call"
        if rng.random() < 0.25:
            second = rng.choice(tools)
            more, others = toolset.ask_of(rng, second)
            ask, category = (
                f"{ask} {rng.choice(('And', 'Also:', 'Then'))} {more}",
                "tools: two calls",
            )
            calls.append((second, others))
        messages.append(_say("user", ask))
        functions = [
            {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
            for tool, arguments in calls
        ]
        messages.append({"role": "assistant", "content": "", "tool_calls": functions})
        return category, held_out("call", ask) or held_out("tool", tool.name)

    def _result_turn(self, messages: list[Message]) -> None:
        """Feed results back for the calls of the last message, and report them."""
        told = []
        for _ in messages[-1]["tool_calls"]:
            found, sentence = toolset.result_of(self.rng)
            content = found if isinstance(found, str) else json.dumps(found)
            messages.append(_say("tool", content))
            told.append(sentence)
        messages.append(_say("assistant", " ".join(told)))
