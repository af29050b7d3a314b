"""Which networks a protocol needs, and opening them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.networks import Network, NetworkFileError, load_network
from dalle_zoo_eval.networks.inception import WEIGHTS_2015, WEIGHTS_DMGAN
from dalle_zoo_eval.protocol import FID_FAMILIES, Protocol
from dalle_zoo_eval.scoring import CLIP, INCEPTION, RANKER

NEEDED_BY = {
    "is": INCEPTION, "kid": INCEPTION, "precision": INCEPTION, "recall": INCEPTION,
    "clip_score": CLIP, "r_precision": RANKER,
}  # fmt: skip
"""Network of every metric but the FID, whose networks are its families."""

PUBLISHED = {INCEPTION: (WEIGHTS_2015,), "dmgan": WEIGHTS_DMGAN}
"""Equivalent files of the networks that are what their name says with these weights alone."""

FILES = {
    **{name: str(files[0]) for name, files in PUBLISHED.items()},
    CLIP: "clip, a CLIP folder as transformers writes it, such as openai/clip-vit-base-patch32",
    RANKER: "ranker, the folder of a dalle-zoo model",
}
"""What to fetch for every network that a protocol can need."""
DEFAULT_NAMES = {**{name: files[0].name for name, files in PUBLISHED.items()}, CLIP: "clip", RANKER: "ranker"}
"""Its name in the folder of networks."""


def networks_folder() -> Path:
    """Where networks are looked for: ``$DALLE_ZOO_NETWORKS``, or a folder of the user's cache."""
    given = os.environ.get("DALLE_ZOO_NETWORKS")
    return Path(given) if given else Path.home() / ".cache" / "dalle-zoo" / "networks"


def needed_networks(protocol: Protocol) -> dict[str, list[str]]:
    """Networks of a protocol, each with the metrics that need it."""
    needed = {family: ["fid"] for family in protocol.fid_families}
    for metric, network in NEEDED_BY.items():
        if metric in protocol.metrics:
            needed.setdefault(network, []).append(metric)
    return needed


def expected_digests(protocol: Protocol, name: str) -> tuple[str, ...]:
    """sha256 of the weights that a network may have: of the protocol, or of the published files; empty if any may."""
    if name in protocol.networks:
        return (protocol.networks[name].sha256,)
    return tuple(file.sha256 for file in PUBLISHED.get(name, ()))


def open_network(protocol: Protocol, name: str, location: Path, *, device: str = "cpu") -> Network:
    """Opens one network with the weights that a protocol fixes; errors as in `load_network`."""
    pinned = protocol.networks.get(name)
    return load_network(name, location, device, expected_sha256=pinned.sha256 if pinned else None)


def open_networks(
    protocol: Protocol,
    locations: Mapping[str, Path],
    leave_out: Sequence[str],
    *,
    device: str = "cpu",
    own_ranker: DallePipeline | None = None,
) -> tuple[dict[str, Network], list[str]]:
    """Opens the networks that a protocol needs, and others that are given.

    Args:
        protocol: Whose metrics decide.
        locations: File or folder of every network.
        leave_out: Networks that are needed and not at hand; their metrics are left out.
        device: Where they compute.
        own_ranker: Model whose ranker serves where no other is given.

    Returns:
        Networks by name, and what is left out for lack of one.

    Raises:
        NetworkFileError: A network is neither given nor left out (all such are named at once), or is another one than
            it should be, or is of no use to the protocol.
    """
    needed, locations = needed_networks(protocol), dict(locations)
    wants_ranker = RANKER in needed and RANKER not in {*locations, *leave_out}
    if wants_ranker and own_ranker is not None and own_ranker.ranker is not None and own_ranker.folder is not None:
        locations[RANKER] = own_ranker.folder
    for name in needed:
        place = networks_folder() / DEFAULT_NAMES[name]
        if name not in {*locations, *leave_out} and place.exists():
            locations[name] = place
    missing = [name for name in needed if name not in locations and name not in leave_out]
    if missing:
        each = [f"\n  {n} (for {', '.join(needed[n])}): {FILES[n]}" for n in missing]
        raise NetworkFileError(
            f"{protocol.name} needs networks that were not given:{''.join(each)}\n"
            f"Put them into {networks_folder()} under these names, or name each with --network NAME=PATH, or go "
            "without one and its scores with --leave-out NAME."
        )
    for name in leave_out:
        if name in locations or name not in needed:
            reason = "it is given with --network" if name in locations else f"{protocol.name} does not need it"
            raise NetworkFileError(f"--leave-out {name}: {reason}")
    for name in locations:
        if name in FID_FAMILIES and name not in needed:
            raise NetworkFileError(f"--network {name}: {protocol.name} has no score of this family")
    if not locations:
        raise NetworkFileError(f"every network of {protocol.name} is left out: nothing can be measured")
    opened = {name: open_network(protocol, name, place, device=device) for name, place in locations.items()}
    return opened, [f"{', '.join(needed[name])}: the network {name} was left out" for name in leave_out]
