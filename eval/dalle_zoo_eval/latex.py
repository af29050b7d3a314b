"""Documents as LaTeX, to be read by a paper with the packages booktabs and graphicx."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from dalle_zoo_eval.documents import Block, Bullets, Heading, Image, Paragraph, Table

_ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"\dag{}", "‡": r"\ddag{}", "–": "--", "±": r"$\pm$",
    "→": r"$\to$", "∞": r"$\infty$", "×": r"$\times$", "−": "$-$", "…": r"\ldots{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
}  # fmt: skip
_SIGNS = re.compile("|".join(map(re.escape, _ESCAPED)))
_LEVELS = {1: "section", 2: "subsection", 3: "subsubsection"}
HEAD = r"% \usepackage{booktabs,graphicx} and, for other scripts than Latin, LuaLaTeX or XeLaTeX"


def to_latex(blocks: Sequence[Block]) -> str:
    """Returns a document without preamble; its figures are PDF files next to it."""
    parts, heading = [HEAD], ""
    for block in blocks:
        heading = block.text if isinstance(block, Heading) else heading
        parts.append(_latex(block, heading))
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    r"""Returns text on one line with the special characters of LaTeX escaped.

    Example:
        >>> escaped("50 % of a_b")
        '50 \\% of a\\_b'
    """
    return _SIGNS.sub(lambda found: _ESCAPED[found.group()], " ".join(text.split()))


def _latex(block: Block, heading: str) -> str:
    match block:
        case Heading():
            return rf"\{_LEVELS[block.level]}{{{escaped(block.text)}}}"
        case Paragraph():
            return escaped(block.text)
        case Bullets():
            items = "\n".join(rf"\item {escaped(item)}" for item in block.items)
            return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}" if items else ""
        case Table():
            return _table(block, heading)
        case Image():
            name = str(PurePosixPath(block.name).with_suffix(".pdf")) if block.vector else block.name
            figure = rf"\includegraphics[width=\linewidth]{{{name}}}"
            return _float("figure", [r"\centering", figure, rf"\caption{{{escaped(block.text)}}}"])


def _table(table: Table, heading: str) -> str:
    """Returns a table whose columns of numbers are aligned to the right; small text follows in brackets."""
    columns = "".join("l" if number == 0 else "r" for number in range(len(table.head)))
    rows = []
    for number, row in enumerate(table.rows):
        cells = [_cell(cell) for cell in row]
        rows.append([rf"\textbf{{{cells[0]}}}", *cells[1:]] if number in table.strong else cells)
    lines = [
        r"\centering",
        rf"\caption{{{escaped(heading)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rf"{' & '.join(map(escaped, table.head))} \\",
        r"\midrule",
        *(rf"{' & '.join(row)} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return _float("table", lines)


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    return escaped(first) + "".join(rf" {{\footnotesize {escaped(line)}}}" for line in rest)


def _float(kind: str, lines: Sequence[str]) -> str:
    return "\n".join([rf"\begin{{{kind}}}[htbp]", *lines, rf"\end{{{kind}}}"])
