"""``dalle-zoo publish``: a model folder to the Hub."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.cli.main import parser


def publish(arguments: list[str]) -> None:
    """Publishes a model as one commit, or shows what it would hold."""
    p = parser(
        "publish",
        "Publish a model on the Hub, atomically, with a card rendered from its files. The same command goes\n"
        "on where an interrupted one stopped. The token is that of `hf auth login`, or HF_TOKEN.\n\n"
        "  dalle-zoo publish my-model org/my-model --result eval/my-model.json --dry-run\n"
        "  dalle-zoo publish my-model org/my-model --result eval/my-model.json --run runs/prior/mine --private",
    )
    p.add_argument("folder", type=Path, help="model that save_pretrained or `dalle-zoo export` wrote")
    p.add_argument("name", metavar="org/name", help="repository, which is made if it is not there")
    p.add_argument("--private", action="store_true", help="for its owners alone")
    p.add_argument("--revision", help="branch to commit to, made if it is not there (main)")
    p.add_argument(
        "--result", type=Path, action="append", default=[], help="result file of dalle-zoo eval; repeatable"
    )
    p.add_argument("--run", type=Path, action="append", default=[], help="run that made a part; repeatable")
    p.add_argument("--recipe", action="append", default=[], help="recipe of a part, by name or file; repeatable")
    p.add_argument("--dry-run", action="store_true", help="list files and sizes, show the card, send nothing")
    options = p.parse_args(arguments)

    from dalle_zoo.hub import upload
    from dalle_zoo.publish import prepare

    publication = prepare(
        options.folder, options.name, results=options.result, runs=options.run, recipes=options.recipe
    )
    if options.dry_run:
        for path, size in publication.sizes().items():
            print(f"{size:>14,}  {path}")
        print(f"{sum(publication.sizes().values()):>14,}  in all\n\n{publication.card}")
        return
    print(upload(options.name, publication.files, private=options.private, revision=options.revision))
