"""What all tests share: no network, GPU tests only where there is a GPU, small priors."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dalle_zoo import workspaces

if TYPE_CHECKING:
    from dalle_zoo.models.prior import Prior

# Read by huggingface_hub when it is imported; an unreachable hub costs 23 s of retries.
os.environ["HF_HUB_OFFLINE"] = "1"

# Read by PyTorch when it is imported, here and in processes that tests start: what they compute is too small to share
# among cores, and several processes at once wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore = ["plugin"]  # another distribution: tests/test_plugins.py installs it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where PyTorch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def conversion_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted weights, not the user's."""
    folder = tmp_path_factory.getbasetemp() / "conversions" / os.urandom(8).hex()
    monkeypatch.setenv("DALLE_ZOO_CACHE", str(folder))
    return folder


@pytest.fixture
def cpp_compiler() -> None:
    """Skips a test where PyTorch's compiler finds no C++ compiler, without which it makes nothing for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def random_prior() -> Callable[..., Prior]:
    """Maker of small priors in which every weight counts; a fresh one has heads and biases of zero."""
    import torch

    from dalle_zoo.models.prior import Prior, PriorConfig

    sizes = {"text_length": 4, "text_vocab": 10, "image_height": 3, "image_width": 4, "codebook_size": 7}
    sizes |= {"width": 16, "num_layers": 2, "num_heads": 2}

    def make(seed: int = 0, backend: str = "sdpa", **changes: Any) -> Prior:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            prior = Prior(PriorConfig(**(sizes | changes)), backend).eval()
            for parameter in prior.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return prior

    return make


@pytest.fixture
def killed_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], AbstractContextManager[None]]:
    """Records what a kill at any moment leaves: copies of a folder before each call that changes its entries.

    The copies are ``tmp_path / "killed" / number``. They have the claims of the writer as files, but not locked, as
    after a kill.
    """
    counter, copying = itertools.count(), []

    @contextmanager
    def recording(root: Path) -> Iterator[None]:
        def state() -> None:
            copying.append(True)
            shutil.copytree(root, tmp_path / "killed" / f"{next(counter):03d}", symlinks=True)
            copying.clear()

        def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if not copying:
                    state()
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, recorded(getattr(os, name)))
            patch.setattr(workspaces, "_exchange", recorded(workspaces._exchange))
            yield
        state()

    return recording
