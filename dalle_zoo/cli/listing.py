"""``dalle-zoo list | recipes | models | masks``: list what is available, without importing torch unless they plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.outputs import check_file
from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.registered import SOURCES, members


def list_(arguments: list[str]) -> None:
    """Lists the members of a registry, or the registries."""
    p = parser(
        "list",
        "List the names that recipes, protocols and commands accept.\n\n"
        + "\n".join(f"  dalle-zoo list {name:<12}{text}" for name, text in _kinds().items()),
    )
    p.add_argument("what", nargs="?", choices=sorted(_kinds()), metavar="WHAT", help="what to list [what there is]")
    options = p.parse_args(arguments)
    if options.what is None:
        _print_table(_kinds())
    elif options.what == "recipes":
        _print_table(_recipes())
    else:
        _print_table(members(options.what))


def _kinds() -> dict[str, str]:
    return {"recipes": "recipes: dalle-zoo fit RECIPE", **{name: source.what for name, source in SOURCES.items()}}


def _print_table(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows)) + 2
    for name, text in rows.items():
        print(f"{name:<{width}}{text}")


def _recipes() -> dict[str, str]:
    """Names of the recipes with the first lines of their headers."""
    from dalle_zoo.recipes import list_recipes, recipe_header

    return {name: recipe_header(name).splitlines()[0] for name in list_recipes()}


def recipes(arguments: list[str]) -> None:
    """Lists recipes with the first line of their headers, or prints one recipe."""
    from dalle_zoo.recipes import find_recipe

    p = parser("recipes", "List the recipes, or print one.")
    p.add_argument("recipe", nargs="?", help="name of a recipe to print")
    options = p.parse_args(arguments)
    if options.recipe:
        print(find_recipe(options.recipe).read_text(encoding="utf-8"))
        return
    _print_table(_recipes())


def models(arguments: list[str]) -> None:
    """Lists the bundled models."""
    from dalle_zoo.zoo import list_models

    parser("models", "List the models available by name.").parse_args(arguments)
    for record in list_models():
        size = record.num_bytes / 1e6
        millions = ", ".join(f"{part} {count / 1e6:.1f}M" for part, count in record.parameters.items())
        print(f"{record.name}  {record.description}\n  {millions} parameters, {size:.0f} MB, {record.license}")
        print(f"  trained on {record.data}")
        for figure in record.figures:
            print(f"  {figure.label}: {figure.value:.4g} ({', '.join(filter(None, [figure.protocol, figure.split]))})")


def masks(arguments: list[str]) -> None:
    """Lists the attention masks, or plots them."""
    from dalle_zoo.masks import MASKS, MaskSpec, TextImageLayout

    p = parser(
        "masks",
        "List or plot the attention masks.\n\n"
        "  dalle-zoo masks --plot                             all masks, with 16 text and 16 x 16 image positions\n"
        '  dalle-zoo masks row "conv(kernel=3)" --plot --text 6 --height 4 --width 4',
    )
    p.add_argument("mask", nargs="*", help="masks, with options in parentheses [all]")
    p.add_argument("--plot", action="store_true", help="write a plot instead of a list")
    p.add_argument("--text", type=int, help="text positions of the plot [16]")
    p.add_argument("--height", type=int, help="rows of its code grid [16]")
    p.add_argument("--width", type=int, help="columns of its code grid [16]")
    p.add_argument("--out", type=Path, help="PNG, PDF or SVG file to write [masks.png]")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = p.parse_args(arguments)
    specs = options.mask or [name for name, _ in MASKS.loadable()]
    sizes = {"text": 16, "height": 16, "width": 16}
    layout = TextImageLayout(*(getattr(options, name) or default for name, default in sizes.items()))
    if not options.plot:
        given = [f"--{name}" for name in (*sizes, "out", "overwrite") if getattr(options, name) not in (None, False)]
        if given:
            raise UserError(f"{', '.join(given)}: only for a plot, add --plot")
        for spec in map(MaskSpec.parse, specs):
            spec.build(layout)  # raises for an invalid option
            print(f"{spec!s:<24}{(MASKS[spec.name].__doc__ or '').strip().splitlines()[0]}")
        return
    out = options.out or Path("masks.png")
    check_file("--out", out, overwrite=options.overwrite)
    from dalle_zoo.masks import plot_masks

    plot_masks(specs, layout, out)
    print(out.resolve())
