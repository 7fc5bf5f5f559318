"""What a scene is called: `caption(scene, rng)` says it in English, each time in other words."""

from __future__ import annotations

import random

from training.world import COLOURS, MATERIALS, OBJECTS, PLACES, SHAPES, Scene

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "forest": ("in a forest", "in the forest", "in the woods", "in a green forest"),
    "night": ("at night", "at night", "under the stars", "at night under the moon", "on a starry night"),
    "beach": ("on a beach", "on the beach", "at the beach", "by the sea"),
    "snow": ("in the snow", "in the snow", "in winter", "on a snowy day"),
    "desert": ("in a desert", "in the desert", "on the sand dunes"),
    "city": ("in a city", "in the city", "in front of the city skyline", "in town"),
    "sea": ("under water", "underwater", "under the sea", "in the ocean"),
    "meadow": ("in a meadow", "in the meadow", "on a green field", "in the grass"),
    "mountains": ("in the mountains", "in the mountains", "in front of snowy mountains", "near the mountains"),
}
_PREFIXES = (
    "a picture of ", "a drawing of ", "an emoji of ", "a photo of ", "a painting of ", "an illustration of ",
    "an image of ", "a photograph of ",
)  # fmt: skip
_SUFFIXES = (
    " in photorealistic style", " in cartoon style", ", digital art", ", highly detailed", ", oil painting",
    ", 4k, sharp focus", ", watercolour", " in the style of an old master", ", studio light", ", masterpiece",
    ", trending, cinematic", " with soft shadows", ", high quality photo", " in pixel art style",
)  # fmt: skip
# They change nothing in the picture, so a prompt may hold them.
_ADJECTIVES = (
    "cute", "angry", "happy", "sad", "funny", "little old", "beautiful", "fluffy", "brave", "curious", "lonely",
    "chrome-plated", "golden", "shiny", "wooden", "plastic", "sleepy", "wise", "fast", "famous", "friendly", "lovely",
    "hungry", "tired", "proud", "magical", "dusty", "ancient", "modern", "fancy", "metallic", "smiling",
)  # fmt: skip
_ADVERBS = ("curiously", "happily", "quietly", "carefully", "sadly", "proudly", "slowly", "angrily")
_ATTRIBUTES = (
    "with a golden beak", "with a long tail", "with big eyes", "with a nice smile", "with a red nose", "with a hat",
    "with a secret", "from long ago", "with shiny skin", "of great beauty",
)  # fmt: skip
_LONE = ("{a}", "{a}", "{a}", "{a}", "{a} sitting", "{a} standing", "there is {a}", "one can see {a}", "{a} alone")
_RIDING = (
    "{a} riding {b}", "{a} riding {b}", "{a} riding {b}", "{a} rides {b}", "{a} on top of {b}", "{a} sitting on {b}",
    "{b} ridden by {a}", "{a} riding on {b}", "{a} is riding {b}",
)  # fmt: skip
_LEFT = (
    "{a} left of {b}",
    "{a} to the left of {b}",
    "{b} right of {a}",
    "{b} to the right of {a}",
    "{a} on the left and {b} on the right",
    "{b} on the right and {a} on the left",
    "{a} on the left side of {b}",
    "{b} on the right of {a}",
)
# They name no side, so whoever is named first stands on the left. Were either side as likely, each half of a picture
# would choose for itself, and often draw the same object as the other.
_BESIDE = (
    "{a} and {b}", "{a} and {b}", "{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} with {b}", "{a} near {b}",
    "{a} together with {b}",
)  # fmt: skip
_ABOVE = ("{a} above {b}", "{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}", "{b} beneath {a}")
_IN = ("{a} in {b}", "{a} in {b}", "{a} inside {b}", "{a} lives in {b}", "{a} living in {b}", "{b} with {a} inside")
_LOOKING = (
    "{a} looking at {b}",
    "{a} looks at {b}",
    "{a} watching {b}",
    "{a} staring at {b}",
    "{a} looking{adv} at {b}",
)
_FACING = (
    "{a} facing {b}", "{a} talking to {b}", "{a} arguing with {b}", "{a} and {b} facing each other",
    "{a} and {b} arguing", "{a} fighting with {b}", "{a} talking with {b}", "{a} argues with {b}",
)  # fmt: skip
_FRONT = (
    "{a} in front of {b}",
    "{a} in front of {b}",
    "{a} standing before {b}",
    "{b} behind {a}",
    "{b} with {a} in front",
)
_MIRROR = (
    "{a} looking in {m} seeing {b}", "{a} looking in {m}, seeing {b}", "{a} looking{adv} in {m}, seeing {b}",
    "{a} looks into {m} and sees {b}", "{a} looking into {m} and seeing {b}", "{a} sees {b} in {m}",
    "{a} in front of {m} that shows {b}", "{b} in {m} and {a} looking at it", "{a} looking at {b} in {m}",
)  # fmt: skip
_OWN_MIRROR = (
    "{a} looking in {m}", "{a} looking into {m}", "{a} looks{adv} into {m}", "{a} sees itself in {m}",
    "{a} looking at itself in {m}",
)  # fmt: skip
_MADE = ("{h} made of {x}", "{h} made out of {x}", "{h} built of {x}", "{x} house", "{h} of {x}", "{h} made from {x}")
_SEVERAL = {2: ("two", "two", "a pair of", "2"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
_SCALES = {"big": ("big", "large", "huge", "giant"), "small": ("small", "little", "tiny")}
_PLURALS = {
    "sushi": "pieces of sushi", "slice of pizza": "slices of pizza", "piece of sushi": "pieces of sushi",
    "plate of sushi": "plates of sushi", "pony": "ponies", "puppy": "puppies", "strawberry": "strawberries",
    "red strawberry": "red strawberries", "butterfly": "butterflies", "orange butterfly": "orange butterflies",
    "fish": "fish", "yellow fish": "yellow fish", "tropical fish": "tropical fish", "sheep": "sheep",
    "white sheep": "white sheep", "slice of watermelon": "slices of watermelon", "piece of cheese": "pieces of cheese",
    "octopus": "octopuses", "pink octopus": "pink octopuses", "fox": "foxes", "red fox": "red foxes",
    "cactus": "cactuses", "green cactus": "green cactuses", "cheese": "pieces of cheese", "bunny": "bunnies",
    "spaceman": "spacemen", "snowman": "snowmen", "ice cream": "ice creams", "ladybird": "ladybirds",
    "toadstool": "toadstools",
}  # fmt: skip
_UNCOUNTED = ("sushi", "pizza", "cheese", "ice cream", "watermelon", "cake")


def caption(scene: Scene, rng: random.Random) -> str:
    """Say the scene in English; calls with other random states give other words for the same scene."""
    text = _subject(scene, rng)
    if rng.random() < 0.1:
        text = rng.choice(_PREFIXES) + text
    place = _place_phrase(scene.background, rng)
    if place is not None:
        # A leading "in a city, ..." keeps the order of the two parts from mattering.
        text = f"{place}, {text}" if rng.random() < 0.1 else f"{text} {place}"
    if rng.random() < 0.08:
        text += rng.choice(_SUFFIXES)
    if rng.random() < 0.05:
        text = _with_a_strange_word(text, rng)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def plural(noun: str) -> str:
    """The plural of a noun phrase of `OBJECTS` or of a shape."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    return noun + "es" if noun.endswith(("s", "x", "ch", "sh")) else noun + "s"


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def _subject(scene: Scene, rng: random.Random) -> str:
    """The objects and how they stand, without the place."""
    names = [placed.name for placed in scene.objects]
    if scene.relation == "count":
        noun = names[0] if names[0] not in OBJECTS else rng.choice(OBJECTS[names[0]][1])
        return f"{rng.choice(_SEVERAL[len(names)])} {plural(noun)}"
    if not scene.relation:
        return rng.choice(_LONE).format(a=_noun_phrase(names[0], scene.scale, rng))
    phrases = [_noun_phrase(name, "", rng) for name in names]
    adverb = f" {rng.choice(_ADVERBS)}" if rng.random() < 0.5 else ""
    if scene.relation == "mirror":
        looker, seen, mirror = phrases
        templates = _OWN_MIRROR if names[0] == names[1] else _MIRROR
        if rng.random() < 0.5:
            mirror = "the mirror"
        return rng.choice(templates).format(a=looker, b=seen, m=mirror, adv=adverb)
    forms = {"riding": _RIDING, "above": _ABOVE, "in": _IN, "looking": _LOOKING, "facing": _FACING, "front": _FRONT}
    first, second = phrases
    if scene.relation == "left" and rng.random() < 0.4:
        return rng.choice(_BESIDE).format(a=first, b=second)
    if rng.random() < 0.03:
        return f"{first} and {second}"
    return rng.choice(forms.get(scene.relation, _LEFT)).format(a=first, b=second, adv=adverb)


def _noun_phrase(name: str, scale: str, rng: random.Random) -> str:
    if name.startswith("house of "):
        food = name.removeprefix("house of ")
        house = with_article(rng.choice(("house", "house", "home")))
        words = rng.choice((food, plural(food))) if food not in ("sushi", "pizza", "cheese") else food
        template = rng.choice(_MADE)
        if template == "{x} house":
            return with_article(f"{food} house")
        return template.format(h=house, x=words)
    noun = rng.choice(OBJECTS[name][1]) if name in OBJECTS else name
    if scale:
        noun = f"{rng.choice(_SCALES[scale])} {noun}"
    elif noun in _UNCOUNTED and rng.random() < 0.4:
        return noun if rng.random() < 0.7 else f"some {noun}"
    if rng.random() < 0.1:
        noun = f"{rng.choice(_ADJECTIVES)} {noun}"
    if rng.random() < 0.03:
        noun = f"{noun} {rng.choice(_ATTRIBUTES)}"
    if rng.random() < 0.12:
        return f"the {noun}"
    if rng.random() < 0.06:
        return noun
    return with_article(noun)


def _place_phrase(background: str, rng: random.Random) -> str | None:
    """Return words for the background, or None: plain ones often go unsaid, so "a dog" alone stays a clear picture."""
    if background in PLACES:
        return rng.choice(PLACE_PHRASES[background])
    if rng.random() < (0.7 if background == "white" else 0.3):
        return None
    return rng.choice((f"on a {background} background", f"on a plain {background} background", f"on {background}"))


_KNOWN = {word for _, phrases in OBJECTS.values() for phrase in phrases for word in phrase.split()}
_KNOWN |= {
    *COLOURS,
    *SHAPES,
    *MATERIALS,
    *(word for phrases in PLACE_PHRASES.values() for p in phrases for word in p.split()),
}


def _with_a_strange_word(text: str, rng: random.Random) -> str:
    """Put a made-up word before or after one of the words, so that unknown words are heard and passed over."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice(("a", "e", "i", "o", "u", "ee", "oo")) for _ in range(3)]
    strange = "".join(syllables[: rng.randint(1, 3)]) + rng.choice(("", "n", "r", "st", "ing", "ed", "ly"))
    if strange in _KNOWN:
        return text
    words = text.split(" ")
    words.insert(rng.randint(0, len(words)), strange)
    return " ".join(words)
