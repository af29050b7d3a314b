"""Reference of the registries: names that recipes, protocols and commands accept."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from dalle_zoo_eval.datasets import DATASETS
from dalle_zoo_eval.extractors import EXTRACTORS
from dalle_zoo_eval.metrics import METRICS, MetricSpec
from dalle_zoo_eval.opening import OTHER_INPUTS
from dalle_zoo_eval.protocol import find_protocol, list_protocols
from torchmetrics import Metric

from dalle_zoo.composition import KINDS
from dalle_zoo.convert.family import FAMILIES
from dalle_zoo.data import TRANSFORMS
from dalle_zoo.models import IMAGE_TOKENIZERS, PRIORS
from dalle_zoo.models.attention.backends import BACKENDS
from dalle_zoo.registry import Registry
from dalle_zoo.tokenizers import TEXT_TOKENIZERS
from dalle_zoo.training import STAGES
from dalle_zoo.training.loggers import KINDS as LOGGERS
from dalle_zoo.training.precision import PRECISIONS
from dalle_zoo.training.samples import SAMPLE_SCORES
from dalle_zoo.training.schedules import DECAYS
from dalle_zoo.training.strategies import STRATEGIES
from tools.reference.markdown import code, escape, first_paragraph, options, table

NAMES = (
    ("Strategies", "`trainer.strategy`", STRATEGIES),
    ("Precisions", "`trainer.precision`", PRECISIONS),
    ("Schedules of the learning rate", "`model.learning_rate.decay`", DECAYS),
    ("Attention back-ends", "`model.attention`", BACKENDS),
    ("Text tokenizers", "`text_tokenizer` in `tokenizer_config.json`", TEXT_TOKENIZERS),
    ("Image tokenizers", "`type` in `dvae/config.json`", IMAGE_TOKENIZERS),
    ("Priors", "`type` in `prior/config.json`", PRIORS),
    ("Image transforms", "`data.transform`", TRANSFORMS),
    ("Training stages", "`model.class_path`", STAGES),
    ("Scores of samples", "`samples.score`", SAMPLE_SCORES),
    ("Kinds of composed samples", "`shares` in a composition file", KINDS),
    ("Families of weights", "`dalle-zoo convert --family`", FAMILIES),
)  # fmt: skip
"""Title, where a name is given, and the registry."""


def names_page() -> str:
    """Returns the page of the registries of the package."""
    parts = [
        "# Names\n",
        "Names that recipes, model folders and commands accept. Options are given in parentheses: "
        "`hsdp_powersgd(rank=896)`. Other distributions add names through the entry-point group.\n",
    ]
    for title, place, registry in NAMES:
        parts += [f"## {title}\n", f"{place}; entry-point group `{registry.group}`.\n", _members(registry)]
    rows = [(code(name), code(kind.path), code(kind.package)) for name, kind in LOGGERS.items()]
    parts += ["## Loggers\n", "`trainer.logger`.\n", table(("name", "class", "package"), rows)]
    return "\n".join(parts)


def _members(registry: Registry[Any]) -> str:
    """Returns the table of a registry. Only strategies are named with options; recipes name stages by their class."""
    members = list(registry.loadable())
    if registry is STRATEGIES:
        rows = [(code(name), first_paragraph(member), options(member)) for name, member in members]
        return table(("name", "what it is", "options and defaults"), rows)
    named = [(member.__name__ if registry is STAGES else name, member) for name, member in members]
    return table(("name", "what it is"), [(code(name), first_paragraph(member)) for name, member in named])


# ------------------------------------------------------------ evaluation


def metrics_page() -> str:
    """Returns the page of all metrics."""
    head = ("metric", "in reports", "better", "network", "interval or deviation", "samples", "source")
    parts = [
        "# Metrics\n",
        "*Network* names the extractor of the features; a metric that takes any is computed in those that a protocol "
        "names. A score of fewer *samples*, on either side, is marked in result and report, because its bias or noise "
        "exceeds the differences of systems. Intervals hold 95 % of the repetitions of a bootstrap: the noise of the "
        "samples, not the bias of their number.\n",
        table(head, (_metric(METRICS.spec(name)) for name in METRICS)),
    ]
    for name, metric in METRICS.items():
        given = _metric_options(metric)
        parts += [f"## {name}\n", first_paragraph(metric) + ".\n", *([f"Options: {given}.\n"] if given else [])]
    return "\n".join(parts)


def _metric_options(metric: type[Metric]) -> str:
    """Returns what a protocol may set of a metric: ``k=3``. `reset_real_features` is for training loops."""
    function = getattr(metric, "function", metric)
    parameters = inspect.signature(function).parameters.values()
    only = inspect.Parameter.KEYWORD_ONLY
    given = [p for p in parameters if p.name != "reset_real_features" and (p.kind is only or function is metric)]
    return ", ".join(code(f"{p.name}={p.default}") for p in given)


def _metric(spec: MetricSpec) -> tuple[str, ...]:
    takes_any = "any" if spec.inputs - OTHER_INPUTS else "none"
    return (
        f"[`{spec.name}`](#{spec.name})",
        escape(spec.label or ", ".join(spec.parts.values())),
        "lower" if spec.lower_is_better else "higher",
        ", ".join(f"`{name}`" for name in spec.extractor) or takes_any,
        spec.interval or "–",
        f"{spec.least:,}" if spec.least else "–",
        escape(spec.source) or "this project",
    )


def evaluation_page() -> str:
    """Returns the page of protocols, datasets and networks."""
    return "\n".join(
        [
            "# Protocols, datasets, networks\n",
            "## Protocols\n",
            table(("`dalle-zoo eval`", "title", "metrics"), _protocols()),
            "## Datasets\n",
            "`dataset: {NAME: SPLIT}` in a protocol; entry-point group `dalle_zoo.eval_datasets`.\n",
            table(("name", "what it reads", "files in its folder", "recognized by"), _datasets()),
            "## Networks\n",
            "`--network NAME=PATH`; entry-point group `dalle_zoo.extractors`.\n",
            table(("name", "what it computes", "file", "sha256"), _extractors()),
        ]
    )


def _protocols() -> Iterator[tuple[str, ...]]:
    for name in list_protocols():
        protocol = find_protocol(name)
        metrics = dict.fromkeys(rule.name for rule in protocol.metrics)
        yield code(name), escape(protocol.title), ", ".join(f"[`{m}`](metrics.md#{m})" for m in metrics)


def _datasets() -> Iterator[tuple[str, ...]]:
    for name, reader in DATASETS.items():
        spec = DATASETS.spec(name)
        yield code(name), first_paragraph(reader), escape(spec.files), code(spec.mark)


def _extractors() -> Iterator[tuple[str, ...]]:
    for name, opener in EXTRACTORS.items():
        spec = EXTRACTORS.spec(name)
        file = (
            "part of the model" if spec.model_part else "in the package" if spec.bundled else code(spec.default_file)
        )
        yield code(name), first_paragraph(opener), file, ", ".join(code(each.sha256) for each in spec.weights)
