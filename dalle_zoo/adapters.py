"""LoRA adapters of priors: adds, merges, saves and opens them, by means of the library peft.

A matrix W of shape (out, in) stays as it is. Its adapter is A of shape (rank, in) and B of shape (out, rank), which is
0 at first. The layer computes ``W x + alpha / rank * B A x``.

Reference: LoRA (Hu et al., 2021), arXiv 2106.09685.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_zoo.files import atomic_write, new_folder, read_json, sha256_file, write_json
from dalle_zoo.model_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    MODEL_FILES,
    RECORD,
    ModelFolderError,
    write_checksums,
    write_index,
)
from dalle_zoo.models.image_prior import ImagePrior

NAME = "default"
"""Name of the only adapter of a prior, peft's own default."""
PREFIX = "base_model.model."
"""Begin of the names of tensors in the files of peft."""
BASE = "base_model_name_or_path"
"""Field of the configuration: name or folder of the model that the adapters belong to."""
DIGEST = "base_weights_sha256"
"""Key in the header of the weights: digest of the weights of that model's prior."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which matrices get adapters, and of which size."""

    rank: int = 8
    """Rank of the product of A and B."""
    alpha: float = 16.0
    """Scale of the product, in units of 1 / rank."""
    layers: tuple[str, ...] = ()
    """Parts of names, such as "attention", "mlp" or "layers.3.": a matrix with one of them in its name gets an
    adapter. Defaults to all matrices of all layers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a list in a recipe
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be above 0, got {self.alpha}")

    def chosen(self, prior: nn.Module) -> dict[str, nn.Linear]:
        """Returns the matrices of a prior that get adapters, by name.

        Heads get none: their logits are computed from the weights, in parts, not by calling the module.

        Raises:
            ValueError: No matrix has one of the parts in its name.
        """
        linear = {name: module for name, module in prior.named_modules() if isinstance(module, nn.Linear)}
        inside = {name: module for name, module in linear.items() if "." in name}
        found = {n: m for n, m in inside.items() if not self.layers or any(part in n for part in self.layers)}
        if not found:
            raise ValueError(
                f"lora.layers {list(self.layers)} are in no name of a matrix of {type(prior).__name__}: expected "
                f"parts of names such as {', '.join(list(inside)[-4:])}"
            )
        return found


def add_adapters(prior: ImagePrior, config: LoRAConfig, seed: int = 0) -> None:
    """Adds adapters to a prior, in place; afterwards nothing else needs gradients.

    Args:
        prior: The prior.
        config: Which matrices, and the sizes.
        seed: Seed of the matrices A.

    Raises:
        ImportError: peft is not installed.
        ValueError: The configuration fits no matrix.
    """
    names = list(config.chosen(prior))
    peft = _peft()
    options = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, prior, adapter_name=NAME)


def merged_weights(prior: ImagePrior) -> dict[str, Tensor]:
    """Returns the weights of a prior with its adapters added to the matrices, under the names that they have without.

    Args:
        prior: A prior with adapters, which does not change.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in prior.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor
    for name, layer in _adapted(prior).items():
        delta = layer.get_delta_weight(NAME).detach()
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
    return weights


def save_adapters(prior: ImagePrior, folder: Path, base: str, base_folder: Path) -> None:
    """Writes the adapters alone, in the format of peft, to an existing folder.

    Args:
        prior: A prior with adapters.
        folder: The destination.
        base: Name or folder of the model that they belong to.
        base_folder: Folder of its prior.
    """
    peft = _peft()
    config: Any = prior.peft_config[NAME]  # type: ignore[index]
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json(folder / ADAPTER_CONFIG, {**written, BASE: base})
    tensors = peft.get_peft_model_state_dict(prior, adapter_name=NAME, save_embedding_layers=False)
    stored = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(stored, temporary, metadata={"format": "pt", DIGEST: weights_digest(base_folder)})


