"""Prepares a Space of the Hub: a repository with the web page of a published model."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dalle_zoo.files import json_text
from dalle_zoo.hub import APP, is_hub_name, stamp_card
from dalle_zoo.model_folder import CARD, CHECKSUMS
from dalle_zoo.publish import Publication
from dalle_zoo.version import __version__

REQUIREMENTS = f"dalle-zoo[web]=={__version__}\n"
APP_CODE = '''"""The page of {model}. Written by `dalle-zoo publish --space`; `python {app}` runs it anywhere."""

import torch

from dalle_zoo import DallePipeline
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.generation import Limits
from dalle_zoo.web.page import create_page, page_options

device = "cuda" if torch.cuda.is_available() else "cpu"
engine = Engine(DallePipeline.from_pretrained("{model}", revision="{revision}", device=device))
demo = create_page(engine, Limits())

if __name__ == "__main__":
    demo.launch(**page_options())
'''
CARD_TEXT = """# {title}

Generates images from text with [{model}](https://huggingface.co/{model}), a model of dalle-zoo, at revision
`{revision}`. Written by `dalle-zoo publish --space`.
"""


def prepare_space(name: str, publication: Publication, revision: str) -> Publication:
    """Collects the files of a Space; nothing is uploaded.

    Args:
        name: ``organization/name`` of the Space.
        publication: The model, whose license the Space states.
        revision: Commit or branch of the model that the page loads.

    Raises:
        ValueError: The name is none of the Hub, or gradio is not installed.
    """
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is not a name on the Hub: --space expects organization/name")
    try:
        gradio = version("gradio")
    except PackageNotFoundError:
        raise ValueError("a Space states the version of gradio that it needs: pip install 'dalle-zoo[web]'") from None
    model, title = publication.name, name.rpartition("/")[2]
    files = {
        APP: APP_CODE.format(model=model, revision=revision, app=APP),
        "requirements.txt": REQUIREMENTS,
        CARD: _card(publication, title, gradio, CARD_TEXT.format(title=title, model=model, revision=revision)),
    }
    contents = {path: text.encode() for path, text in files.items()}
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in contents.items() if path != CARD}
    return Publication(name, {**contents, CHECKSUMS: json_text(digests).encode()})


def _card(publication: Publication, title: str, gradio: str, text: str) -> str:
    """Renders the card, whose metadata configures the Space."""
    from huggingface_hub import ModelCard, SpaceCard, SpaceCardData

    model: Any = ModelCard(publication.card).data
    license_name = model.get("license_name")
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=gradio, python_version="3.11", app_file=APP,
        license=model.license, models=[publication.name],
        **({} if license_name is None else {"license_name": license_name}),
    )  # fmt: skip
    return stamp_card(str(SpaceCard(f"---\n{data.to_yaml()}\n---\n{text}")))
