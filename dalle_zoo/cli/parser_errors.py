"""Messages of the parser of recipes in the words of a recipe: no classes of Python, no union types."""

from __future__ import annotations

import re

_KINDS = {
    r"Expected a <class 'int'>": "an integer",
    r"Expected a <class 'float'>": "a number",
    r"Expected a <class 'bool'>": "true or false",
    r"Expected a <class 'str'>": "text",
    r"Expected a <class 'dict'>": "a mapping",
    r"Expected a <class 'list'>": "a list",
    r"Not of type timedelta": "a time such as 00:12:00:00",
    r"Not a valid subclass of (\w+)": r"the class_path of a \1",
    r"Expected a <class 'NoneType'>": "null",
}
"""What jsonargparse expected, and how it is said."""
_INSIDE = re.compile(r"Problem with given class_path '[^']*':\s*(.*?)(?=\n    - |\n  Given value|$)", re.DOTALL)
"""The reason that concerns an argument of a class, among those for all alternatives to a class."""
_NESTED = re.compile(
    r"""^Parser key "([^"]+)":.*Problem with given class_path '[^']*':\s*(.*?)(?=\n\s+- |\n\s+Given value|$)""",
    re.DOTALL,
)
"""The same for an argument that is itself a dataclass or null, such as ``muon``."""
_RAISED = re.compile(r"^Does not validate .*Errors:\n\s+- (.*?)\n\s+- Expected a <class 'NoneType'>", re.DOTALL)
"""What the constructor of an optional class raised, among those for all alternatives to the innermost class."""
MOST_CHARACTERS = 100
"""Length at which a value is truncated."""


def explain(error: Exception) -> str:
    """Returns the message of an error of the parser as a line that names the key, or any other message as it is."""
    text = str(error)
    outer = re.search(r'Parser key "([^"]+)"', text)
    if outer is None:
        raised = _RAISED.search(text)
        return " ".join(raised[1].split()) if raised else text
    prefix = ""
    if inside := _INSIDE.search(text):
        prefix, text = f"{outer[1]}.init_args.", inside[1]
        if nested := _NESTED.search(text):
            prefix, text = f"{prefix}{nested[1]}.", nested[2]
    if missing := re.search(r"the following arguments are required: (.*)", text):
        return f"{prefix}{missing[1]} is missing"
    key, value = re.search(r'Parser key "([^"]+)"', text), re.search(r"(?:Got|Given) value: (.*)", text, re.DOTALL)
    kinds = [match.expand(words) for pattern, words in _KINDS.items() if (match := re.search(pattern, text))]
    if key is None or value is None or not kinds:
        return prefix + " ".join(text.split())
    given = " ".join(value[1].split())
    short = given if len(given) <= MOST_CHARACTERS else f"{given[:MOST_CHARACTERS]}…"
    return f"{prefix}{key[1]} must be {' or '.join(kinds)}, got {short}"
