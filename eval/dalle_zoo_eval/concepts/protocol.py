"""Protocols of kind ``concepts``, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dalle_zoo_eval.protocol import (
    CONCEPTS,
    NetworkRule,
    ProtocolError,
    build,
    check_choice,
    check_integer,
    check_rising,
    check_texts,
    is_number,
    protocol_file,
    read_fields,
    sequence,
)
from dalle_zoo_eval.shipped import DataFileError, mapping

TRAIN = "train"
"""Name of the split that the model was trained on."""
EVALUATOR = "mobilenet"
"""Network that looks for concepts."""
SHARE_OF_CEILING, BITS_SAVED = MEASURES = ("share of the ceiling", "bits saved")
"""What a target may ask for. Concept accuracy of the best candidate over that of real images, at the largest k; bits
per image token that the right captions save over shuffled ones."""


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Captioned images with keys ``<concept>_<style>``."""

    source: str
    """Where they are: shards, a folder, or a bundled split such as ``emoji64:train``."""
    captions: int | None = None
    """Captions that images are generated from, the first of the samples; None takes all."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise ProtocolError(f"source must be a location such as 'emoji64:train', got {self.source!r}")
        if self.captions is not None:
            check_integer("captions", self.captions, 2)  # fewer cannot be shuffled


@dataclass(frozen=True, kw_only=True)
class TargetRule:
    """What the model is to reach."""

    measure: str
    """One of `MEASURES`."""
    split: str
    """Split on which it is measured."""
    required: float
    """Least value that is enough."""

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, MEASURES)
        if not is_number(self.required):
            raise ProtocolError(f"required must be a number, got {self.required!r}")


@dataclass(frozen=True, kw_only=True)
class ConceptProtocol:
    """Everything besides the model that fixes the numbers; repeated in the result file.

    Raises:
        ProtocolError: A field has a value that is not allowed, or two fields do not go together.
    """

    name: str
    """Lower-case letters, digits and hyphens."""
    title: str
    """One line for people."""
    splits: dict[str, SplitRule]
    """What is measured, by name."""
    kind: str = CONCEPTS
    """By which result files are told apart."""
    seed: int = 0
    """Seed of the sampled samples, of the shuffled captions and of the sampling noise."""
    samples: int | None = None
    """Samples of a split at most, sampled by seed; None takes all."""
    candidates: int = 16
    """Images generated from prompts."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample among the most likely tokens that reach this probability."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""
    chunk: int = 8
    """Captions that are sampled and stored together. A killed run repeats at most one chunk; part of the seeds."""
    ks: tuple[int, ...] = (1, 5)
    """Neighbors among which concept accuracy looks."""
    networks: dict[str, NetworkRule] = field(default_factory=dict)
    """Weights of the evaluator, `EVALUATOR`; those of one that is not named here are free, and named in the result."""
    targets: tuple[TargetRule, ...] = ()
    """What the model is to reach."""
    notes: tuple[str, ...] = ()
    """Sentences that report and card repeat: what the figures mean."""
    overridden: tuple[str, ...] = ()
    """What a caller gave instead of the file's values, by `changed`; such numbers are not the protocol's."""

    def __post_init__(self) -> None:
        check_texts(self.name, self.title, self.notes)
        check_choice("kind", self.kind, (CONCEPTS,))
        if not self.splits:
            raise ProtocolError("splits is empty: name at least one, with its source")
        check_integer("seed", self.seed, 0)
        if self.samples is not None:
            check_integer("samples", self.samples, 2)  # fewer cannot be shuffled
        for name in ("candidates", "chunk"):
            check_integer(name, getattr(self, name), 1)
        for name in ("temperature", "top_k", "top_p", "guidance"):  # their ranges are the sampler's to check
            value = getattr(self, name)
            if not is_number(value) and not (value is None and name.startswith("top")):
                raise ProtocolError(f"{name} must be a number, got {value!r}")
        if self.guidance < 1:
            raise ProtocolError(f"guidance must be at least 1, which is none, got {self.guidance}")
        for name in self.networks:
            check_choice("networks", name, (EVALUATOR,))
        check_rising("ks", self.ks, 1)
        if not self.ks:
            raise ProtocolError("ks is empty: name at least one number of neighbors")
        for target in self.targets:
            check_choice("targets.split", target.split, self.splits)

    def sampling(self) -> dict[str, Any]:
        """Arguments of the pipeline that change the images of a seed."""
        options = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        return {**options, "guidance_scale": self.guidance}

    def changed(
        self, *, train_captions: int | None = None, val_captions: int | None = None, **values: Any
    ) -> ConceptProtocol:
        """The protocol with what a caller gives instead; None leaves a field as it is.

        Args:
            train_captions: Captions of the split ``train``.
            val_captions: Captions of each other split.
            **values: Fields.
        """
        splits = {}
        for name, rule in self.splits.items():
            captions = train_captions if name == TRAIN else val_captions
            splits[name] = rule if captions is None else replace(rule, captions=captions)
        if train_captions is not None and TRAIN not in splits:
            raise ProtocolError(f"{self.name} has no split {TRAIN!r}, so its captions cannot be counted")
        given = {name: value for name, value in values.items() if value is not None}
        pairs = {name: (getattr(self, name), value) for name, value in given.items()}
        pairs |= {f"captions of {name}": (rule.captions, splits[name].captions) for name, rule in self.splits.items()}
        overridden = [
            f"{name}: {now} instead of {'all' if before is None else before}"
            for name, (before, now) in pairs.items()
            if now != before
        ]
        return replace(self, splits=splits, overridden=(*self.overridden, *overridden), **given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "protocol") -> ConceptProtocol:
        """Builds a protocol from plain data, such as a result file holds.

        Args:
            values: Field to value.
            where: Where they come from, for messages.

        Raises:
            ProtocolError: A field is unknown, missing or wrong.
        """
        values = mapping(values, where)
        try:
            for name, kind in (("splits", SplitRule), ("networks", NetworkRule)):
                if name in values:
                    rules = mapping(values[name], name)
                    values[name] = {key: build(kind, rule, f"{name}.{key}") for key, rule in rules.items()}
            if "targets" in values:
                values["targets"] = [
                    build(TargetRule, target, "targets") for target in sequence("targets", values["targets"])
                ]
            return build(cls, values, "protocol")
        except DataFileError as error:
            raise ProtocolError(f"{where}: {error}") from None


def find_concept_protocol(name: str | Path) -> ConceptProtocol:
    """A protocol of kind ``concepts``: a name from `list_protocols`, or a YAML file of one's own.

    Raises:
        UnknownNameError: Neither; the message has the nearest name.
        ProtocolError: It is there, but cannot be used, or is of another kind.
    """
    path = protocol_file(name)
    kind, values = read_fields(path)
    if kind != CONCEPTS:
        raise ProtocolError(f"{path} is a protocol of kind {kind!r}, expected {CONCEPTS!r}")
    return ConceptProtocol.from_dict(values, str(path))
