"""Loads, saves and publishes complete models: image tokenizer, prior, text tokenizer and ranker in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from dalle_zoo.adapters import adapter_base, merge_adapters
from dalle_zoo.files import new_folder, read_json, sha256_file, write_json
from dalle_zoo.hub import Access, check_hub_name, upload
from dalle_zoo.model_folder import (
    ADAPTER,
    CHECKSUMS,
    COMPONENTS,
    CONVERSION,
    INDEX,
    MODEL_FILES,
    RECORD,
    SAMPLING,
    ModelFolderError,
    config_from_dict,
    verify_checksums,
    write_checksums,
    write_index,
)
from dalle_zoo.models import IMAGE_TOKENIZERS, PRIORS, ImagePrior, ImageTokenizer
from dalle_zoo.models.quantization import Bits, check_quantization, is_quantized
from dalle_zoo.models.quantization import quantize as quantize_weights
from dalle_zoo.models.ranker import Ranker
from dalle_zoo.networks import load_image_tokenizer, load_prior, save_network
from dalle_zoo.paths import user_path
from dalle_zoo.publish import prepare
from dalle_zoo.ranker_folder import load_ranker, save_ranker
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.sampling import SamplingDefaults
from dalle_zoo.tokenizers import TextTokenizer, load_text_tokenizer
from dalle_zoo.values import as_integer, check_type, suggests_arguments
from dalle_zoo.weights import SHARD_BYTES
from dalle_zoo.zoo import find_component, find_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a prior can compute in, and what its weights can be stored in."""


