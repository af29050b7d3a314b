"""Undamaged files for `fuzz_readers`, how each is read, and the errors that its reader may raise."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import struct
import tarfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save

from dalle_zoo.convert import WeightFileError, inspect_files, open_checkpoint, recognize
from dalle_zoo.convert.object_pickles import load_objects
from dalle_zoo.data import CodeDataset, ShardSource
from dalle_zoo.data.code_files import FORMAT
from dalle_zoo.model_results import figures
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.networks import load_image_tokenizer, load_prior, save_network
from dalle_zoo.ranker_folder import load_ranker, save_ranker
from dalle_zoo.recipes import read_recipe
from dalle_zoo.results import ResultError, read_result, score_tables
from dalle_zoo.tokenizers import ByteTokenizer
from dalle_zoo.training.checkpoints import consolidate

ROOT = Path(__file__).parents[1]
Read = Callable[[bytes, Path], object]
"""Reads the content of a case; the folder is empty, or holds the files that belong to it."""


@dataclass(frozen=True)
class Original:
    """An undamaged file."""

    data: bytes
    """Its content."""
    read: Read
    """Reads a damaged copy as the package would."""
    errors: tuple[type[Exception], ...] = (ValueError,)
    """Errors that the reader may raise; they name what is wrong."""


# ---------------------------------------------------------------- weights of other code bases


def dvae_weights() -> dict[str, torch.Tensor]:
    """A small dVAE under the names of transformers."""
    config = DVAEConfig(image_size=16, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=6)
    names = {}
    for name, tensor in DVAE(config).encoder.state_dict().items():
        name = (
            name.replace("skip", "id_path").replace("conv_", "res_path.path.conv_").replace("block_", "group.block_")
        )
        name = name.removeprefix("groups.").replace("output.", "output.conv.")
        names[f"blocks.{name}"] = tensor
    return names


def vqgan_weights() -> dict[str, torch.Tensor]:
    """A small VQGAN, whose names are those of taming-transformers."""
    config = VQGANConfig(
        image_size=8,
        width=32,
        multipliers=(1, 1),
        blocks_per_level=1,
        attention_sizes=(),
        code_channels=4,
        codebook_size=8,
    )
    return VQGAN(config).state_dict()


def packed(value: Any) -> bytes:
    """MessagePack of mappings and arrays, as Flax writes them."""
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
        return head + b"".join(packed(name) + packed(one) for name, one in value.items())
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else bytes([0xD9, len(text)])) + text
    shape = b"".join(bytes([n]) if n < 128 else b"\xcd" + struct.pack(">H", n) for n in value.shape)
    numbers: bytes = value.contiguous().numpy().tobytes()
    kind = packed(str(value.dtype).removeprefix("torch."))
    content = bytes([0x93, 0x90 | value.ndim]) + shape + kind + b"\xc6" + struct.pack(">I", len(numbers)) + numbers
    return b"\xc9" + struct.pack(">I", len(content)) + b"\x01" + content


def flax_weights() -> dict[str, Any]:
    """Some of DALL-E mini's, by its names: tables, and tensors of two layers in one."""

    def stack(width: int) -> dict[str, Any]:
        unit = {"LayerNorm_0": {"bias": torch.rand(2, width)}, "Dense_0": {"kernel": torch.rand(2, width, 6)}}
        return {"LayerNorm_0": {"bias": torch.rand(2, width)}, "GLU_0": unit}

    parts = {
        part: {
            "embed_tokens": {"embedding": torch.rand(tokens, 4)},
            "embed_positions": {"embedding": torch.rand(4, 4)},
            "layers": {f"FlaxBart{part.title()}Layers": stack(4)},
        }
        for part, tokens in (("encoder", 7), ("decoder", 9))
    }
    return {"lm_head": {"kernel": torch.rand(4, 9)}, "model": parts}


def external_weights() -> dict[str, bytes]:
    """Files of other code bases by their name; the ending tells how they are read."""
    torch.manual_seed(0)
    plain = {"a": [1, 2.5, None, True, 2**70], "b": ("text", b"raw"), "c": OrderedDict(k=1), "d": Namespace(width=8)}
    weights, module = dvae_weights(), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    files = {f"plain{protocol}.pickle": pickle.dumps(plain, protocol) for protocol in range(2, 6)}
    for name, value in {"dvae": weights, "vqgan": {"state_dict": vqgan_weights()}, "module": module}.items():
        for form, new in (("zip", True), ("legacy", False)):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=new)
            files[f"{name}.{form}"] = file.getvalue()
    files["dvae.safetensors"] = save(weights)
    files["dalle_mini.msgpack"] = packed(flax_weights())
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"embed_dim": 4, "ddconfig": {"ch": 32}}}}
    files["config.json"] = json.dumps(config).encode()
    files["config.yaml"] = yaml.safe_dump(config).encode()
    return files


def read_external(name: str) -> Read:
    """Returns the reader of a file of `external_weights`."""

    def read(data: bytes, folder: Path) -> None:
        if name.endswith(".pickle"):
            load_objects(io.BytesIO(data), len(data))
            return
        path = folder / name
        path.write_bytes(data)
        if name.startswith("config"):
            location = inspect_files(path)  # which keeps the reason in place of raising it
            for reason in {**location.unread, **location.damaged}.values():
                raise WeightFileError(reason)
            return
        for tensor in open_checkpoint(path).tensors.values():
            tensor.read()
        recognize(path)

    return read


