"""``dalle-zoo publish``: publishes a model folder on the Hub, and a Space with its web page."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.cli.parser import parser


def publish(arguments: list[str]) -> None:
    """Publishes a model as one commit, and a Space for it, or previews the commits."""
    p = parser(
        "publish",
        "Publish a model on the Hub as one commit, with a card rendered from its files. Run the same command again\n"
        "to resume an interrupted upload. Authentication: `hf auth login`, or the variable HF_TOKEN.\n\n"
        "  dalle-zoo publish my-model org/my-model --result eval/my-model.json --dry-run\n"
        "  dalle-zoo publish my-model org/my-model --result eval/my-model.json --run runs/prior/mine --private\n"
        "  dalle-zoo publish my-model org/my-model --space org/my-page",
    )
    p.add_argument("folder", type=Path, help="model folder written by save_pretrained or `dalle-zoo export`")
    p.add_argument("name", metavar="org/name", help="repository on the Hub; created if it does not exist")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument("--revision", help="branch to commit to; created if it does not exist [main]")
    p.add_argument(
        "--result", type=Path, action="append", default=[], help="result file of `dalle-zoo eval`; repeatable"
    )
    p.add_argument("--run", type=Path, action="append", default=[], help="run that trained a component; repeatable")
    p.add_argument("--recipe", action="append", default=[], help="recipe of a component, by name or file; repeatable")
    p.add_argument(
        "--space", metavar="org/name", help="also publish a Space: a web page that generates with the model"
    )
    p.add_argument("--dry-run", action="store_true", help="print files, their sizes and the cards; upload nothing")
    options = p.parse_args(arguments)

    from dalle_zoo.hub import upload
    from dalle_zoo.publish import prepare
    from dalle_zoo.space import prepare_space

    publication = prepare(
        options.folder, options.name, results=options.result, runs=options.run, recipes=options.recipe
    )
    space = options.space and prepare_space(options.space, publication, options.revision or "main")
    if options.dry_run:
        for shown in filter(None, (publication, space)):
            for path, size in shown.sizes().items():
                print(f"{size:>14,}  {path}")
            print(f"{sum(shown.sizes().values()):>14,}  in all\n\n{shown.card}")
        return
    commit = upload(options.name, publication.files, private=options.private, revision=options.revision)
    print(commit)
    if options.space:
        space = prepare_space(options.space, publication, commit.rpartition("/")[2])
        print(upload(options.space, space.files, private=options.private, kind="space"))