class PretrainedModel:
    """The components of a text-to-image model, and the folder they are stored in.

    Args:
        image_tokenizer: Encodes images to codes and decodes codes to images.
        prior: Predicts codes from captions.
        tokenizer: Encodes captions to ids.
        ranker: Scores images against captions; needed only for ``rerank``. Defaults to the ranker in ``folder``.
        folder: Folder that the model was loaded from. Defaults to none.
        location: Name, folder or repository that it was loaded by. Defaults to the folder.
        quantized: Bits that the prior's matrices were rounded to. Defaults to not rounded.
        sampling: How it is sampled where a call does not say. Defaults to plain sampling.

    Raises:
        ValueError: The components were not trained together, or the image tokenizer has no decoder.
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        prior: ImagePrior,
        tokenizer: TextTokenizer,
        ranker: Ranker | None = None,
        folder: Path | None = None,
        location: str | None = None,
        quantized: Bits | None = None,
        sampling: SamplingDefaults | None = None,
    ) -> None:
        check_type("image_tokenizer", image_tokenizer, ImageTokenizer, "an ImageTokenizer")
        check_type("prior", prior, ImagePrior, "an ImagePrior")
        check_type("tokenizer", tokenizer, TextTokenizer, "a TextTokenizer")
        check_type("sampling", sampling, (SamplingDefaults, type(None)), "SamplingDefaults")
        self.image_tokenizer, self.prior, self.tokenizer = image_tokenizer.eval(), prior.eval(), tokenizer
        self.folder, self.quantized = folder, quantized
        self.sampling = sampling or SamplingDefaults()
        self._components = folder  # of the model that adapters belong to, if they are loaded
        self.location = location or (str(folder) if folder is not None else "not saved")
        self._ranker = ranker
        self._check_components()

    def _check_components(self) -> None:
        c, t = self.prior.config, self.image_tokenizer
        if c.codebook_size != t.codebook_size:
            raise ValueError(
                f"the prior has {c.codebook_size} image tokens, the image tokenizer {t.codebook_size} codes: "
                "they were not trained together"
            )
        if not t.decodes:
            raise ValueError(
                f"the image tokenizer ({type(t).__name__}) has no decoder, so no image can be generated: "
                "convert it again with its decoder, see docs/generate/external.md"
            )
        self.prior.check_tokenizer(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.prior.device

    @property
    def prior_dtype(self) -> torch.dtype:
        """Precision that the prior computes in."""
        return next(p.dtype for p in self.prior.parameters() if p.is_floating_point())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        c, factor = self.prior.config, self.image_tokenizer.factor
        return c.image_height * factor, c.image_width * factor

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the model's list of checksums, which identifies its files; None if it was not loaded."""
        path = None if self.folder is None else self.folder / CHECKSUMS
        return sha256_file(path) if path is not None and path.is_file() else None

    @cached_property
    def ranker(self) -> Ranker | None:
        """The ranker, loaded on first use because it imports transformers; None if the model has none."""
        if self._ranker is not None:
            return self._ranker.to(self.device)
        if self._components is None or not (self._components / "ranker").is_dir():
            return None
        return load_ranker(self._components / "ranker").to(self.device)

    @classmethod
    @suggests_arguments
    def from_pretrained(
        cls,
        model: str | Path | Sequence[str | Path],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        files: Sequence[str] = (),
        verify: bool = True,
        quantize: Bits | None = None,
    ) -> Self:
        """Loads a model.

        Args:
            model: Name of a bundled model, a folder written by `save_pretrained` or ``dalle-zoo export``, or
                ``organization/name`` on the Hub; `find_model` states the order. A folder of adapters is opened on top
                of the model that it names. Weights of another code base (docs/generate/external.md) are converted when
                they are first loaded; if their files are in several places, pass a list of all places.
            device: Device of the networks. Defaults to the CPU.
            dtype: Precision of the prior. Defaults to float32.
            revision: Branch, tag or commit of a model on the Hub. Defaults to the newest commit of the main branch.
            token: Access token of a user who may read the model. Defaults to the stored token.
            cache_dir: Directory of downloads. Defaults to the Hub's own cache.
            local_files_only: Whether to use only cached files. Defaults to False.
            files: For another code base, patterns of the file names to read ("*_mini.pt"). Defaults to all files.
            verify: Whether to check every file against its sha256. Defaults to True.
            quantize: "int8" or "int4", precision of the matrices in the prior's layers, see
                `dalle_zoo.models.quantization`. Defaults to no quantization.

        Raises:
            UnknownNameError: There is no such model; the message suggests the most similar name.
            HubError: The Hub does not have the model, or cannot be reached; the message says which.
            FileError: A file is missing, damaged, or does not fit.
            WeightFileError: Weights of another code base are damaged, or incomplete.
        """
        _check_dtype(dtype)
        _check_device(device)
        if quantize is not None:
            check_quantization(quantize)
        access = Access(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        folder = find_model(model, access, files)
        if not (folder / INDEX).is_file():
            raise ModelFolderError(_incomplete(folder))
        has_adapter, components = (folder / ADAPTER).is_dir(), folder
        if verify:
            verify_checksums(folder)
        if has_adapter:
            components = find_model(adapter_base(folder / ADAPTER), replace(access, revision=None))
            if verify:
                verify_checksums(components)
        prior = load_prior(components / "prior", device, dtype)
        if has_adapter:
            merge_adapters(prior, folder / ADAPTER, components / "prior")
        if quantize is not None:
            quantize_weights(prior, quantize)
        image_tokenizer = load_image_tokenizer(components / "dvae", device)
        tokenizer = load_text_tokenizer(components / "tokenizer")
        name = str(model) if isinstance(model, str | Path) else " ".join(map(str, model))
        sampling = _read_sampling(components / SAMPLING)
        loaded = cls(
            image_tokenizer, prior, tokenizer, folder=folder, location=name, quantized=quantize, sampling=sampling
        )
        loaded._components = components
        return loaded

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks.

        Args:
            device: New device of all networks. Defaults to their present one.
            dtype: New precision of the prior; its logits are sampled in float32 regardless. Defaults to the present
                one.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"device must be the name of a device, got {device}: pass dtype={device}")
        _check_dtype(dtype)
        _check_device(device)
        self.image_tokenizer.to(device=device)
        self.prior.to(device=device, dtype=dtype)
        if "ranker" in self.__dict__ and self.ranker is not None:
            self.ranker.to(device=device)
        return self

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        record: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ) -> Path:
        """Writes a folder that `from_pretrained` loads; the folder appears atomically.

        Args:
            folder: Folder to write; must be new or empty unless ``overwrite``.
            dtype: Stored precision of the prior's weights. Defaults to their present one.
            record: What `list_models` shows: ``description``, ``license`` and ``data``. Defaults to the record of the
                folder that the model was loaded from.
            shard_bytes: Weights of the prior larger than this are split into shards, bytes. Defaults to 5 GB.
            overwrite: Whether to replace an existing model; a folder with other files is never replaced.

        Raises:
            FileExistsError: The folder exists and is not empty.
            ValueError: The prior is quantized.
        """
        _check_dtype(dtype)
        if record is not None:
            check_type("record", record, Mapping, "a mapping with description, license and data")
        shard_bytes = as_integer("shard_bytes", shard_bytes, least=1)
        if is_quantized(self.prior):
            raise ValueError("weights that were rounded to fewer bits are not saved: save the model as it was loaded")
        ranker, known = self.ranker, self._record()  # before the folder may be replaced
        folder = user_path(folder, "folder")
        with new_folder(folder, overwrite=overwrite, marker=INDEX, contents=MODEL_FILES) as new:
            for name in COMPONENTS[: 4 if ranker is not None else 3]:
                (new / name).mkdir()
            # Always in full precision: a code is an argmax and must equal the code used in training.
            tokenizer_type = IMAGE_TOKENIZERS.name_of(type(self.image_tokenizer))
            save_network(self.image_tokenizer, tokenizer_type, new / "dvae")
            prior_type = PRIORS.name_of(type(self.prior))
            save_network(self.prior, prior_type, new / "prior", dtype, shard_bytes=shard_bytes)
            self.tokenizer.save(new / "tokenizer")
            if ranker is not None:
                save_ranker(ranker, new / "ranker")
            write_index(new)
            if self.sampling != SamplingDefaults():
                write_json(new / SAMPLING, asdict(self.sampling))
            write_json(new / RECORD, {**known, **(record or {}), "parameters": self.num_parameters()})
            write_checksums(new)
        return folder

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        results: Sequence[str | Path] = (),
        record: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Publishes the model on the Hub as one commit, with a card rendered from its record and result files.

        Args:
            name: ``organization/name``; the repository is created if it does not exist.
            private: Whether only its owners can read a new repository. Defaults to False.
            revision: Branch to commit to. Defaults to the main branch.
            token: Access token of a user who may write. Defaults to the stored token.
            results: Result files of ``dalle-zoo eval`` for these weights.
            record: As for `save_pretrained`; must state the license and the data.
            dtype: Stored precision of the prior's weights. Defaults to their present one.

        Returns:
            URL of the commit.

        Raises:
            HubError: The Hub rejects the commit, or cannot be reached; the repository is unchanged.
            ValueError: The record is incomplete, or a result belongs to other weights.
        """
        check_hub_name(name)
        with TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / name.rpartition("/")[2], dtype=dtype, record=record)
            files = prepare(saved, name, results=results).files
            return upload(name, files, private=private, revision=revision, token=token)

    def _record(self) -> dict[str, Any]:
        path = self.folder / RECORD if self.folder is not None else None
        if path is not None and path.is_file():
            return read_json(path)
        return {"description": "", "license": "unknown", "data": "unknown"}

    def num_parameters(self) -> dict[str, int]:
        """Number of parameters of every network."""
        nets = {"dvae": self.image_tokenizer, "prior": self.prior, "ranker": self.ranker}
        return {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items() if net is not None}


def _read_sampling(path: Path) -> SamplingDefaults:
    """Reads how a model is sampled where a call does not say; plainly if there is no such file."""
    if not path.exists():
        return SamplingDefaults()
    defaults: SamplingDefaults = config_from_dict(SamplingDefaults, read_json(path), str(path))
    return defaults


def _check_dtype(dtype: object) -> None:
    """Raises `TypeError` unless a prior can compute in a precision, or none is given."""
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise TypeError(f"dtype must be one of {known}, or None, got {dtype!r}; for 8 or 4 bits pass quantize=")


def _check_device(device: str | torch.device | None) -> None:
    """Raises an error unless a device has a name that PyTorch knows, or none is given."""
    if device is None:
        return
    check_type("device", device, (str, torch.device), "the name of a device, such as cpu or cuda")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be the name of a device, such as cpu or cuda, got {device!r}") from None


def _incomplete(folder: Path) -> str:
    """Error message for a folder that is not a complete model."""
    if not (folder / CONVERSION).is_file():
        return f"{folder} has no {INDEX}: expected a folder from save_pretrained or `dalle-zoo export`"
    missing = [part for part in COMPONENTS[:3] if not (folder / part).is_dir()]
    return (
        f"the weights converted into {folder} lack {' and '.join(missing)}, so no image can be generated: give the "
        "place of their files as well, `dalle-zoo convert PLACE OTHER --out FOLDER` or from_pretrained([place, other])"
    )


def load_component(
    location: str | Path | Sequence[str | Path],
    component: str,
    access: Access,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    files: Sequence[str] = (),
) -> Any:
    """Loads one component of a model; the arguments are those of `dalle_zoo.load_model`."""
    if component not in COMPONENTS:
        raise UnknownNameError(suggest("component", component, COMPONENTS))
    _check_dtype(dtype)
    _check_device(device)
    folder = find_component(location, component, access, files)
    if component == "dvae":
        return load_image_tokenizer(folder, device)
    if component == "prior":
        return load_prior(folder, device, dtype)
    if component == "tokenizer":
        return load_text_tokenizer(folder)
    return load_ranker(folder).to(device)