# ---------------------------------------------------------------- files of dalle-zoo


def model_folder() -> dict[str, bytes]:
    """Files of a small prior, dVAE and ranker, by their path."""
    torch.manual_seed(0)
    root = Path(mkdtemp())
    sizes = {"text_length": 4, "text_vocab": 9, "image_height": 2, "image_width": 2, "codebook_size": 6}
    prior = Prior(PriorConfig(**sizes, width=8, num_layers=2, num_heads=2, masks="row, column"))
    dvae = DVAE(DVAEConfig(image_size=16, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=6))
    ranker = RankerConfig(
        image_size=16, patch_size=8, vision_width=8, vision_layers=1, vision_heads=2, text_width=8, text_layers=1,
        text_heads=2, embed_dim=4, text_length=8, text_vocab=256,
    )  # fmt: skip
    for name, net in {"prior": prior, "dvae": dvae}.items():
        (root / name).mkdir()
        save_network(net, name, root / name, shard_bytes=4000)
    save_ranker(Ranker.create(ranker, ByteTokenizer()), root / "ranker")
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    shutil.rmtree(root)
    return found


def in_model(path: str, files: dict[str, bytes]) -> Read:
    """Returns a reader of a component of which one file is replaced."""
    loaders: dict[str, Callable[[Path], object]] = {
        "prior": load_prior,
        "dvae": load_image_tokenizer,
        "ranker": load_ranker,
    }
    component = path.partition("/")[0]

    def read(data: bytes, folder: Path) -> None:
        for name, content in {**files, path: data}.items():
            if name.startswith(component):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        loaders[component](folder / component)

    return read


def shard(form: int) -> bytes:
    """Three samples with long names, which need extended headers."""
    file, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for key in ("a", "b" * 120, "c"):
            for ending, data in (
                ("png", image.getvalue()),
                ("json", b'{"captions": ["one", "two"]}'),
                ("txt", b"one"),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def read_shard(data: bytes, folder: Path, manifest: bytes | None = None) -> None:
    """Reads all samples of a shard, which may have a manifest; damage is skipped and counted, and never an error."""
    (folder / "shard.tar").write_bytes(data)
    if manifest is not None:
        (folder / "manifest.json").write_bytes(manifest)
    source = ShardSource([folder / "shard.tar"])
    for _ in source.read(seed=None, epoch=0, start=0, stop=source.num_samples):
        pass


def read_codes(data: bytes, folder: Path) -> None:
    """Reads the manifest of code shards."""
    (folder / "manifest.json").write_bytes(data)
    (folder / "shard.tar").write_bytes(shard(tarfile.GNU_FORMAT))
    CodeDataset(folder)


def manifests(data: bytes) -> dict[str, bytes]:
    """The manifests of a folder with one shard, of images and of codes."""
    counts = {"shards": [{"file": "shard.tar", "bytes": len(data), "samples": 3}]}
    codes = {"format": FORMAT, "variants": 1, "chunk": 3, "grid": [2, 2], "tokenizer": {"codebook_size": 8}}
    return {"manifest.json": json.dumps(counts).encode(), "codes.json": json.dumps(counts | codes).encode()}


def checkpoint() -> bytes:
    """A checkpoint of a dVAE in one file."""
    config = DVAEConfig(image_size=16, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=6)
    state = {f"net.{name}": tensor for name, tensor in DVAE(config).state_dict().items()}
    file = io.BytesIO()
    torch.save({"state_dict": state, "dalle_zoo": {"stage": "dvae", "config": asdict(config)}}, file)
    return file.getvalue()


def read_checkpoint(data: bytes, folder: Path) -> None:
    """Writes the weights of a checkpoint as a component folder, and opens it."""
    (folder / "1.ckpt").write_bytes(data)
    consolidate(folder / "1.ckpt", folder)
    load_image_tokenizer(folder)


def read_scores(data: bytes, folder: Path) -> None:
    """Reads a result file as cards and reports do."""
    (folder / "result.json").write_bytes(data)
    result = read_result(folder / "result.json")
    figures(result)
    score_tables(result)


def read_recipe_file(data: bytes, folder: Path) -> None:
    """Reads a recipe."""
    (folder / "recipe.yaml").write_bytes(data)
    read_recipe(folder / "recipe.yaml")


@cache
def originals() -> dict[str, Original]:
    """All undamaged files by their name."""
    found = {
        name: Original(data, read_external(name), (WeightFileError,)) for name, data in external_weights().items()
    }
    model = model_folder()
    small = {path: data for path, data in model.items() if not path.startswith("ranker/tokenizer")}
    found |= {path: Original(data, in_model(path, model)) for path, data in small.items()}
    one = shard(tarfile.GNU_FORMAT)
    found["shard.tar"] = Original(one, read_shard, ())
    found["shard.tgz"] = Original(gzip.compress(shard(tarfile.PAX_FORMAT), mtime=0), read_shard, ())
    manifest, codes = manifests(one).values()
    found["manifest.json"] = Original(manifest, lambda data, folder: read_shard(one, folder, data), ())
    found["codes.json"] = Original(codes, read_codes)
    found["checkpoint.zip"] = Original(checkpoint(), read_checkpoint)
    found["result.json"] = Original((ROOT / "eval/results/composition.json").read_bytes(), read_scores, (ResultError,))
    found["recipe.yaml"] = Original((ROOT / "recipes/prior/composition.yaml").read_bytes(), read_recipe_file)
    return found