def adapter_folder(source: Path, folder: Path, record: Mapping[str, str], *, overwrite: bool = False) -> Path:
    """Writes adapters as a model folder that `DallePipeline.from_pretrained` opens and `dalle-zoo publish` publishes.

    Args:
        source: Folder written by `save_adapters`.
        folder: Folder to write; must be new or empty unless ``overwrite``.
        record: ``description``, ``license`` and ``data``.
        overwrite: Whether to replace an existing model.

    Raises:
        FileError: The source has no adapters.
    """
    base, sizes = adapter_base(source), [tensor.numel() for tensor in load_file(source / ADAPTER_WEIGHTS).values()]
    with new_folder(folder, overwrite=overwrite, marker=INDEX, contents=MODEL_FILES) as new:
        shutil.copytree(source, new / ADAPTER)
        write_index(new)
        write_json(new / RECORD, {**record, "base": base, "parameters": {ADAPTER: sum(sizes)}})
        write_checksums(new)
    return folder


def adapter_base(folder: Path) -> str:
    """Returns the name or folder of the model that adapters belong to.

    Args:
        folder: Folder written by `save_adapters`.

    Raises:
        ModelFolderError: The configuration does not name a model.
    """
    base = read_json(folder / ADAPTER_CONFIG, "a folder of adapters").get(BASE)
    if not isinstance(base, str) or not base:
        raise ModelFolderError(f"{folder / ADAPTER_CONFIG} does not name the model of the adapters in {BASE}")
    return base


@torch.no_grad()
def merge_adapters(prior: ImagePrior, folder: Path, base_folder: Path) -> None:
    """Adds the adapters in a folder to the matrices of a prior, in place.

    peft is not needed for it, as only the sum of the matrices is of interest.

    Args:
        prior: Prior of the model that the adapters belong to.
        folder: Folder written by `save_adapters`.
        base_folder: Folder of the prior.

    Raises:
        ModelFolderError: The adapters were trained on other weights, or do not fit.
    """
    config = read_json(folder / ADAPTER_CONFIG, "a folder of adapters")
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        expected = (file.metadata() or {}).get(DIGEST)
    digest = weights_digest(base_folder)
    if expected not in (None, digest):
        raise ModelFolderError(
            f"{folder} was trained on other weights than those in {base_folder}: expected sha256 {expected}, got "
            f"{digest}; open it with the revision of {config.get(BASE)} that it was trained on"
        )
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    matrices = dict(prior.named_parameters())
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        down, up = tensors.pop(name), tensors.pop(f"{layer}.lora_B.weight", None)
        target = matrices.get(f"{layer.removeprefix(PREFIX)}.weight")
        if up is None or target is None or (len(up), down.shape[1]) != tuple(target.shape):
            raise ModelFolderError(f"{folder / ADAPTER_WEIGHTS} does not fit {type(prior).__name__}: {layer}")
        target.add_((_scale(config) * (up.float() @ down.float())).to(target))
    if tensors:
        raise ModelFolderError(f"{folder / ADAPTER_WEIGHTS} has tensors other than LoRA's: {next(iter(tensors))}")


def weights_digest(folder: Path) -> str:
    """Returns a SHA-256 of all weight files of a network."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def _scale(config: Mapping[str, Any]) -> float:
    """Factor of the product of B and A.

    Raises:
        ModelFolderError: The adapters are of a kind that this library does not open.
    """
    special = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or special:
        kind = special[0] if special else config.get("peft_type")
        raise ModelFolderError(f"only plain LoRA adapters can be opened, got {kind}")
    return float(config["lora_alpha"]) / int(config["r"])


def _adapted(prior: ImagePrior) -> dict[str, Any]:
    """Returns peft's layers of a prior, by name."""
    return {name: module for name, module in prior.named_modules() if hasattr(module, "base_layer")}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("model.tune lora needs peft: pip install dalle-zoo[lora]") from error
    return peft
