"""Repairs the compared packages at run time, where they no longer import or do not do what they say.

Their code is not copied: modules that cannot be installed become placeholders, and functions are wrapped. Each repair
is listed in `REPAIRS`, which the page on speed prints.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

ABSENT = (
    "cv2",
    "emoji",
    "ftfy",
    "omegaconf",
    "pkg_resources",
    "pytorch_lightning.utilities.distributed",
    "pywt",
    "segmentation_models_pytorch",
    "taming",
    "youtokentome",
)
"""Modules for tokenizers, image files and other networks, which no measurement calls."""
REMOVED = {"huggingface_hub": ("cached_download",), "transformers": ("top_k_top_p_filtering",)}
"""Functions that later versions of these packages no longer have, and no measurement calls."""
REPAIRS = {
    "dalle_pytorch": (
        "`taming`, `omegaconf`, `ftfy`, `youtokentome` and `pkg_resources` are placeholders",
        "the cache of `generate_images(use_cache=True)`, which is dropped without guidance, is passed on",
    ),
    "rudalle": (
        "`cv2`, `pywt`, `segmentation_models_pytorch` and `youtokentome` are placeholders",
        "`huggingface_hub.cached_download` and `transformers.top_k_top_p_filtering` are placeholders",
    ),
    "min_dalle": (
        "`emoji` is a placeholder",
        "gradients and the number of threads, which the import changes for the process, are restored",
        "the networks are called without `MinDalle`, which needs the network",
    ),
}
"""Name of a package to what is repaired."""


class Placeholder(ModuleType):
    """A module whose attributes are classes that can be named, but not used."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is a placeholder of benchmarks/peers/repairs.py")

        made = type(name, (), {"__init__": refuse})
        setattr(self, name, made)
        return made


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `ABSENT`; it is asked last, so installed modules are used."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Returns a spec for the names above, and for everything below a placeholder."""
        if name in ABSENT or isinstance(sys.modules.get(name.rpartition(".")[0]), Placeholder):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Returns an empty placeholder."""
        return Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing."""


def import_peer(name: str) -> ModuleType:
    """Imports a compared package and repairs it."""
    if not any(isinstance(finder, Placeholders) for finder in sys.meta_path):
        sys.meta_path.append(Placeholders())
    for module, functions in REMOVED.items():
        present, placeholder = importlib.import_module(module), Placeholder(module)
        for function in functions:
            if not hasattr(present, function):
                setattr(present, function, getattr(placeholder, function))
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        peer = importlib.import_module(name)
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_num_threads(threads)
    if name == "dalle_pytorch":
        pass_cache_on(peer)
    return peer


def pass_cache_on(dalle_pytorch: ModuleType) -> None:
    """Makes `DALLE.forward_with_cond_scale` pass its cache to the network without guidance too."""
    guided = dalle_pytorch.DALLE.forward_with_cond_scale

    @functools.wraps(guided)
    def forward(self: Any, *arguments: Any, cond_scale: float = 1, cache: Any = None, **more: Any) -> Any:
        if cond_scale == 1:
            return self(*arguments, cache=cache, **more)
        return guided(self, *arguments, cond_scale=cond_scale, cache=cache, **more)

    dalle_pytorch.DALLE.forward_with_cond_scale = forward
