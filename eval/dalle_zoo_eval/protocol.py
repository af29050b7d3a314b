"""Protocols: everything besides the model that determines a score, read from YAML.

The bundled files are in ``eval/protocols``; other files work as well. A protocol has one or more groups of prompts.
The fields of `GroupRule` at the top of a file are the defaults of every group; a file without ``groups`` has one group
named ``all``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.data_files import (
    DataFileError,
    build,
    bundled_folder,
    check_bool,
    check_choice,
    check_choices,
    check_integer,
    check_keys,
    check_rising,
    mapping,
    read_yaml,
    sequence,
)
from dalle_zoo_eval.rules import (
    ExtractorRule,
    GroupRule,
    ImageRule,
    MetricRule,
    ReferenceRecord,
    SamplingRule,
    TargetRule,
)

PUBLISHED = ("coco", "cub")
"""Tables of published scores."""
ALL = "all"
"""Name of the only group of a protocol without ``groups``."""
TRAIN = "train"
"""Name of the group of training data, whose number of captions has an option of its own."""

COPY = 0.95
"""Minimum cosine similarity of a copy: a guess; the best value depends on the extractor."""


class ProtocolError(DataFileError):
    """A protocol cannot be used; the message names the field, the expected value and the given one."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything besides the model that determines a score; repeated in the result file.

    Raises:
        ProtocolError: The value of a field is not allowed, or two fields contradict each other.
    """

    name: str
    """Lower-case letters, digits and hyphens."""
    title: str
    """Title of reports, one line."""
    groups: dict[str, GroupRule]
    """Groups of prompts by name."""
    model: str | None = None
    """Default model."""
    seed: int = 0
    """Seed of the noise, of the chosen samples and of shuffled captions."""
    image: ImageRule = field(default_factory=ImageRule)
    """How real images are cropped and scaled."""
    sampling: SamplingRule = field(default_factory=SamplingRule)
    """How images are generated."""
    blur: tuple[int, ...] = (0,)
    """Radii of the Gaussian blur of real and generated images, pixels, smallest first; 0 is none. Figure 9 has
    0, 1, 2, 4, 8."""
    extractors: dict[str, ExtractorRule] = field(default_factory=dict)
    """Rules of extractors by name. An extractor without a rule is required and may have any weights."""
    published: tuple[str, ...] = ()
    """Tables of published scores, of `PUBLISHED`, to compare with."""
    selfcheck: bool = True
    """Whether the real images are checked before anything is generated."""
    reference: tuple[ReferenceRecord, ...] = ()
    """Statistics with which the self-check compares the real images; empty if none are recorded."""
    targets: tuple[TargetRule, ...] = ()
    """Values that a model should reach."""
    headlines: tuple[dict[str, Any], ...] = ()
    """Selectors of the scores shown in lists of models. Defaults to all scores."""
    notes: tuple[str, ...] = ()
    """Sentences for every report: what scores mean, and where the protocol departs from the paper."""
    overridden: tuple[str, ...] = ()
    """Values changed by the caller with `changed`; their scores are not those of the protocol."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.name):
            raise ProtocolError(f"name must be lower-case letters, digits and hyphens, got {self.name!r}")
        if not isinstance(self.title, str) or not self.title.strip() or "\n" in self.title:
            raise ProtocolError(f"title must be one line of text, got {self.title!r}")
        if not all(isinstance(note, str) for note in self.notes):
            raise ProtocolError(f"notes must be a list of sentences, got {list(self.notes)!r}")
        if not self.groups:
            raise ProtocolError("groups is empty: name at least one, with its dataset")
        check_integer("seed", self.seed, 0)
        check_bool("selfcheck", self.selfcheck)
        check_rising("blur", self.blur, 0)
        if not self.blur or self.blur[0] != 0:
            raise ProtocolError(f"blur must begin with 0, the score without blur, got {list(self.blur)}")
        check_choices("published", self.published, PUBLISHED)
        check_choices("reference", [record.family for record in self.reference], self.families)
        if self.extractors:
            from dalle_zoo_eval.extractors import EXTRACTORS

            for name in self.extractors:
                check_choice("extractors", name, EXTRACTORS)
        for target in self.targets:
            check_choice("targets.group", target.group, self.groups)

    @property
    def metrics(self) -> list[MetricRule]:
        """Metrics of all groups; a rule of several groups appears once."""
        found: list[MetricRule] = []
        for group in self.groups.values():
            found += [rule for rule in group.metrics if rule not in found]
        return found

    @property
    def families(self) -> list[str]:
        """Extractors for which the protocol computes the FID."""
        return list(dict.fromkeys(f for rule in self.metrics if rule.name == "fid" for f in rule.extractor))

    def split(self, group: str, layout: str) -> str:
        """Returns the split to read in a layout.

        Raises:
            UnknownNameError: The protocol does not list this layout.
        """
        dataset = self.groups[group].dataset
        if layout not in dataset:
            raise UnknownNameError(f"{self.name}: {suggest('layout', layout, dataset)}")
        return dataset[layout]

    def changed(
        self,
        *,
        seed: int | None = None,
        captions: int | None = None,
        train_captions: int | None = None,
        val_captions: int | None = None,
        **sampling: Any,
    ) -> Protocol:
        """Returns the protocol with changed values; None leaves a field unchanged.

        Args:
            seed: Seed.
            captions: Number of captions of every group.
            train_captions: Number of captions of the group ``train``.
            val_captions: Number of captions of each other group.
            **sampling: Fields of `SamplingRule`.
        """
        if train_captions is not None and TRAIN not in self.groups:
            raise ProtocolError(f"{self.name} has no group {TRAIN!r}: leave out --train-captions")
        given = {name: value for name, value in sampling.items() if value is not None}
        given = {name: getattr(replace(self.sampling, **given), name) for name in given}  # plain numbers
        seed = None if seed is None else check_integer("seed", seed, 0)
        groups, notes = {}, []
        if seed is not None and seed != self.seed:
            notes.append(f"seed: {seed} instead of {self.seed}")
        for name, value in given.items():
            if (before := getattr(self.sampling, name)) != value:
                notes.append(f"{name}: {value} instead of {'none' if before is None else before}")
        for name, group in self.groups.items():
            special = train_captions if name == TRAIN else val_captions
            count = special if special is not None else captions
            groups[name] = group
            count = None if count is None else check_integer("captions", count, 2)
            if count is not None and count != group.captions.count:
                groups[name] = replace(group, captions=replace(group.captions, count=count))
                of = "" if list(self.groups) == [ALL] else f" of {name}"
                notes.append(f"captions{of}: {count} instead of {group.captions.count or 'all'}")
        return replace(
            self,
            seed=self.seed if seed is None else seed,
            groups=groups,
            sampling=replace(self.sampling, **given),
            overridden=(*self.overridden, *notes),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "protocol") -> Protocol:
        """Builds a protocol from plain data, as in a protocol or result file.

        Args:
            values: Values by field.
            where: Source of the values, for messages.

        Raises:
            ProtocolError: A field is unknown, missing or wrong.
        """
        try:
            values = mapping(values, where)
            check_keys(values, [f.name for kind in (cls, GroupRule) for f in fields(kind)], "protocol")
            values["groups"] = _groups(values)
            for name, kind in (("image", ImageRule), ("sampling", SamplingRule)):
                if name in values:
                    values[name] = build(kind, values[name], name)
            for name, rule in (("reference", ReferenceRecord), ("targets", TargetRule)):
                if name in values:
                    values[name] = [build(rule, entry, name) for entry in sequence(name, values[name])]
            if "extractors" in values:
                given = mapping(values["extractors"], "extractors")
                values["extractors"] = {n: build(ExtractorRule, v, f"extractors.{n}") for n, v in given.items()}
            return build(cls, values, "protocol")
        except DataFileError as error:
            raise ProtocolError(f"{where}: {error}") from None


