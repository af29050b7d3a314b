"""Reference of the public names of the packages."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping

from tools.reference.markdown import escape, table

PACKAGES: Mapping[str, str] = {
    "dalle_zoo": "the names that most programs need",
    "dalle_zoo.output": "images, scores and settings that a call of the pipeline returns",
    "dalle_zoo.regions": "regions of an image that are generated again",
    "dalle_zoo.sampling": "samples code grids from priors",
    "dalle_zoo.masks": "attention masks and everything derived from them",
    "dalle_zoo.tokenizers": "text tokenizers",
    "dalle_zoo.models": "networks and their registries",
    "dalle_zoo.models.dvae": "configuration of the discrete VAE",
    "dalle_zoo.models.attention": "attention back-ends",
    "dalle_zoo.models.external": "networks of other code bases",
    "dalle_zoo.data": "readers, transforms, code shards and the resumable loader",
    "dalle_zoo.composition": "composed images with captions",
    "dalle_zoo.training": "stages of training, schedules and the optimizer",
    "dalle_zoo.training.strategies": "strategies by name",
    "dalle_zoo.convert": "conversion of weights of other code bases",
    "dalle_zoo.web.api": "the image endpoint of the server",
    "dalle_zoo.web.engine": "the engine that runs requests in batches",
    "dalle_zoo.registry": "registries that other distributions extend",
    "dalle_zoo_eval.datasets": "datasets of the evaluation",
    "dalle_zoo_eval.extractors": "networks that compute features",
    "dalle_zoo_eval.metrics": "metrics of the evaluation",
}
"""Documented modules, and what they contain."""


def api_index() -> str:
    """Returns the page that lists the documented modules with their public names."""
    rows = [(f"[`{name}`](api/{name}.md)", escape(what), f"{len(public(name))}") for name, what in PACKAGES.items()]
    hidden = "\n".join(f"api/{name}" for name in PACKAGES)
    return "\n".join(
        [
            "# Python interface\n",
            "Public names are those in `__all__` of these modules. "
            "[Architecture](../../design/architecture.md) explains how the parts fit together.\n",
            table(("module", "content", "names"), rows),
            f"```{{toctree}}\n:hidden:\n{hidden}\n```\n",
        ]
    )


def public(module: str) -> list[str]:
    """Returns the public names of a module."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [
            n for n, v in vars(loaded).items() if not n.startswith("_") and getattr(v, "__module__", "") == module
        ]
    return sorted(name for name in names if not name.startswith("__"))


def api_pages() -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each page: one for each module, without what an earlier page documents."""
    seen: set[int] = set()
    for name in PACKAGES:
        loaded = importlib.import_module(name)
        fresh = [member for member in public(name) if id(getattr(loaded, member)) not in seen]
        seen |= {id(getattr(loaded, member)) for member in fresh}
        lazy = [member for member in fresh if member not in vars(loaded)]  # autodoc would not find them
        members = ", ".join(member for member in fresh if member not in lazy)
        directives = [f".. automodule:: {name}\n   :members: {members}\n   :show-inheritance:\n"]
        for member in lazy:
            kind = "class" if inspect.isclass(getattr(loaded, member)) else "function"
            more = "   :members:\n   :inherited-members:\n" if kind == "class" else ""
            directives.append(f".. auto{kind}:: {name}.{member}\n{more}")
        yield f"api/{name}", "\n".join([f"# {name}\n", "```{eval-rst}", *directives, "```\n"])
