"""English of captions: articles, plurals, and names with another color word."""

from __future__ import annotations

import re

_VOWEL = re.compile(r"(?i:[aeiou](?!nicorn|fo\b|nicycle|niform)|hour)|[FHLMNRSX][A-Z]|8")
_HEAD = re.compile(r"(.+?)( (?:with|of|on|in|at|and|to) .+)?")
_UNCOUNTED = frozenset(
    [
        "bacon",
        "beer",
        "blood",
        "bread",
        "broccoli",
        "cheese",
        "cheers",
        "chocolate",
        "christmas",
        "coffee",
        "corn",
        "DNA",
        "earth",
        "fire",
        "garlic",
        "honey",
        "lightning",
        "luggage",
        "meat",
        "milk",
        "money",
        "poop",
        "popcorn",
        "rain",
        "ramen",
        "rice",
        "saturn",
        "soda",
        "spaghetti",
        "stew",
        "sushi",
        "wine",
        "yarn",
    ]
) | {"chinese takeout", "horse racing", "noodle soup", "planet earth", "santa claus", "statue of liberty"}
_SINGULAR_IN_S = ("ss", "us", "is", "lens")
_IRREGULAR = {"mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth", "sheep": "sheep", "deer": "deer"}
_SAME_IN_PLURAL = ("fish", "shrimp", "squid", "bison", "moose", "salmon", "sheep", "deer")
COLOR_WORDS = frozenset(
    ["red", "orange", "yellow", "green", "blue", "purple", "pink", "gray", "black", "white", "brown"]
)
"""Color words in names, which are replaced when a sprite is recolored."""


def is_plural(name: str) -> bool:
    """Returns whether a name is a plural, such as "grapes" or "paw prints".

    Example:
        >>> is_plural("glasses"), is_plural("cactus"), is_plural("glass of milk")
        (True, False, False)
    """
    last = _split(name)[0].split()[-1].lower()
    return last.endswith("s") and not last.endswith(_SINGULAR_IN_S)


def with_article(name: str) -> str:
    """Adds "a" or "an" if the name needs an article.

    Example:
        >>> with_article("red apple"), with_article("owl"), with_article("grapes"), with_article("honey")
        ('a red apple', 'an owl', 'grapes', 'honey')
    """
    head = _split(name)[0].lower()
    if is_plural(name) or head in _UNCOUNTED or name.lower() in _UNCOUNTED or name in _UNCOUNTED:
        return name
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"


def is_countable(name: str) -> bool:
    """Returns whether things of a name can be counted: whether it takes an article.

    Example:
        >>> is_countable("cat"), is_countable("rice")
        (True, False)
    """
    return with_article(name) != name


def plural(name: str) -> str:
    """Returns the plural of a countable name; only the part before a preposition changes.

    Example:
        >>> plural("cat"), plural("box"), plural("cherry"), plural("cup of coffee"), plural("snowman")
        ('cats', 'boxes', 'cherries', 'cups of coffee', 'snowmen')
    """
    head, rest = _split(name)
    *before, last = head.split()
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith("man") and last not in ("human", "caiman"):
        last = last[:-3] + "men"
    elif last.endswith(_SAME_IN_PLURAL):
        pass
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    elif last in ("leaf", "knife", "wolf", "scarf", "elf"):
        last = re.sub("fe?$", "ves", last)
    elif last in ("tomato", "potato", "mango"):
        last += "es"
    else:
        last += "s"
    return " ".join([*before, last]) + rest


def recolored_name(name: str, color: str) -> str:
    """Returns a name with another color word, which replaces that of the name if there is one.

    Example:
        >>> recolored_name("red apple", "blue"), recolored_name("cat", "purple"), recolored_name("orange", "blue")
        ('blue apple', 'purple cat', 'blue orange')
    """
    words = [word for word in name.split() if word not in COLOR_WORDS] or name.split()
    return " ".join([color, *words])


def _split(name: str) -> tuple[str, str]:
    """Returns the head of a name, and the rest from its first preposition on."""
    match = _HEAD.fullmatch(name)
    assert match is not None
    return match.group(1), match.group(2) or ""
