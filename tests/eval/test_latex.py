"""Reports as LaTeX."""

from __future__ import annotations

import re

from dalle_zoo_eval.documents import Bullets, Heading, Image, Paragraph, Table
from dalle_zoo_eval.latex import escaped, to_latex


def test_latex_is_balanced_and_escaped() -> None:
    """Every environment and brace is closed, no cell begins an option, and no text forms a command or a dash."""
    odd = '[a] \\b & 5 % of $x_1^2$ {c} #~ --size "q" \x1b <|>'
    table = Table([odd, "score", "source"], [[odd, f"1.5\n[1, 2]\n{odd}", odd]], on_screen=frozenset({"source"}))
    blocks = [Heading(1, odd), Paragraph(odd), Bullets([odd]), table, Image("x.png", b"", odd, lambda: b"")]
    text = to_latex(blocks)
    opened = re.findall(r"\\(begin|end)\{(\w+)\}", text)
    stack: list[str] = []
    for kind, name in opened:
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    assert [name for kind, name in opened if kind == "begin"].count("tabular") == 2  # one is a cell of two lines
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"(\\\\|\\item)\s*\[", text)
    assert not re.search(r"(?<!\\)[#&%]", "".join(escaped(odd)))
    assert "--size" not in text
    assert "\x1b" not in text
    assert text.count("source") == 1  # in the comment that names the omitted column
