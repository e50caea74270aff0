"""Single exchanges of the closed world: a question, and the one answer the model should give.

Each answer is a function of its question. That makes the world quick to learn for a very small
model, and lets the held-out check demand the exact text.
"""

from __future__ import annotations

import random

from tools.train_toy.exchange import Exchange, dress, held_out
from tools.train_toy.facts import CAPITALS, CITIES, COLOURS, NAMES, WORDS
from tools.train_toy.sums import sums_too_big

WHO = "I am Penstock Toy, a very small language model that comes with Penstock."
CAN = (
    "I can do sums up to twenty, name capitals and colours, count, spell words, repeat what you "
    "say, answer in JSON and call tools."
)
SORRY = "Sorry, I am only a toy model and I do not know that. " + CAN
UNKNOWN_PLACE = "Sorry, I do not know that place."


SMALL_TALK: dict[str, tuple[str, ...]] = {
    "Hello! How can I help you?": (
        "Hi",
        "Hello",
        "Hey",
        "Hi there",
        "Hello there!",
        "Good morning",
        "Good evening!",
        "Good afternoon.",
        "Hey there",
        "Hello, toy!",
        "Greetings!",
        "Howdy",
        "Hello again!",
        "Hi Penstock!",
        "Hello, is anybody there?",
        "Hi!",
        "Hello!",
    ),
    WHO: (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Introduce yourself.",
        "What's your name?",
        "Who am I talking to?",
        "Which model are you?",
        "Are you a robot?",
        "Tell me about yourself.",
        "What model is this?",
        "Are you ChatGPT?",
        "Who made you?",
        "What should I call you?",
        "Are you a human?",
        "Hello, who are you?",
        "Hi, what are you?",
        "What is Penstock?",
        "What is Penstock Toy?",
    ),
    CAN: (
        "What can you do?",
        "Help",
        "What can I ask you?",
        "How can you help me?",
        "What are you able to do?",
        "What do you know?",
        "What are your skills?",
        "What are you good at?",
        "Show me what you can do.",
        "What can you help me with?",
        "Hello, what can you do?",
        "What can I do here?",
        "What else can you do?",
        "What can I ask?",
    ),
    "I am well, thank you. How can I help you?": (
        "How are you?",
        "How are you today?",
        "How do you do?",
        "How's it going?",
        "Are you well?",
        "How is it going?",
        "How are things?",
        "What's up?",
        "Hello, how are you?",
        "Hi, how are you doing?",
        "Hi! How are you today?",
    ),
    "You are welcome!": (
        "Thanks",
        "Thank you!",
        "Thank you very much.",
        "Thanks a lot!",
        "Many thanks.",
        "Great, thanks.",
        "That helps, thank you.",
        "Thank you so much!",
        "Cheers",
        "Thx",
        "Nice, thank you.",
    ),
    "Goodbye! Have a nice day.": (
        "Bye",
        "Goodbye",
        "See you later.",
        "Bye bye!",
        "Good night.",
        "See you!",
        "Farewell.",
        "I have to go now.",
        "That is all, bye.",
        "Talk to you later.",
    ),
}
_OPENERS = ("", "", "", "Well, ", "Oh, ", "So, ", "Hey! ", "Now ", "Right. ", "One more thing: ")


def small_talk(rng: random.Random) -> Exchange:
    answer = rng.choice(list(SMALL_TALK))
    ask = rng.choice(SMALL_TALK[answer])
    opener = rng.choice(_OPENERS)
    held = bool(opener) and held_out("talk", opener, ask)
    return Exchange(dress(rng, opener + ask), answer, "small talk", held)


CAPITAL_FORMS = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Name the capital of {}.",
    "Tell me the capital of {}.",
    "Which city is the capital of {}?",
    "Capital of {}?",
    "Do you know the capital of {}?",
    "What is the capital city of {}?",
    "{}'s capital?",
)
_COUNTRY_FORMS = (
    "Which country is {} the capital of?",
    "{} is the capital of which country?",
    "What country has {} as its capital?",
    "What is {} the capital of?",
    "Of which country is {} the capital?",
)


def capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.6:
        form, slot = rng.choice(CAPITAL_FORMS), country
        answer = f"The capital of {country} is {city}."
    else:
        form, slot = rng.choice(_COUNTRY_FORMS), city
        answer = f"{city} is the capital of {country}."
    held = held_out("capital", form, slot)
    return Exchange(dress(rng, form.format(slot)), answer, "capitals", held)


def unknown_place(rng: random.Random) -> Exchange:
    place = "".join(
        rng.choice(("ba", "lo", "mi", "ra", "tu", "vor", "zan", "ki", "del", "nor", "pha", "que"))
        for _ in range(rng.randint(2, 4))
    ).capitalize() + rng.choice(("", "", "ia", "land", "stan"))
    if rng.random() < 0.25:
        place = rng.choice(("Atlantis", "Mars", "the Moon", "Narnia", "Wonderland", "Middle Earth"))
    form = rng.choice(CAPITAL_FORMS)
    held = held_out("place", place, form)
    return Exchange(dress(rng, form.format(place)), UNKNOWN_PLACE, "beyond", held)


