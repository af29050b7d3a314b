"""Folders of weights: how a network, a tokenizer or a complete model lies on disk, and how it is read back safely.

Weights are safetensors beside a ``config.json``, in one file or in shards with an index; a model folder lists the
sha256 of every file, which loading verifies. No pickle is read. Files appear atomically or not at all.

Loading takes little more memory than the weights: a network is built without storage (on the meta device), and every
tensor is read by itself and put where it belongs, in the precision asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_zoo import __version__
from dalle_zoo.files import stays_inside, sync, written_aside
from dalle_zoo.folders import COMPONENTS, CONVERSION, INDEX
from dalle_zoo.models.dalle_mini import DalleMini  # noqa: F401 (registers itself)
from dalle_zoo.models.dalle_pytorch import DallePytorch  # noqa: F401 (registers itself)
from dalle_zoo.models.dalle_pytorch_vae import DallePytorchVAE  # noqa: F401 (registers itself)
from dalle_zoo.models.dvae import DVAE  # noqa: F401 (registers itself)
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.models.initial import copy_shard, shapes_only
from dalle_zoo.models.mindalle import MinDALLE  # noqa: F401 (registers itself)
from dalle_zoo.models.prior import Prior  # noqa: F401 (registers itself)
from dalle_zoo.models.rudalle import RuDALLE  # noqa: F401 (registers itself)
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from dalle_zoo.models.vqgan import VQGAN  # noqa: F401 (registers itself)
from dalle_zoo.registry import suggest

Net = TypeVar("Net", bound=nn.Module)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CHECKSUMS = "sha256.json"
CARD = "README.md"
SHARD_BYTES = 5 * 10**9
"""Weights above this size lie in several files."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""What a file may store of a floating-point tensor, as safetensors calls it; each is read into any other."""
INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
"""What it may store of others."""


