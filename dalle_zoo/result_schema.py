"""Checks that the contents of a result file have the form that its readers rely on; see `dalle_zoo.results`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

PARTS = {"protocol": dict, "source": dict, "groups": dict, "metrics": dict, "scores": list}
"""Parts that every result has."""
_FORMAT = re.compile(r"\.\d{1,2}[efg]")
"""Formats of scores. A longer number of digits would fill the memory."""


def problem_of(data: Any, score_fields: Collection[str]) -> str | None:
    """Describes the first fault of a result, other than in its scores; None if there is none.

    Args:
        data: Contents of a result file.
        score_fields: Names of the fields of a score, by which a protocol selects its headlines.
    """
    for part, kind in PARTS.items():
        if not isinstance(data, dict) or not isinstance(data.get(part), kind):
            return f"has no {part}: expected a result file of dalle-zoo eval"
    faults = (*_of_protocol(data["protocol"], score_fields), *_of_source(data), *_of_groups(data["groups"]))
    return next(iter([*faults, *_of_metrics(data["metrics"])]), None)


def _of_protocol(protocol: Mapping[str, Any], score_fields: Collection[str]) -> Iterator[str]:
    yield from _unless(_is_text, "protocol.name must be text", protocol.get("name"))
    yield from _unless(_is_text_or_none, "protocol.title must be text", protocol.get("title"))
    yield from _unless(_is_mapping_or_none, "protocol.sampling must be an object", protocol.get("sampling"))
    headlines = protocol.get("headlines") or []
    known = isinstance(headlines, list) and all(isinstance(h, dict) and h.keys() <= {*score_fields} for h in headlines)
    if not known:
        yield "protocol.headlines must be a list of objects with fields of scores"


def _of_source(data: Mapping[str, Any]) -> Iterator[str]:
    yield from _unless(_is_text, "source.name must be text", data["source"].get("name"))
    digests = data["source"].get("weights_sha256")
    yield from _unless(_is_mapping_or_none, "source.weights_sha256 must be an object", digests)
    checks = data.get("selfcheck") or []
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        yield "selfcheck must be a list of objects"


def _of_groups(groups: Mapping[str, Any]) -> Iterator[str]:
    for name, group in groups.items():
        dataset = group.get("dataset") if isinstance(group, dict) else None
        found = dataset.get("sha256") if isinstance(dataset, dict) else None
        yield from _unless(_is_text, f"groups.{name}.dataset.sha256 must be text", found)


def _of_metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    for name, spec in metrics.items():
        if not isinstance(spec, dict):
            yield f"metrics.{name} must be an object"
            continue
        for field in ("label", "unit", "section"):
            yield from _unless(_is_text, f"metrics.{name}.{field} must be text", spec.get(field))
        yield from _unless(_is_format, f"metrics.{name}.format must be a format such as .2f", spec.get("format"))
        yield from _unless(_is_list, f"metrics.{name}.extractor must be a list", spec.get("extractor"))
        parts = spec.get("parts")
        if not isinstance(parts, dict) or not all(map(_is_text, parts.values())):
            yield f"metrics.{name}.parts must be an object with texts"


def _unless(is_right: Callable[[Any], bool], expected: str, value: Any) -> Iterator[str]:
    if not is_right(value):
        yield f"{expected}, got {str(value)[:100]!r}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_mapping_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)  # a tuple before the result is written


def _is_format(value: Any) -> bool:
    return isinstance(value, str) and _FORMAT.fullmatch(value) is not None
