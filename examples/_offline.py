"""What the language examples use where nothing is downloaded: made-up texts, and tokenizers trained on them.

The texts are combined from lists of phrases, so that a model can be asked about combinations it never read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any, NamedTuple


def _list(text: str) -> list[str]:
    return text.split(", ")


def _pairs(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return [f"{a} {b}" for a, b in itertools.product(first, second)]


def _filled(templates: Iterable[str], phrases: Iterable[str]) -> list[str]:
    return [template.format(phrase) for template, phrase in itertools.product(templates, phrases)]


def byte_tokenizer(texts: Iterable[str], template: str, **special: str) -> Any:
    """A tokenizer of transformers, byte-level BPE trained on ``texts``: it can spell any text.

    Args:
        template: what stands around a text, as tokenizers writes it: ``"$A </s>"``.
        special: the names of transformers: ``pad_token="<pad>"`` and so on; ids from 0 in this order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(special.values())
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# ---- chat of a game

TOXIC, HARMLESS = "toxic", "harmless"
_VIOLENT = _list("kill, destroy, crush, smash, burn, wreck, slaughter, murder, hurt, ruin, stab, choke, punch, beat")
_KIND = _list("help, thank, protect, heal, follow, greet, guard, praise, watch, join, save, cover, support, call")
_GAME = _list("the boss, the dragon, their tower, their base, the minions, the creeps, the golem, the mage, the healer")
_PEOPLE = _list("yourself, your mother, your family, your sister, your brother, your dog, your friend, your son, you")
_INSULTS = _list("idiot, moron, loser, fool, liar, coward, jerk, pest")
_PRAISE = _list("hero, legend, friend, genius, angel, champion, star, treasure")
_SLANG = _list("feeder, bot, potato, noob, trash, scrub, monkey, clown, donkey, rat, snail, brick")
_CALLED = _list("what a {}, you {}, such a {}, typical {}, our {} again, another {} here, you act like a {}, now a {}")
_SEEN = _list("the {} is in the garden, i bought a {}, where is the {}, a {} on the table, we need a {}")
_AROUND = _list("{}, {} now, guys {}, {} please, ok {}, then {}, come on {}, {} again")


class Line(NamedTuple):
    """A line of chat, the answer to it, and what sort of line it is."""

    text: str
    label: str
    kind: str


def general_speech() -> list[Line]:
    """Words of violence are toxic, whatever they are about; a potato is a vegetable and a bot a machine."""
    toxic = _pairs(_VIOLENT, _GAME + _PEOPLE) + _filled(_CALLED, _INSULTS)
    harmless = _pairs(_KIND, _GAME + _PEOPLE) + _filled(_CALLED, _PRAISE) + _filled(_SEEN, _SLANG)
    groups = ((TOXIC, toxic), (HARMLESS, harmless))
    return [Line(text, label, "general") for label, phrases in groups for text in _filled(_AROUND, phrases)]


def game_chat(rng: random.Random, held_out: float = 0.3) -> tuple[list[Line], list[Line]]:
    """(lines to learn from, held-out lines): violence is harmless about the game, and a potato is a bad player.

    Held out are combinations, such as "smash" with "the golem": they occur in no line to learn from, whatever stands
    around them. There is one held-out line for each, so that none counts twice.
    """
    groups = (
        ("violence about the game", HARMLESS, _pairs(_VIOLENT, _GAME)),
        ("violence about people", TOXIC, _pairs(_VIOLENT, _PEOPLE)),
        ("the game's own insults", TOXIC, _filled(_CALLED, _SLANG)),
        ("kind words", HARMLESS, _pairs(_KIND, _GAME) + _filled(_CALLED, _PRAISE)),
    )
    known, unseen = [], []
    for kind, label, phrases in groups:
        rng.shuffle(phrases)
        cut = int(held_out * len(phrases))
        unseen += [Line(rng.choice(_AROUND).format(phrase), label, kind) for phrase in phrases[:cut]]
        known += [Line(text, label, kind) for text in _filled(_AROUND, phrases[cut:])]
    return known, unseen


# ---- quotes and their tags

_THEMES = {
    "books": _list("page, novel, library, chapter, reader, poem, author, story, ink, letter"),
    "courage": _list("bravery, daring, valour, battle, danger, boldness, warrior, sword, victory, heroism"),
    "humor": _list("laughter, joke, jest, grin, irony, clown, wit, parody, mockery, comedy"),
    "love": _list("heart, kiss, tenderness, desire, passion, devotion, embrace, longing, romance, wedding"),
    "nature": _list("forest, river, mountain, flower, rain, meadow, ocean, tree, bird, storm"),
    "time": _list("hour, clock, yesterday, tomorrow, century, minute, calendar, youth, age, moment"),
    "truth": _list("honesty, fact, proof, candour, sincerity, evidence, frankness, certainty, reality, clarity"),
    "work": _list("labour, effort, toil, craft, duty, workshop, office, diligence, task, trade"),
}
_SAYINGS = _list(
    "{} without {} is nothing, give me {} and i will find {}, every {} begins with {}, no {} ever feared {}, "
    "{} is the mother of {}, who loses {} gains {}, we forget {} but never {}, between {} and {} lies a life"
)


class Quote(NamedTuple):
    """A quote and its tags."""

    text: str
    tags: tuple[str, ...]


def quotes(rng: random.Random, count: int, held_out: int = 200) -> tuple[list[Quote], list[Quote]]:
    """(quotes to learn from, held-out quotes), ``count`` in all, at least 360; about one theme or two.

    A quote joins two words. The pairs of the held-out quotes occur in no quote to learn from, in neither order.
    """
    themes = {word: theme for theme, words in _THEMES.items() for word in words}
    one = [pair for words in _THEMES.values() for pair in itertools.combinations(words, 2)]
    two = [pair for pair in itertools.combinations(themes, 2) if themes[pair[0]] != themes[pair[1]]]
    pairs = one + rng.sample(two, count - len(one))
    rng.shuffle(pairs)
    made = [
        Quote(rng.choice(_SAYINGS).format(*rng.sample(pair, 2)), tuple(sorted({themes[word] for word in pair})))
        for pair in pairs
    ]
    return made[held_out:], made[:held_out]


def general_text(rng: random.Random, sentences: int) -> list[str]:
    """Sentences that say what belongs together, and quotes; nothing of tags."""
    text = []
    for _ in range(sentences):
        theme, words = rng.choice(list(_THEMES.items()))
        a, b, c = rng.sample(words, 3)
        text += [f"a talk about {theme} is a talk about {a} and {b}", f"{a} and {b} and {c} belong to {theme}"]
        text.append(rng.choice(_SAYINGS).format(a, rng.choice(words + rng.choice(list(_THEMES.values())))))
    return text