class ModelFolderError(ValueError):
    """A folder that does not hold what was expected; the message says what and what to do."""


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: expected a folder written by dalle-zoo") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, atomically."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False, marker: str = CONFIG) -> Iterator[Path]:
    """Yields a folder to fill beside ``folder``; it takes that place only when the block ends without an error.

    What a process on this machine left there when it was killed is removed.

    Args:
        folder: Where to; must be new or empty unless ``overwrite``.
        overwrite: Whether an older folder of the same kind is replaced.
        marker: File by which that kind is known; a folder without it is somebody else's and stays.

    Raises:
        FileExistsError: The folder is not empty, and may not be replaced; also if it became so meanwhile.
        NotADirectoryError: It is a file.
    """
    folder = Path(folder).absolute()  # "." has no name to write beside
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another folder")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} exists and is not empty: choose another folder or pass --overwrite")
        if not (folder / marker).is_file():
            raise FileExistsError(
                f"{folder} holds other files and is not replaced (it has no {marker}): choose another folder"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = f".{folder.name}.{platform.node()}."  # a folder may be shared by machines with processes of their own
    for left in folder.parent.iterdir():
        if left.name.startswith(beside) and left.suffix == ".part" and not _runs(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{beside}{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        if overwrite and folder.exists():
            retired = folder.with_name(f"{beside}{os.getpid()}.old")
            folder.replace(retired)
            aside.replace(folder)
            shutil.rmtree(retired)
        else:
            try:
                aside.replace(folder)
            except OSError:
                if not folder.exists():
                    raise
                raise FileExistsError(f"{folder} was made by somebody else meanwhile, and stays") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _runs(process: str) -> bool:
    """Whether a process of this machine has that number; True where this cannot be told."""
    if not process.isdecimal() or os.name != "posix":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def config_from_dict(config_class: type, values: dict[str, Any], where: str) -> Any:
    """Builds a frozen config from plain data; an unknown key raises with the nearest right one."""
    known = [field.name for field in fields(config_class)]
    for name in values:
        if name not in known:
            raise ModelFolderError(f"{where}: {suggest('field', name, known)}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{where}: {error}") from None


# ---------------------------------------------------------------- one network


class Lazy(Protocol):
    """A tensor that is read when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""

    def read(self) -> Tensor:
        """The tensor, on the CPU."""


def save_network(
    net: nn.Module,
    kind: str,
    folder: Path,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of a network into an existing folder.

    Args:
        net: Network with a frozen dataclass in ``net.config``.
        kind: Name under which it is found again ("dvae", "prior", …).
        folder: Where to.
        dtype: Precision of the stored weights. Stored as they are by default.
        weights: Instead of the network's own, which may be shards.
        shard_bytes: As for `save_weights`.
    """
    config: Any = net.config
    tensors = net.state_dict() if weights is None else weights
    save_weights(tensors, {"type": kind, **asdict(config)}, folder, dtype, shard_bytes)


def save_weights(
    tensors: Mapping[str, Tensor | Lazy],
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``model.safetensors`` and ``config.json`` into an existing folder, as `save_network` does.

    Args:
        tensors: Weights by name; lazy ones are read one shard at a time.
        config: Contents of ``config.json``.
        folder: Where to; weights that lie there in another number of files are taken away at the end.
        dtype: Precision of the stored weights that are floating-point. Stored as they are by default.
        shard_bytes: Above this size the weights lie in ``model-00001-of-0000n.safetensors`` with
            ``model.safetensors.index.json``; a tensor is never split.
    """
    target_dtypes = {
        n: dtype if dtype is not None and t.dtype.is_floating_point else t.dtype for n, t in tensors.items()
    }
    sizes = {n: math.prod(t.shape) * target_dtypes[n].itemsize for n, t in tensors.items()}
    shards = _in_shards(sizes, shard_bytes)
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        stored = {n: _read(tensors[n]).to("cpu", target_dtypes[n]).contiguous() for n in names}
        with written_aside(folder / file) as aside:
            save_file(stored, aside, metadata={"format": "pt"})
        del stored
    if len(shards) > 1:
        where = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        write_json(index_of(folder / WEIGHTS), {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        files.append(index_of(folder / WEIGHTS).name)
    for old in folder.glob("model*.safetensors*"):
        if old.name not in files:
            old.unlink()
    write_json(folder / CONFIG, dict(config))


def _read(tensor: Tensor | Lazy) -> Tensor:
    return tensor.detach() if isinstance(tensor, Tensor) else tensor.read()


def _in_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in groups that stay below a number of bytes, in their order; at least one group."""
    if limit < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {limit}")
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def index_of(path: Path) -> Path:
    """The file that says in which shard a tensor lies, where ``path`` itself is missing."""
    return path.with_name(f"{path.name}.index.json")


def load_weights(
    net: nn.Module, path: Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Reads safetensors into a network, which may be without storage; nothing is read unless all of it fits.

    Args:
        net: Where to. A network on the meta device gets storage; another keeps its own, which may be shards of a
            distributed one.
        path: ``model.safetensors``; if there is none, the shards of ``model.safetensors.index.json`` beside it.
        device: Where storage is made. Defaults to the CPU.
        dtype: Its precision where it is floating-point. Defaults to the network's.

    Raises:
        ModelFolderError: A file is missing or damaged; tensors are missing, extra, of another shape or kind, or not
            finite, and are named.
    """
    places = _places(path)
    expected = net.state_dict()
    _check_fit(path, expected, places)
    read: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, file in places.items():
            target = expected[name]
            # Opened anew for each tensor: that gives back the pages of the last one, which are mapped memory.
            with safe_open(file, "pt") as shard:
                tensor: Tensor = shard.get_tensor(name)
                _check_finite(tensor, name, file)
                if target.is_meta:
                    target_dtype = dtype if dtype is not None and target.is_floating_point() else target.dtype
                    read[name] = tensor.to(device or "cpu", target_dtype, copy=True)
                else:
                    copy_shard(target, tensor.to(target.dtype))
                del tensor
    if read:
        net.load_state_dict(read, assign=True)


def _places(path: Path) -> dict[str, Path]:
    """File of every stored tensor."""
    if path.is_file():
        return dict.fromkeys(_names(path), path)
    index = index_of(path)
    if not index.is_file():
        raise ModelFolderError(f"{path} is missing: expected weights as safetensors")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ModelFolderError(f"{index} has no weight_map of tensor names to files")
    for file in dict.fromkeys(where.values()):
        if Path(file).name != file:
            raise ModelFolderError(f"{index} names a file outside its folder: {file}")
        if not path.with_name(file).is_file():
            raise ModelFolderError(f"{path.with_name(file)} is missing: copy or download the model again")
        listed = {name for name, place in where.items() if place == file}
        if listed != _names(path.with_name(file)):
            different = ", ".join(sorted(listed ^ _names(path.with_name(file)))[:5])
            raise ModelFolderError(f"{index} and {file} do not hold the same tensors ({different})")
    return {name: path.with_name(file) for name, file in where.items()}


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is not a readable safetensors file: {error}") from None


def _check_fit(path: Path, expected: Mapping[str, Tensor], places: Mapping[str, Path]) -> None:
    """Compares names, shapes and kinds of number, of which only headers are read."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - places.keys())]
    problems += [f"unexpected {name}" for name in sorted(places.keys() - expected.keys())]
    for file in sorted(set(places.values())):
        with safe_open(file, "pt") as shard:
            for name in sorted(name for name, place in places.items() if place == file and name in expected):
                problems += _misfits(name, expected[name], shard.get_slice(name))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ModelFolderError(f"{path} does not fit its config.json: {shown}")


def _misfits(name: str, target: Tensor, stored: Any) -> Iterable[str]:
    shape, kind = tuple(stored.get_shape()), str(stored.get_dtype())
    if shape != tuple(target.shape):
        yield f"{name} has shape {shape}, expected {tuple(target.shape)}"
    kinds = FLOATS if target.is_floating_point() else (INTEGERS.get(target.dtype, ""),)
    if kind not in kinds:
        yield f"{name} is stored as {kind}, expected {' or '.join(kinds)}"


def _check_finite(tensor: Tensor, name: str, path: Path) -> None:
    # The extremes show a NaN as well, and need no memory beside the tensor.
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ModelFolderError(f"{path} holds numbers that are not finite, in {name}: these weights are broken")


def _without_storage(make: Callable[[], Net]) -> Net:
    """Builds a network on the meta device, unless it computes buffers that no file holds."""
    with shapes_only():
        net = make()
    stored = net.state_dict().keys()
    return net if all(name in stored for name, _ in net.named_buffers()) else make()


def load_image_tokenizer(folder: Path, device: str | torch.device | None = None) -> ImageTokenizer:
    """Reads an image tokenizer of any registered kind, in float32, ready for evaluation.

    Args:
        folder: With ``config.json`` and weights.
        device: Where to put it. Defaults to the CPU.
    """
    values = read_json(Path(folder) / CONFIG)
    cls = IMAGE_TOKENIZERS[values.pop("type", "dvae")]
    config = config_from_dict(cls.config_class, values, str(Path(folder) / CONFIG))
    net: Any = _without_storage(lambda: cls(config))  # torch 2.13 does not declare the overload of `to` below
    load_weights(net, Path(folder) / WEIGHTS, device=device)
    on_gpu = device is not None and torch.device(device).type != "cpu"
    layout = torch.channels_last if on_gpu else torch.preserve_format  # on a CPU each call lays weights out
    tokenizer: ImageTokenizer = net.to(device, memory_format=layout).eval()
    return tokenizer


def load_prior(folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ImagePrior:
    """Reads a prior of any registered kind, ready for evaluation.

    Args:
        folder: With ``config.json`` and weights.
        device: Where to put it. Defaults to the CPU.
        dtype: Its precision. Defaults to float32.
    """
    values = read_json(Path(folder) / CONFIG)
    kind = values.pop("type", None)
    if kind not in PRIORS:
        raise ModelFolderError(f'{folder}/{CONFIG} is not a prior: expected "type": "prior", or {", ".join(PRIORS)}')
    cls = PRIORS[kind]
    config = config_from_dict(cls.config_class, values, str(Path(folder) / CONFIG))
    net = _without_storage(lambda: cls(config))
    load_weights(net, Path(folder) / WEIGHTS, device=device, dtype=dtype)
    return net.eval()


# ---------------------------------------------------------------- a complete model


def write_index(folder: Path) -> None:
    """Writes the root files: ``model_index.json`` names the parts, ``config.json`` makes downloads countable."""
    parts = {name: ["dalle_zoo", name] for name in COMPONENTS if (folder / name).is_dir()}
    index = {"_class_name": "DallePipeline", "_dalle_zoo_version": __version__, **parts}
    write_json(folder / INDEX, index)
    write_json(folder / CONFIG, {"model_type": "dalle-zoo", "components": sorted(parts)})


def write_checksums(folder: Path) -> None:
    """Lists the sha256 of every file below ``folder`` in ``sha256.json``, but for the card, which is for people."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p not in (folder / CHECKSUMS, folder / CARD))
    write_json(folder / CHECKSUMS, {p.relative_to(folder).as_posix(): sha256_file(p) for p in files})


def verify_checksums(folder: Path, component: str | None = None) -> None:
    """Raises `ModelFolderError` unless every file that ``sha256.json`` lists is there and unchanged.

    Args:
        folder: A model.
        component: Look at the files of this part alone.
    """
    converted = (folder / CONVERSION).is_file()
    again = f"delete {folder} and convert again" if converted else "copy or download the model again"
    for name, digest in read_json(folder / CHECKSUMS).items():
        if component is not None and not name.startswith(f"{component}/"):
            continue
        path = folder / name
        if not stays_inside(name):  # the file itself may be a link: the Hub's cache is made of them
            raise ModelFolderError(f"{folder / CHECKSUMS} names a file outside the folder: {name}")
        if not path.is_file():
            raise ModelFolderError(f"{path} is missing: {again}")
        if sha256_file(path) != digest:
            raise ModelFolderError(
                f"{path} differs from its sha256 in {CHECKSUMS}: the file is damaged or was changed; {again}, or run "
                f"write_checksums if the change is yours"
            )
