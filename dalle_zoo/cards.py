"""Model cards, rendered entirely from files."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from dalle_zoo.files import atomic_write, escape_surrogates, read_json
from dalle_zoo.model_folder import CHECKSUMS, RECORD, ModelFolderError
from dalle_zoo.model_results import figures, listed_weights, measured_weights
from dalle_zoo.recipes import list_recipes, recipe_header
from dalle_zoo.registry import suggest
from dalle_zoo.results import Result, group_tables, score_tables, target_status
from dalle_zoo.sampling import SamplingOptions

TEMPLATES = Path(__file__).parent / "_cards"
"""Templates, one per protocol, since cards depend on the evaluation."""
GENERAL = "model"
"""Name of the template for all other models."""

HUB_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "mpl-2.0", "artistic-2.0", "unlicense"),
    *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
)
"""Identifiers that the Hub accepts as a license; any other license is "other" with a name."""


def render_card(folder: str | Path, result: Result, name: str | None = None) -> str:
    """Renders the card of a model.

    Args:
        folder: Model folder with ``record.json`` and ``model_index.json``. Its name is that of the model's recipes.
        result: Contents of its result file.
        name: Name of the model. Defaults to the name of the folder.

    Returns:
        Markdown. The same files give the same text.

    Raises:
        FileError: A file of the folder is missing.
        ValueError: There is no template for the protocol of the result.
    """
    folder = Path(folder)
    record, index = read_json(folder / RECORD), read_json(folder / "model_index.json")
    protocol = result["protocol"]
    path = TEMPLATES / f"{protocol['name']}.md"
    if not path.is_file():
        known = [template.stem for template in TEMPLATES.glob("*.md") if template.stem != GENERAL]
        raise ValueError(suggest("card template", str(protocol["name"]), known))
    components = [name for name in index if not name.startswith("_")]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = Template(path.read_text(encoding="utf-8")).substitute(
        name=_name(name or folder.name),
        description=paragraphs(record["description"]),
        license=plain(_license(record)),
        license_id=license_id(record["license"]),
        data=plain(record["data"]),
        components=_components(components, record["parameters"]),
        results=_results(result),
        protocol_name=plain(protocol["name"]),
        samples=plain(max(group["samples"] for group in result["groups"].values())),
        seed=plain(protocol["seed"]),
        candidates=plain(protocol["sampling"]["candidates"]),
        sampling=_sampling(protocol["sampling"]),
        options="".join(f" --{name} {value}" for name, value in _changed(protocol["sampling"]).items()),
        arguments="".join(f", {n.replace('-', '_')}={value}" for n, value in _changed(protocol["sampling"]).items()),
        notes="\n".join(f"- {plain(note)}" for note in protocol["notes"]),
        device=plain(result["device"]),
        versions=plain(versions),
        code_version=plain(result["code_version"]),
        date=plain(result["date"]),
        targets=_targets(result),
        recipes=_recipes(folder.name, components),
    )
    return text.rstrip() + "\n"


def render_any_card(folder: Path, results: Sequence[Result], name: str) -> str:
    """Renders the card of any model: as `render_card` if one result has a template, else a general one.

    Args:
        folder: Model folder.
        results: Contents of its result files. Without results, the card states that nothing was measured.
        name: Name of the model.
    """
    if len(results) == 1 and (TEMPLATES / f"{results[0]['protocol']['name']}.md").is_file():
        return render_card(folder, results[0], name)
    record, index = read_json(folder / RECORD), read_json(folder / "model_index.json")
    text = Template((TEMPLATES / f"{GENERAL}.md").read_text(encoding="utf-8")).substitute(
        name=_name(name),
        description=paragraphs(record["description"]),
        license=plain(_license(record)),
        license_id=license_id(record["license"]),
        data=plain(record["data"]),
        components=_components([part for part in index if not part.startswith("_")], record["parameters"]),
        results=_figures(results),
    )
    return text.rstrip() + "\n"


def license_id(license: str) -> str:
    """Returns the Hub's identifier of a license, or "other".

    Example:
        >>> license_id("Apache-2.0"), license_id("Modified MIT (OpenAI)")
        ('Apache-2.0', 'other')
    """
    return license if license.lower() in HUB_LICENSES else "other"


def _license(record: Mapping[str, Any]) -> str:
    """Returns the license for display."""
    name, note = record.get("license_name") or record["license"], record.get("license_note")
    return f"{name} ({note})" if note else str(name)


def write_card(folder: str | Path, result_file: str | Path, out: str | Path) -> Path:
    """Renders a card from a model folder and a result file into ``out``, atomically.

    Raises:
        ModelFolderError: The result was measured with other weights. Other errors are those of `render_card`.
    """
    folder, out = Path(folder), Path(out)
    result = read_json(Path(result_file))
    check_weights(folder, result)
    text = escape_surrogates(render_card(folder, result))
    with atomic_write(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return out


def check_weights(folder: Path, result: Result) -> None:
    """Raises `ModelFolderError` unless the result was measured with the weights of the folder."""
    current, measured = listed_weights(read_json(folder / CHECKSUMS)), measured_weights(result)
    changed = sorted(n for n in {*current, *measured} if current.get(n) != measured.get(n))
    if changed:
        raise ModelFolderError(
            f"the result file was measured with other weights than those of {folder} "
            f"({', '.join(changed)}): run `dalle-zoo eval` again"
        )


# ---------------------------------------------------------------- parts of a card


def paragraphs(text: object) -> str:
    """Returns a text of several paragraphs for a card, each made harmless by `plain`."""
    return "\n\n".join(plain(part) for part in re.split(r"\n\s*\n", str(text).strip()))


def plain(text: object) -> str:
    r"""Returns a value as one line of Markdown without HTML, links and images. Other marks can do no harm.

    Example:
        >>> plain("<script> [a](javascript:b)")
        '&lt;script&gt; \\[a\\](javascript:b)'
    """
    return re.sub(r"([\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _name(name: str) -> str:
    """Returns a model's name for headings, commands and code: without characters that would end them."""
    return plain(re.sub(r"[`\"$\\]", "_", name))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first row is its head.

    Example:
        >>> print(table([["part", "parameters"], ["dvae", "7"]]))
        | part | parameters |
        |---|---|
        | dvae | 7 |
    """
    lines = ["| " + " | ".join(plain(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _components(names: Sequence[str], parameters: Mapping[str, int]) -> str:
    rows = [[name, f"{parameters[name]:,}" if name in parameters else "–"] for name in names]
    return table([["part", "parameters"], *rows])


def _figures(results: Sequence[Result]) -> str:
    if not results:
        return "Nothing was measured."
    rows = [["metric", "protocol", "group", "value", "settings"]]
    for figure in (figure for result in results for figure in figures(result)):
        settings = ", ".join(f"{key} {value}" for key, value in figure.settings.items())
        rows.append([figure.label, figure.protocol, figure.split or "–", f"{figure.value:.4g}", settings])
    return table(rows)


def _results(result: Result) -> str:
    rows = [["", *result["groups"]], *(row for rows in score_tables(result).values() for row in rows)]
    by_group = [part for title, cells in group_tables(result).items() for part in (f"{title}:", "", table(cells), "")]
    left_out = [f"- Not measured: {plain(line)}." for line in result["left_out"]]
    return "\n".join([*by_group, table(rows), *(["", *left_out] if left_out else [])])


def _changed(sampling: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sampling options that are not the defaults, by their name on the command line."""
    defaults = asdict(SamplingOptions())
    return {n.replace("_", "-"): plain(sampling[n]) for n, value in defaults.items() if sampling[n] != value}


def _sampling(sampling: Mapping[str, Any]) -> str:
    changed = [f"{name} {value}" for name, value in _changed(sampling).items()]
    return f" ({', '.join(changed)})" if changed else " (temperature 1, no truncation, no guidance)"


def _targets(result: Result) -> str:
    if not result["targets"]:
        return ""
    rows = [
        [t["name"], f"{t['required']:.2f}", f"{t['reached']:.2f}", target_status(result, t["met"])]
        for t in result["targets"]
    ]
    return table([["to reach", "at least", "measured", "status"], *rows])


def _recipes(name: str, components: Sequence[str]) -> str:
    """Returns the headers of the recipes named like the model, and of their further steps (``NAME-decoder``)."""
    known = list_recipes()
    recipes = [r for part in components for r in known if r == f"{part}/{name}" or r.startswith(f"{part}/{name}-")]
    blocks = [f"`{recipe}`\n```\n{recipe_header(recipe)}\n```" for recipe in recipes]
    return "\n\n".join(blocks)
