"""Tools to offer, things to ask of them, and what they give back.

Names, descriptions and parameter names vary at random, and some of the tools are nonsense put
together from words: the model has to read the tools it is given and copy from them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tools.train_toy.facts import CITIES, CURRENCIES, DAYS, LANGUAGES, NAMES, WORDS

Json = dict[str, Any]
Draw = Callable[[random.Random], Any]


@dataclass
class Param:
    """A parameter of an ability: the names it may bear, and how to draw a value from a text."""

    names: str  # separated by spaces
    draw: Draw
    about: str
    type: str = "string"


@dataclass
class Ability:
    """A kind of tool. `asks` speak of the parameters by position: {0}, {1}."""

    names: str
    about: tuple[str, ...]
    params: tuple[Param, ...]
    asks: tuple[str, ...]
    extras: tuple[str, ...] = ()  # optional string parameters that nobody ever fills


@dataclass
class Tool:
    """An ability under concrete names, as offered in a request."""

    ability: Ability
    name: str
    keys: list[str]
    schema: Json
    values: list[Any] = field(default_factory=list)


def _split(words: str) -> list[str]:
    return words.split()


def _words(low: int, high: int) -> Draw:
    return lambda rng: " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def _number(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low, high)


def _one_of(values: list[str] | str) -> Draw:
    listed = values.split() if isinstance(values, str) else values
    return lambda rng: rng.choice(listed)


_SYLLABLES = _split("ka lo mi ren tas vu bel dor fin gra hol jin pe qui sol tar wex yor zu an el")


def syllables(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def _city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.85 else syllables(rng).capitalize()


def _person(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.85 else syllables(rng).capitalize()


def _clock(rng: random.Random) -> str:
    return rng.choice(
        (
            f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
            f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}",
        )
    )


def _sum(rng: random.Random) -> str:
    size = rng.choice((20, 99, 999))
    terms = [str(rng.randint(1, size)) for _ in range(rng.choice((2, 2, 2, 3)))]
    return f" {rng.choice('+-*/')} ".join(terms)


CITY = Param("city location place town city_name where", _city, "The city")
PERSON = Param("recipient to person name contact user", _person, "Who to reach")
TEXT = Param("text message body content note", _words(1, 6), "The text")
QUERY = Param("query q search_term keywords topic", _words(1, 5), "What to look for")
DAY = Param("day date weekday when", _one_of(DAYS), "The day")
CLOCK = Param("time at when start_time hour", _clock, "The time of day")
MINUTES = Param(
    "minutes duration duration_minutes length mins", _number(1, 180), "How long", "integer"
)
AMOUNT = Param("amount value sum quantity", _number(1, 9999), "How much", "integer")
WORD = Param("word term text entry", _words(1, 1), "The word")
ROOM = Param(
    "room place area zone",
    _one_of("kitchen bedroom bathroom hall office attic cellar garage garden library"),
    "Which room",
)
SOURCE = Param("from from_currency source base", _one_of(CURRENCIES), "Currency to convert from")
TARGET = Param("to to_currency target quote", _one_of(CURRENCIES), "Currency to convert to")
ORIGIN = Param("origin from start departure from_city", _city, "Where it starts")
GOAL = Param("destination to end arrival to_city", _city, "Where it ends")

ABILITIES: tuple[Ability, ...] = (
    Ability(
        "get_weather weather current_weather weather_lookup getWeather fetch_weather forecast",
        ("Get the current weather for a city.", "Weather in a place", "Look up the weather"),
        (CITY,),
        (
            "What is the weather in {0}?",
            "What's the weather like in {0}?",
            "How is the weather in {0} today?",
            "Is it raining in {0}?",
            "Weather in {0}?",
            "Tell me the weather in {0}.",
            "Is it cold in {0}?",
            "Weather for {0} please",
        ),
        ("unit", "units", "language"),
    ),
    Ability(
        "get_time current_time time_in clock getTime local_time world_clock",
        ("Get the local time in a city.", "Tells the time", "Current time in a place"),
        (CITY,),
        (
            "What time is it in {0}?",
            "What is the time in {0}?",
            "Time in {0}?",
            "Tell me the local time in {0}.",
            "What's the time in {0} now?",
        ),
        ("format",),
    ),
    Ability(
        "calculator calculate evaluate compute math calc",
        ("Evaluate an arithmetic expression.", "Do a sum", "A calculator"),
        (Param("expression expr formula input", _sum, "The expression"),),
        (
            "What is {0}?",
            "Calculate {0}",
            "Compute {0}.",
            "How much is {0}?",
            "{0}",
            "{0} = ?",
            "Work out {0} for me.",
        ),
    ),
    Ability(
        "search web_search find lookup search_web google",
        ("Search the web.", "Look something up", "Find pages about a topic"),
        (QUERY,),
        (
            "Search for {0}.",
            "Look up {0}",
            "Find information about {0}.",
            "Search the web for {0}",
            "Can you find something on {0}?",
        ),
        ("limit", "site"),
    ),
    Ability(
        "send_message send_text message_contact sendMessage text_person notify",
        ("Send a message to somebody.", "Sends a text", "Message a contact"),
        (PERSON, TEXT),
        (
            "Send a message to {0}: {1}",
            'Tell {0} "{1}"',
            "Text {0}: {1}",
            'Message {0} saying "{1}"',
            'Send "{1}" to {0}.',
            "Let {0} know: {1}",
        ),
        ("priority",),
    ),
    Ability(
        "set_timer start_timer timer countdown create_timer",
        ("Set a timer.", "Start a countdown", "Set a timer for some minutes"),
        (MINUTES,),
        (
            "Set a timer for {0} minutes.",
            "Start a {0} minute timer.",
            "Timer for {0} minutes",
            "Wake me in {0} minutes.",
            "Remind me in {0} minutes.",
        ),
        ("label",),
    ),
    Ability(
        "convert_currency exchange currency_converter convert_money fx_convert",
        ("Convert money between currencies.", "Exchange rates", "Convert an amount"),
        (AMOUNT, SOURCE, TARGET),
        (
            "Convert {0} {1} to {2}.",
            "How much is {0} {1} in {2}?",
            "{0} {1} in {2}?",
            "Exchange {0} {1} for {2}.",
            "What are {0} {1} worth in {2}?",
        ),
    ),
    Ability(
        "translate translate_text translator translation",
        ("Translate a text.", "Translates words into another language"),
        (TEXT, Param("language target_language lang to", _one_of(LANGUAGES), "The language")),
        (
            'Translate "{0}" into {1}.',
            'How do you say "{0}" in {1}?',
            "{0} in {1}, please",
            'Put "{0}" into {1}.',
        ),
    ),
    Ability(
        "create_reminder remind add_reminder set_reminder",
        ("Create a reminder.", "Remind the user of something"),
        (TEXT, CLOCK),
        ("Remind me at {1}: {0}", "Set a reminder for {1}: {0}", 'Remind me of "{0}" at {1}.'),
    ),
    Ability(
        "get_news news headlines latest_news",
        ("Get the latest news.", "Headlines about a topic"),
        (QUERY,),
        ("Any news about {0}?", "What is the news on {0}?", "Show me headlines about {0}."),
    ),
    Ability(
        "play_music play play_song music_player",
        ("Play a song.", "Play some music"),
        (Param("song title track name", _words(1, 4), "The song"),),
        ("Play {0}.", "Play the song {0}", "I want to hear {0}.", 'Put on "{0}".'),
        ("volume",),
    ),
    Ability(
        "turn_on_light light_on switch_light lights",
        ("Turn on the light in a room.", "Switches a light"),
        (ROOM,),
        ("Turn on the light in the {0}.", "Lights on in the {0}", "It is dark in the {0}."),
    ),
    Ability(
        "set_temperature thermostat heating set_heating",
        ("Set the temperature of a room.", "Controls the heating"),
        (ROOM, Param("degrees temperature temp level", _number(5, 35), "Degrees", "integer")),
        (
            "Set the {0} to {1} degrees.",
            "Make it {1} degrees in the {0}.",
            "Heat the {0} to {1} degrees.",
        ),
    ),
    Ability(
        "roll_dice dice throw_dice roll",
        ("Roll a die.", "Throws dice"),
        (Param("sides faces n size", _number(2, 100), "Number of sides", "integer"),),
        ("Roll a die with {0} sides.", "Roll a {0} sided die.", "Throw a d{0}"),
    ),
    Ability(
        "define_word define dictionary get_definition",
        ("Look up a word in the dictionary.", "Define a word"),
        (WORD,),
        (
            "Define {0}.",
            "What does {0} mean?",
            'What is the meaning of "{0}"?',
            "Look up the word {0}",
        ),
    ),
    Ability(
        "get_distance distance route find_route",
        ("Distance between two cities.", "Plan a route"),
        (ORIGIN, GOAL),
        (
            "How far is it from {0} to {1}?",
            "Distance from {0} to {1}?",
            "How do I get from {0} to {1}?",
        ),
        ("mode",),
    ),
    Ability(
        "book_flight flights search_flights find_flight",
        ("Book a flight.", "Find flights"),
        (ORIGIN, GOAL, DAY),
        (
            "Book a flight from {0} to {1} on {2}.",
            "I want to fly from {0} to {1} on {2}.",
            "Flights from {0} to {1} on {2}?",
        ),
    ),
    Ability(
        "add_to_list add_item shopping_list add_to_cart",
        ("Add an item to the shopping list.", "Put something on the list"),
        (
            Param("item product thing name", _words(1, 2), "The item"),
            Param("quantity count number how_many", _number(1, 50), "How many", "integer"),
        ),
        ("Add {1} {0} to my list.", "I need {1} {0}.", "Put {1} {0} on the shopping list."),
    ),
    Ability(
        "get_stock_price stock_price quote ticker",
        ("Price of a share.", "Get a stock quote"),
        (
            Param(
                "symbol ticker stock",
                lambda rng: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 4))),
                "Ticker symbol",
            ),
        ),
        ("What is the price of {0}?", "How is {0} stock doing?", "Quote for {0}"),
    ),
    Ability(
        "get_user find_user user_info lookup_user",
        ("Look up a user.", "Get user details"),
        (Param("user_id id uid user", _number(1, 99999), "The user id", "integer"),),
        ("Who is user {0}?", "Look up user {0}.", "Get the details of user {0}"),
    ),
)

_VERBS = _split(
    "book cancel check open close start stop find create delete update move count print "
    "lock paint order rent repair measure water feed ship review rate list copy archive"
)
_NOUNS = _split(
    "table room ticket order file report garden engine parcel account invoice camera "
    "door meeting course recipe boat robot printer vehicle project task sensor"
)
_ODD_PARAMS = (
    Param("guests", _number(1, 40), "Number of guests", "integer"),
    Param("size", _number(1, 99), "The size", "integer"),
    Param("number", _number(1, 999), "The number", "integer"),
    Param("year", _number(1900, 2030), "The year", "integer"),
    Param("level", _number(0, 10), "The level", "integer"),
    Param("day", _one_of(DAYS), "The day"),
    Param("city", _city, "The city"),
    Param("owner", _person, "The owner"),
    Param("colour", _one_of("red blue green yellow white black pink brown"), "The colour"),
    Param("title", _words(1, 3), "The title"),
    Param("time", _clock, "The time"),
    Param("code", lambda rng: syllables(rng).upper(), "The code"),
    Param("label", syllables, "The label"),
    Param("topic", _words(1, 2), "The topic"),
)


CALCULATOR = next(a for a in ABILITIES if a.names.startswith("calculator"))
# What a calculator or a search engine would answer as well as the closed world does.
CONTESTED = {
    "calculator": ("arithmetic", "json", "beyond"),
    "search": ("arithmetic", "capitals", "colours", "json", "beyond"),
}
_SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def odd_ability(rng: random.Random) -> Ability:
    """A tool nobody has seen before; the question names its parameters outright."""
    verb, noun = rng.choice(_VERBS), rng.choice(_NOUNS) if rng.random() < 0.7 else rng.choice(WORDS)
    params = tuple(rng.sample(_ODD_PARAMS, rng.randint(1, 3)))
    link = rng.choice((" ", " ", ": ", " = ", " set to "))
    listed = [f"{param.names}{link}{{{i}}}" for i, param in enumerate(params)]
    told = " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
    camel = verb + noun.capitalize()
    name = rng.choice(
        (f"{verb}_{noun}", f"{verb}_{noun}", camel, f"{noun}_{verb}", f"{noun}.{verb}")
    )
    asks = (
        f"{verb.capitalize()} the {noun} with {told}.",
        f"Please {verb} a {noun}, {told}.",
        f"I want to {verb} a {noun}: {told}",
        f"Use {name} with {told}.",
        f"Call {name} with {told}",
    )
    return Ability(
        name, (f"{verb.capitalize()} a {noun}.", f"Used to {verb} the {noun}"), params, asks
    )


def make_tool(rng: random.Random, ability: Ability) -> Tool:
    """Fix an ability's names and write its schema in the shape of the OpenAI API."""
    name = rng.choice(ability.names.split())
    if rng.random() < 0.06:
        name = f"{name}_{syllables(rng)}"
    keys: list[str] = []
    for param in ability.params:
        key = rng.choice([k for k in param.names.split() if k not in keys])
        keys.append(key if rng.random() < 0.97 else f"{key}_{syllables(rng)}")
    order = list(range(len(keys)))
    rng.shuffle(order)
    properties: Json = {}
    for i in order:
        properties[keys[i]] = {"type": ability.params[i].type}
        if rng.random() < 0.4:
            properties[keys[i]]["description"] = ability.params[i].about
    if ability.extras and rng.random() < 0.3:
        extra = rng.choice(ability.extras)
        if extra not in properties:
            properties[extra] = {"type": "string"}
    parameters = {"type": "object", "properties": properties}
    if rng.random() < 0.85:
        parameters["required"] = [keys[i] for i in order]
    function = {"name": name, "description": rng.choice(ability.about), "parameters": parameters}
    return Tool(ability, name, keys, {"type": "function", "function": function})


