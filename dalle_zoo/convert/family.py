"""Base classes of the families of external weights, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from dalle_zoo.convert.lazy import write_network
from dalle_zoo.convert.location import Location
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import Checkpoint, Tensors
from dalle_zoo.model_folder import config_from_dict
from dalle_zoo.models.image_prior import PRIORS
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS
from dalle_zoo.registry import Registry
from dalle_zoo.tokenizers import TextTokenizer
from dalle_zoo.weights import Lazy

UNKNOWN = "unknown"
"""License and training data of weights that anyone may have trained."""
LICENSE_OF_CHECKPOINT = "that of the checkpoint"
"""Note on a license that is unknown."""
NOUNS = {"dvae": "image tokenizer"}
"""Names of parts in messages, where they differ from the key."""


@dataclass(frozen=True)
class Source:
    """Recognized weights, ready to be converted.

    Example:
        >>> import tempfile
        >>> from dalle_zoo.convert import find
        >>> from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE, DallePytorchVAEConfig
        >>> vae = DallePytorchVAE(DallePytorchVAEConfig(width=4, code_channels=4, codebook_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weights": vae.state_dict()}, Path(folder, "vae.pt"))
        ...     source = find(folder)
        >>> source.family, [path.name for path in source.weight_files()]
        ('dalle_pytorch_vae', ['vae.pt'])
        >>> source.parts["dvae"]["codebook.weight"].shape, source.notes["image_size"]
        ((16, 4), 'assumed, as no hyper-parameters were found')
    """

    family: str
    """Name in `FAMILIES`."""
    location: str
    """Path of the weights, for messages."""
    parts: Mapping[str, Tensors]
    """State dicts by part ("prior", "encoder"), without prefixes; the tensors are still on disk."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Inferred architecture: fields of the config of the native network."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Origin of the fields that do not follow from the tensors, for the record."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Vocabularies and other files that the conversion reads, by their use."""
    image_tokenizer: Source | None = None
    """The image tokenizer at the same location, if this is a prior."""
    unused_files: Mapping[str, str] = field(default_factory=dict)
    """Contents of the weight files at the same location that the conversion does not use, by file name."""

    def weight_files(self) -> set[Path]:
        """Returns the files that tensors are read from."""
        own = {tensor.storage.path for part in self.parts.values() for tensor in part.values()}
        return own | (self.image_tokenizer.weight_files() if self.image_tokenizer is not None else set())


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Record of a conversion, as plain data for ``record.json``."""

    description: str
    """One sentence."""
    license: str = UNKNOWN
    """SPDX identifier of the license of the weights, "other" if it has none, or "unknown"."""
    license_name: str = ""
    """Usual name of the license if `license` is "other"."""
    license_note: str = ""
    """Remark on the license."""
    license_text: str = ""
    """Text of the license if it must be distributed with the weights."""
    data: str = UNKNOWN
    """Training data."""
    inferred: Mapping[str, Any]
    """Architecture: "type", and the fields of the native config."""
    notes: Mapping[str, str]
    """Origin of the fields that do not follow from the tensors."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of tensors that were left out, by kind."""
    parameters: Mapping[str, int]
    """Number of parameters of each component."""


@dataclass(frozen=True)
class Found:
    """Weights of one model, before its architecture is known."""

    location: Location
    checkpoints: Mapping[str, Checkpoint]
    """File of each part."""
    parts: Mapping[str, Tensors]
    """State dict of each part, as `Family.parts` yields it."""
    image_tokenizer: Source | None = None
    """The image tokenizer at the same location, if this is a prior."""


@dataclass(frozen=True)
class Architecture:
    """What a family infers about the weights it found; the fields are those of `Source`."""

    config: Mapping[str, Any]
    notes: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


class Family(ABC):
    """Weights of one external code base.

    Subclass `PriorFamily` or `ImageTokenizerFamily`, register the class in `FAMILIES`, and state only what is
    particular to the code base: `parts`, `infer` and, if tensor names differ, `translate`.

    Args:
        name: Name in `FAMILIES`.

    Example:
        >>> from dalle_zoo.convert import FAMILIES
        >>> [FAMILIES[name].component for name in ("mindalle", "openai_dvae")]
        ['prior', 'dvae']
    """

    title: ClassVar[str]
    """Name in messages, such as "OpenAI's discrete VAE"."""
    expects: ClassVar[str]
    """Files, and tensors they are recognized by; shown when nothing is recognized."""
    component: ClassVar[Literal["prior", "dvae"]]
    """Folder that the network is written to."""
    registry: ClassVar[Registry[Any]]
    """Registry of the native network."""
    network: ClassVar[type[Any]]
    """Class of the native network."""
    required: ClassVar[tuple[str, ...]] = ()
    """Parts that a model cannot lack, if they are in separate files."""
    license: ClassVar[str] = UNKNOWN
    license_name: ClassVar[str] = ""
    license_note: ClassVar[str] = LICENSE_OF_CHECKPOINT
    license_text: ClassVar[str] = ""
    data: ClassVar[str] = UNKNOWN

    def __init__(self, name: str) -> None:
        self.name = name

    # ------------------------------------------------------------ particular to each family

    @abstractmethod
    def parts(self, checkpoint: Checkpoint) -> Iterable[tuple[str, Tensors]]:
        """Yields the name and the tensors of each part of this family in a file, recognized by names and shapes.

        A network in a single file has one part, which is named as `component`.
        """

    @abstractmethod
    def infer(self, found: Found) -> Architecture:
        """Infers the architecture from tensors, and from configurations and vocabularies at the same location.

        Raises:
            ValueError: The weights are incomplete or of an unsupported kind. The message does not name their file.
        """

    @abstractmethod
    def describe(self, config: Any) -> str:
        """Returns one sentence about a converted network, for the record."""

    def network_class(self, source: Source) -> type[Any]:
        """Returns the class of the native network. Defaults to `network`."""
        return self.network

    def translate(self, source: Source, config: Any) -> Mapping[str, Lazy]:
        """Returns the tensors under native names. Defaults to the tensors as they are.

        Raises:
            WeightFileError: A tensor is missing or unexpected.
        """
        return source.parts[self.component]

    def unused(self, source: Source) -> dict[str, int]:
        """Returns the number of tensors that are left out, by kind. Defaults to none."""
        return {}

    def text_tokenizer(self, source: Source) -> TextTokenizer | None:
        """Returns the text tokenizer of a prior; None if its vocabulary is missing. Defaults to None.

        Raises:
            WeightFileError: A vocabulary is damaged.
        """
        return None

    # ------------------------------------------------------------ common to all families

    def recognize(self, location: Location) -> Source | None:
        """Returns the weights of this family at a location; None if there are none.

        Raises:
            WeightFileError: There are several models, a part is missing, or the weights cannot be converted.
        """
        found: dict[str, list[tuple[Checkpoint, Tensors]]] = {}
        for checkpoint in location.checkpoints:
            for role, tensors in self.parts(checkpoint):
                found.setdefault(role, []).append((checkpoint, tensors))
        if not found:
            return None
        for role, several in found.items():
            location.check_single([c.path for c, _ in several], f"{NOUNS.get(role, role)}s of {self.title}")
        checkpoints = {role: checkpoint for role, ((checkpoint, _),) in found.items()}
        self._check_complete(location, checkpoints)
        files = " and ".join(dict.fromkeys(str(checkpoint.path) for checkpoint in checkpoints.values()))
        parts = {role: tensors for role, ((_, tensors),) in found.items()}
        image_tokenizer = self._image_tokenizer(location, checkpoints.values())
        try:
            architecture = self.infer(Found(location, checkpoints, parts, image_tokenizer))
            source = Source(self.name, location.path, parts, **vars(architecture), image_tokenizer=image_tokenizer)
            config = config_from_dict(self.network_class(source).config_class, dict(source.config), "its architecture")
        except (ValueError, TypeError) as error:  # a hyper-parameter may be of any type
            raise WeightFileError(f"{files} cannot be converted: {error}") from None
        return replace(source, config=asdict(config))

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes the network, and the text tokenizer of a prior, into the existing folder ``out``.

        Raises:
            WeightFileError: A tensor is missing, has another shape, or is damaged; or the vocabulary does not fit.
        """
        network = self.network_class(source)
        config = network.config_class(**source.config)
        with torch.device("meta"):
            net = network(config)
        tokenizer = self.text_tokenizer(source)
        if tokenizer is not None:
            try:
                net.check_tokenizer(tokenizer)
            except ValueError as error:
                raise WeightFileError(f"{source.files['vocabulary']} does not belong to the prior: {error}") from None
            tokenizer.save(out / "tokenizer")
        kind = self.registry.name_of(network)
        write_network(out / self.component, kind, net, self.translate(source, config))
        return Conversion(
            description=self.describe(config),
            license=self.license,
            license_name=self.license_name,
            license_note=self.license_note,
            license_text=self.license_text,
            data=self.data,
            inferred={"type": kind, **asdict(config)},
            notes=dict(source.notes),
            unused=self.unused(source),
            parameters={self.component: sum(p.numel() for p in net.parameters())},
        )

    def _check_complete(self, location: Location, checkpoints: Mapping[str, Checkpoint]) -> None:
        missing = [role for role in self.required if role not in checkpoints]
        if missing:
            role, checkpoint = next(iter(checkpoints.items()))
            raise WeightFileError(
                f"{location.path} has the {role} of {self.title} ({checkpoint.path.name}) without the {missing[0]}: "
                "give both files, or the folder that holds both"
            )

    def _image_tokenizer(self, location: Location, own: Collection[Checkpoint]) -> Source | None:
        return None


class PriorFamily(Family):
    """Weights of a prior, which may come with an image tokenizer and a vocabulary."""

    component = "prior"
    registry = PRIORS

    def describe(self, config: Any) -> str:
        """Returns the sizes of a decoder-only transformer."""
        return (
            f"{self.title}: {config.num_layers} layers of width {config.width}, {config.text_length} text tokens, "
            f"{config.image_height} x {config.image_width} codes"
        )

    def _image_tokenizer(self, location: Location, own: Collection[Checkpoint]) -> Source | None:
        """Returns the image tokenizer in the prior's own files, else the one in the other files."""
        files = (tuple(own), tuple(c for c in location.checkpoints if c not in own))
        found = (_single_image_tokenizer(replace(location, checkpoints=checkpoints)) for checkpoints in files)
        return next((source for source in found if source is not None), None)


class ImageTokenizerFamily(Family):
    """Weights of an image tokenizer."""

    component = "dvae"
    registry = IMAGE_TOKENIZERS

    def describe(self, config: Any) -> str:
        """Returns the size of the codebook and the downsampling factor."""
        return f"{self.title} of {config.codebook_size} codes and factor {config.factor}"


FAMILIES: Registry[type[Family]] = Registry("family of weights", group="dalle_zoo.families", base=Family)


def families(component: str | None = None) -> Iterator[Family]:
    """Yields an instance of every registered family, or only of those with a given component."""
    for name, family in FAMILIES.loadable():
        if component in (None, family.component):
            yield family(name)


def _single_image_tokenizer(location: Location) -> Source | None:
    """Returns the image tokenizer at a location; None if there is none, `WeightFileError` if there are several."""
    found = [source for family in families("dvae") if (source := family.recognize(location)) is not None]
    if len(found) > 1:
        several = " and ".join(source.family for source in found)
        raise WeightFileError(
            f"{location.path} holds image tokenizers of {several}: name the files of one with --files or files="
        )
    return found[0] if found else None
