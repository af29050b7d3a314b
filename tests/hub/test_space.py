"""A Space of a published model: written through the real client, and started from what was written."""

from __future__ import annotations

import gc
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from huggingface_hub import SpaceCard

from dalle_zoo.cli.main import main
from dalle_zoo.version import __version__
from dalle_zoo.web.engine import Request
from tests.hub.conftest import TOKEN
from tests.web.conftest import GRADIO_WARNINGS

# The client's own way of sending a file, which its HTTP library would have otherwise.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    *map(pytest.mark.filterwarnings, GRADIO_WARNINGS),
]


def publish(model_folder: Path, *options: str) -> int:
    return main(["publish", str(model_folder), "org/toy", "--space", "org/page", *options])


@pytest.fixture
def space(local_hub: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Files of a Space that was published with its model."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish(model_folder) == 0
    files: dict[str, bytes] = local_hub.files("spaces/org/page")
    return files


def test_the_app_of_a_space_starts(
    local_hub: Any, space: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "app.py").write_bytes(space["app.py"])
    app = runpy.run_path(str(tmp_path / "app.py"))
    try:
        assert isinstance(app["demo"], gr.Blocks)
        answer = app["engine"].submit(Request(prompt="ab", seeds=(1,))).future.result(60)
        assert answer.images.shape == (1, 3, 12, 16)
        commit = local_hub.repositories["org/toy"].branches["main"]
        assert f'"org/toy", revision="{commit}"' in space["app.py"].decode()
    finally:
        app["engine"].close()
        app.clear()
        gc.collect()  # what gradio leaves behind, before other tests run


def test_a_space_states_what_it_needs(space: dict[str, bytes]) -> None:
    assert set(space) == {".gitattributes", "README.md", "app.py", "requirements.txt", "sha256.json"}
    assert space["requirements.txt"].decode() == f"dalle-zoo[web]=={__version__}\n"
    data: Any = SpaceCard(space["README.md"].decode()).data
    assert (data.sdk, data.sdk_version, data.app_file) == ("gradio", version("gradio"), "app.py")
    assert (data.models, data.license, data.title) == (["org/toy"], "apache-2.0", "page")


def test_a_space_of_others_is_not_touched(
    local_hub: Any, space: dict[str, bytes], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = local_hub.repositories["spaces/org/page"]
    assert publish(model_folder) == 0
    assert len(repository.commits) == 2, "nothing changed"
    mine = space | {"README.md": space["README.md"] + b"Thanks!\n"}
    commit = repository.commit({path: local_hub.store(data) for path, data in mine.items()}, "main")
    assert publish(model_folder) == 2
    assert "README.md of org/page was written or edited on the Hub" in capsys.readouterr().err
    other = {"app.py": local_hub.store(b"print()"), "README.md": local_hub.store(b"---\nsdk: gradio\n---\n")}
    commit = repository.commit(other, "main")
    assert publish(model_folder) == 2
    assert "org/page contains files that are not a space of dalle-zoo" in capsys.readouterr().err
    assert repository.branches["main"] == commit


def test_a_dry_run_shows_the_space(local_hub: Any, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(model_folder, "--dry-run", "--revision", "v1") == 0
    shown = capsys.readouterr().out
    assert "  app.py\n" in shown
    assert "at revision\n`v1`" in shown
    assert main(["publish", str(model_folder), "org/toy", "--space", "page"]) == 2
    assert "'page' is not a name on the Hub: --space expects organization/name" in capsys.readouterr().err
    assert local_hub.requests == []