def _groups(values: dict[str, Any]) -> dict[str, GroupRule]:
    """Removes the fields of groups from a mapping, and builds the groups."""
    names = [f.name for f in fields(GroupRule)]
    shared = {name: values.pop(name) for name in names if name in values}
    groups = {}
    for name, given in mapping(values.get("groups", {ALL: {}}), "groups").items():
        merged = {**shared, **mapping(given, f"groups.{name}")}
        if "captions" in shared and "captions" in merged:
            merged["captions"] = {
                **mapping(shared["captions"], "captions"), **mapping(merged["captions"], "captions")
            }  # fmt: skip
        # Without ``groups``, the fields are those of the protocol.
        groups[name] = GroupRule.from_dict(merged, "protocol" if "groups" not in values else f"groups.{name}")
    return groups


def list_protocols() -> list[str]:
    """Returns the names of the bundled protocols."""
    return sorted(path.stem for path in bundled_folder("protocols").glob("*.yaml"))


def protocol_file(name: str | Path) -> Path:
    """Returns the file of a protocol: a name from `list_protocols`, or any YAML file.

    Raises:
        UnknownNameError: Neither exists; the message suggests the nearest name.
    """
    if str(name) in list_protocols():
        return bundled_folder("protocols") / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError(f"{suggest('protocol', str(name), list_protocols())}. A YAML file works as well.")


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol.

    Raises:
        ProtocolError: It cannot be used; the message names the file, the field, the expected value and the given one.
    """
    return Protocol.from_dict(read_yaml(path), str(path))


def find_protocol(name: str | Path) -> Protocol:
    """Returns a protocol: a name from `list_protocols`, or any YAML file.

    Raises:
        UnknownNameError: Neither exists; the message suggests the nearest name.
        ProtocolError: The file cannot be used.
    """
    return read_protocol(protocol_file(name))


def title(name: str) -> str:
    """Returns the title of a protocol, without checking the rest of it."""
    return str(read_yaml(protocol_file(name)).get("title", ""))