def ask_of(rng: random.Random, tool: Tool) -> tuple[str, Json]:
    """A request that the tool serves, and the arguments of the call, in the schema's order."""
    values = [param.draw(rng) for param in tool.ability.params]
    spoken = values
    if tool.ability is CALCULATOR and rng.random() < 0.35:
        spoken = [" ".join(_SPOKEN.get(part, part) for part in values[0].split())]
    ask = rng.choice(tool.ability.asks).format(*spoken)
    given = dict(zip(tool.keys, values, strict=True))
    properties = tool.schema["function"]["parameters"]["properties"]
    return ask, {key: given[key] for key in properties if key in given}


_FINDINGS: tuple[tuple[str, Draw], ...] = (
    ("temperature", _number(-20, 40)),
    ("condition", _one_of("sunny cloudy rainy windy foggy snowy stormy clear")),
    ("time", _clock),
    ("result", _number(0, 99999)),
    ("price", lambda rng: round(rng.uniform(1, 999), 2)),
    ("status", _one_of("sent ready done open closed pending active")),
    ("distance", _number(1, 9000)),
    ("name", _person),
    ("city", _city),
    ("count", _number(0, 500)),
    ("title", _words(1, 4)),
    ("summary", _words(2, 8)),
    ("translation", syllables),
    ("wind_speed", _number(0, 90)),
    ("order_id", _number(1000, 99999)),
    ("humidity", _number(1, 100)),
    ("day", _one_of(DAYS)),
    ("total", _number(1, 5000)),
    ("rate", lambda rng: round(rng.uniform(0.1, 90), 2)),
    ("room", _one_of("kitchen bedroom office")),
    ("answer", _words(1, 5)),
)


def result_of(rng: random.Random) -> tuple[Any, str]:
    """What a tool gives back, and the sentence that reports it."""
    roll = rng.random()
    if roll < 0.1:
        return {"status": "ok"}, "Done."
    if roll < 0.2:
        reason = rng.choice(("not found", "timed out", "no such place", "not allowed", "busy"))
        reason = f"{rng.choice(WORDS)} {reason}" if rng.random() < 0.5 else reason
        return {"error": reason}, f"Sorry, that did not work: {reason}."
    if roll < 0.4:
        text = str(_words(1, 6)(rng)) if rng.random() < 0.6 else str(rng.randint(0, 99999))
        return text, f"Here is what I found: {text}."
    found = {key: draw(rng) for key, draw in rng.sample(_FINDINGS, rng.choice((1, 1, 2, 2, 3)))}
    parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in found.items()]
    told = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    return found, told[0].upper() + told[1:] + "."