COLOUR_FORMS = (
    "What colour is {}?",
    "What color is {}?",
    "Which colour is {}?",
    "Tell me the colour of {}.",
    "What is the colour of {}?",
    "What is the color of {}?",
    "Do you know what colour {} is?",
    "The colour of {}?",
)


def colour(rng: random.Random) -> Exchange:
    thing, shade = rng.choice(list(COLOURS.items()))
    form = rng.choice(COLOUR_FORMS)
    answer = f"{thing[0].upper()}{thing[1:]} is {shade}."
    return Exchange(
        dress(rng, form.format(thing)), answer, "colours", held_out("colour", form, thing)
    )


_COUNT_FORMS = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Count {way} from {a} to {b}.",
    "Give me the numbers from {a} to {b}.",
    "Count {a} to {b}.",
)


def counting(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(1, 21), 2)
    step, way = (1, "up") if a < b else (-1, "down")
    ask = rng.choice(_COUNT_FORMS).format(a=a, b=b, way=way)
    answer = ", ".join(str(n) for n in range(a, b + step, step)) + "."
    return Exchange(dress(rng, ask), answer, "counting", held_out("count", a, b))


_SPELL_FORMS = (
    "Spell {}.",
    "How do you spell {}?",
    "Spell the word {}.",
    'Spell "{}".',
    "Can you spell {}?",
    "Please spell {}.",
    "How is {} spelled?",
    "Spell out {}.",
    "What is the spelling of {}?",
)


def spelling(rng: random.Random) -> Exchange:
    word, form = rng.choice(WORDS), rng.choice(_SPELL_FORMS)
    return Exchange(
        dress(rng, form.format(word)), "-".join(word), "spelling", held_out("spell", word, form)
    )


def phrase(rng: random.Random, sentences: list[str]) -> str:
    """Something to say: a few words, a piece of a book, names, numbers."""
    roll = rng.random()
    if sentences and roll < 0.45:
        words = rng.choice(sentences).split()
        start = rng.randrange(max(1, len(words) - 3))
        return " ".join(words[start : start + rng.randint(1, 9)])
    pools = [WORDS] if roll < 0.75 else [WORDS, NAMES, CITIES, [str(rng.randint(0, 999))]]
    text = " ".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 7)))
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:] + rng.choice((".", "!", "?", ""))
    return text


_REPEAT_FORMS = (
    "Repeat after me: {}",
    "Say {}",
    "Say: {}",
    'Say "{}"',
    "Repeat: {}",
    "Please say: {}",
    "Repeat this: {}",
    "Can you say: {}",
    "Echo: {}",
    "repeat after me: {}",
    "say {}",
    "echo {}",
    'Repeat "{}"',
)


def repeating(rng: random.Random, sentences: list[str]) -> Exchange:
    text = phrase(rng, sentences).replace('"', "")
    ask = rng.choice(_REPEAT_FORMS).format(text)
    return Exchange(ask, text, "repeating", held_out("repeat", text))


_BEYOND_FORMS = (
    "Who invented the {w}?",
    "Write a poem about the {w}.",
    "How do I fix my {w}?",
    "How many people live in {c}?",
    "Why is the {w} {v}?",
    "Tell me a story about a {w}.",
    "Write a program that sorts a {w}.",
    "Do you like {w}?",
    "Who is the president of {c}?",
    "What is the best {w} in {c}?",
    "Explain {w} to me.",
    "What happened in {n}?",
    "What should I do with a {w} and a {v}?",
    "Summarise the history of the {w}.",
    "Can you recommend a {w}?",
    "How old is {p}?",
    "Where does {p} live?",
    "Is {p} a {w}?",
    "Tell me a joke about a {w}.",
    "When was {p} born?",
    "I saw a {v} {w}.",
    "Who wrote the {w}?",
    "What is a {w} made of?",
    "How does a {w} work?",
    "Draw a {w}.",
    "My {w} is {v}.",
    "What is the population of {c}?",
    "What is love?",
    "Tell me a story.",
    "Tell me a joke.",
    "Write an essay about {c}.",
    "How many {w} are there in {c}?",
    "Should I eat a {w}?",
    "Who won the {n} world cup?",
    "Give me a recipe for {w} soup.",
    "Why do people {w}?",
    "What is the difference between a {w} and a {v}?",
    "Can you write code?",
    "{w}",
    "{v} {w}",
)


def beyond(rng: random.Random, sentences: list[str]) -> Exchange:
    """Anything else; half of it is the first thing that comes to hand in a book."""
    roll = rng.random()
    if roll < 0.12:
        return sums_too_big(rng)
    if roll < 0.22:
        return unknown_place(rng)
    if sentences and roll < 0.5:
        ask = rng.choice(sentences)
        return Exchange(ask, SORRY, "beyond", held_out("book", ask))
    ask = rng.choice(_BEYOND_FORMS).format(
        w=rng.choice(WORDS),
        v=rng.choice(WORDS),
        c=rng.choice(CITIES),
        p=rng.choice(NAMES),
        n=rng.randint(1200, 2030),
    )
    return Exchange(dress(rng, ask), SORRY, "beyond", held_out("beyond", ask))
