"""Saves image tokenizers and priors to folders, and loads them by the type that ``config.json`` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_zoo.files import read_json
from dalle_zoo.model_folder import CONFIG, WEIGHTS, ModelFolderError, config_from_dict
from dalle_zoo.models import IMAGE_TOKENIZERS, PRIORS
from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.models.tokenizer import ImageTokenizer
from dalle_zoo.paths import user_path
from dalle_zoo.values import differences
from dalle_zoo.weights import (
    SHARD_BYTES,
    check_numbers,
    load_weights,
    read_headers,
    save_weights,
    without_storage,
)


def save_network(
    net: nn.Module,
    kind: str,
    folder: Path,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the ``config.json`` and the weights of a network to an existing folder.

    Args:
        net: A network with a frozen dataclass in ``net.config``.
        kind: Registered name of the type of network ("dvae", "prior", …).
        folder: The destination.
        dtype: As for `save_weights`.
        weights: Weights to store instead of those of the network, which may be sharded. Defaults to those of the
            network.
        shard_bytes: As for `save_weights`.
    """
    config: Any = net.config
    tensors = net.state_dict() if weights is None else weights
    save_weights(tensors, {"type": kind, **asdict(config)}, folder, dtype, shard_bytes)


def load_image_tokenizer(folder: Path, device: str | torch.device | None = None) -> ImageTokenizer:
    """Loads an image tokenizer of any registered type, in float32 and in evaluation mode.

    Args:
        folder: Folder with ``config.json`` and weights.
        device: Device to load it to. Defaults to the CPU.
    """
    folder = user_path(folder, "folder")
    values = _read_config(folder)
    cls = IMAGE_TOKENIZERS[values.pop("type", "dvae")]
    config = _config(cls, folder, values)
    net: Any = without_storage(lambda: cls(config), read_headers(folder / WEIGHTS))
    load_weights(net, folder / WEIGHTS, device=device)
    on_gpu = device is not None and torch.device(device).type != "cpu"
    layout = torch.channels_last if on_gpu else torch.preserve_format  # on a CPU every call would convert the layout
    tokenizer: ImageTokenizer = net.to(device, memory_format=layout).eval()  # an overload that torch does not declare
    return tokenizer


def load_prior(folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ImagePrior:
    """Loads a prior of any registered type, in evaluation mode.

    Args:
        folder: Folder with ``config.json`` and weights.
        device: Device to load it to. Defaults to the CPU.
        dtype: Dtype to load it in. Defaults to float32.
    """
    folder = user_path(folder, "folder")
    cls, config = read_prior(folder)
    net: ImagePrior = without_storage(lambda: cls(config), read_headers(folder / WEIGHTS))
    load_weights(net, folder / WEIGHTS, device=device, dtype=dtype)
    return net.eval()


@torch.no_grad()
def mean_prior(folders: Sequence[Path], weights: Sequence[float]) -> ImagePrior:
    """Loads the weighted mean of the weights of priors, one after the other.

    The mean of weights before and after further training often does well on what either does well on (Wortsman et al.,
    "Robust fine-tuning of zero-shot models" and "Model soups").

    Args:
        folders: Folders of priors of one type and configuration.
        weights: Weight of each, above 0; they need not add up to 1.

    Raises:
        ModelFolderError: Two priors differ in type or configuration; the message says in what.
    """
    relative = [weight / max(weights) for weight in weights]  # the sum of large weights would be infinite
    shares = [weight / sum(relative) for weight in relative]
    mean = load_prior(folders[0])
    floats = {name: tensor for name, tensor in mean.state_dict().items() if tensor.is_floating_point()}
    sums = {name: tensor.double() * shares[0] for name, tensor in floats.items()}
    for folder, share in zip(folders[1:], shares[1:], strict=True):
        other = load_prior(folder)
        if type(other) is not type(mean):
            raise ModelFolderError(f"{folder} is a {type(other).__name__}, {folders[0]} a {type(mean).__name__}")
        if values := differences(mean.config, other.config):
            raise ModelFolderError(f"{folders[0]} and {folder} differ in {values}: only equal networks have a mean")
        state = other.state_dict()
        for name, total in sums.items():
            total.add_(state[name].double(), alpha=share)
    mean.load_state_dict({name: total.float() for name, total in sums.items()}, strict=False)
    return mean


def read_prior(folder: Path) -> tuple[type[ImagePrior], Any]:
    """Returns type and configuration of the prior in a folder, without loading its weights.

    Raises:
        ModelFolderError: The folder has no prior of a registered type, or its configuration does not fit the weights.
    """
    values = _read_config(folder)
    kind = values.pop("type", None)
    if kind not in PRIORS:
        raise ModelFolderError(f'{folder}/{CONFIG} is not a prior: expected "type": "prior", or {", ".join(PRIORS)}')
    return PRIORS[kind], _config(PRIORS[kind], folder, values)


def _config(cls: type[Any], folder: Path, values: dict[str, Any]) -> Any:
    """Returns the configuration of a network, after it was compared with the headers of the weights."""
    where = str(folder / CONFIG)
    check_numbers(values, read_headers(folder / WEIGHTS), where)
    return config_from_dict(cls.config_class, values, where)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    values = read_json(path, "a folder written by dalle-zoo")
    if not isinstance(values.get("type", ""), str):
        raise ModelFolderError(f"{path}: type must be the name of a network, got {type(values['type']).__name__}")
    return values
