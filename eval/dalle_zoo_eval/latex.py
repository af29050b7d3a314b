"""Documents as LaTeX, to be read by a paper with the packages array, booktabs and graphicx."""

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
_SIGNS = re.compile("|".join(map(re.escape, _ESCAPED)) + "|-(?=-)")  # two hyphens would become a dash
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
"""Characters that LaTeX does not read."""
_LEVELS = {1: "section", 2: "subsection", 3: "subsubsection"}
_LONG, _LINE, _BETWEEN = 28, 78, 2
"""Characters: of a cell that wraps if it is longer, of a line of text, and between columns."""
_WRAPPED = r">{\raggedright\arraybackslash}p{14em}"
HEAD = r"% \usepackage{array,booktabs,graphicx} and, for other scripts than Latin, LuaLaTeX or XeLaTeX"


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
    line = _SIGNS.sub(lambda found: _ESCAPED.get(found.group(), "-{}"), _CONTROLS.sub("", " ".join(text.split())))
    return f"{{[}}{line[1:]}" if line.startswith("[") else line  # else the option of a preceding \\ or \item


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
    """Returns a table with columns of numbers aligned to the right, and no wider than a line."""
    shown = [number for number, name in enumerate(table.head) if name not in table.on_screen]
    widths = [max(_width(row[number]) for row in [table.head, *table.rows]) for number in shown]
    columns = [_WRAPPED if w > _LONG else "r" if n else "l" for n, w in enumerate(widths)]
    rows = []
    for number, row in enumerate(table.rows):
        cells = [_cell(row[column]) for column in shown]
        rows.append([rf"\textbf{{{cells[0]}}}", *cells[1:]] if number in table.strong else cells)
    lines = [
        rf"\begin{{tabular}}{{{''.join(columns)}}}",
        r"\toprule",
        rf"{' & '.join(escaped(table.head[column]) for column in shown)} \\",
        r"\midrule",
        *(rf"{' & '.join(row)} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if sum(min(width, _LONG) + _BETWEEN for width in widths) > _LINE:
        lines = [r"\resizebox{\linewidth}{!}{%", *lines[:-1], lines[-1] + "}"]
    if table.on_screen:
        lines.append(f"% without the columns {', '.join(sorted(table.on_screen))} of report.html")
    return _float("table", [r"\centering", rf"\caption{{{escaped(heading)}}}", *lines])


def _width(cell: str) -> int:
    """Returns the length of the longest line of a cell."""
    return max(map(len, cell.split("\n")))


def _cell(text: str) -> str:
    """Returns a cell; further lines are small, below the first one."""
    first, *rest = (escaped(line) for line in text.split("\n"))
    if not rest:
        return first.replace(r"\_", r"\_\allowbreak{}") if len(text) > _LONG else first
    small = "".join(rf" \\ {{\scriptsize {line}}}" for line in rest)
    return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{first}{small}\end{{tabular}}"


def _float(kind: str, lines: Sequence[str]) -> str:
    return "\n".join([rf"\begin{{{kind}}}[htbp]", *lines, rf"\end{{{kind}}}"])
