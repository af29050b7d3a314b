"""minDALL-E: the prior (its second stage), with the vocabulary and the first stage at the same location.

| file of the release | becomes | recognized by |
|---|---|---|
| ``stage2_last.ckpt`` | ``prior/`` | ``tok_emb_txt``, ``tok_emb_img``, ``head_txt``, ``head_img`` |
| ``tokenizer/bpe-16k-vocab.json`` | ``tokenizer/`` | a mapping with ``[UNK]`` |
| ``tokenizer/bpe-16k-merges.txt`` | ``tokenizer/`` | lines of two pieces whose concatenation is in the vocabulary |
| ``config.yaml`` | number of heads | ``stage2`` with ``hparams`` |
| ``stage1_last.ckpt`` | ``dvae/``, by `dalle_zoo.convert.vqgan` | as any VQGAN |

The matrices of queries, keys and values are joined into one. Everything except the number of heads follows from the
tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import CharBPETokenizer, Tokenizer
from tokenizers.models import BPE

from dalle_zoo.convert.family import FAMILIES, Architecture, Found, PriorFamily, Source
from dalle_zoo.convert.lazy import concatenated, filled
from dalle_zoo.convert.location import Location
from dalle_zoo.convert.pickles import WeightFileError, shown
from dalle_zoo.convert.stored import Checkpoint, StoredTensor, Tensors
from dalle_zoo.models.external.mindalle import PAD, MinDALLE, MinDALLEConfig
from dalle_zoo.tokenizers import HFTokenizer
from dalle_zoo.weights import Lazy

ROOTS = ("state_dict.", "", "state_dict.stage2.", "stage2.")
"""Prefixes of the tensors in a file: as released, bare, and in a checkpoint or state dict of both stages."""
OUTSIDE = {
    "tok_emb_txt": "text_embedding", "pos_emb_txt": "text_position", "head_txt": "text_head",
    "tok_emb_img": "image_embedding", "pos_emb_img": "image_position", "head_img": "image_head",
}  # fmt: skip
"""Matrices outside the layers, which have no biases: external and native names."""
MATRICES = {
    "attention.qkv": ("attn.query", "attn.key", "attn.value"), "attention.output": ("attn.proj",),
    "mlp.hidden": ("mlp.0",), "mlp.output": ("mlp.2",),
}  # fmt: skip
"""Native matrices of a layer, and the external matrices that each is made of."""
NORMS = {"attention_norm": "ln1", "mlp_norm": "ln2"}
TRANSFER = {"tok_emb_img.weight", "pos_emb_img.weight", "head.weight"}
"""Tensors of minDALL-E's transfers to ImageNet, in addition to the layers and ``sos``. They sample from a class or
from nothing instead of a text."""
HEAD_SIZE = 64
"""Width of a head if no configuration states the number of heads; that of the published model."""
UNKNOWN = "[UNK]"
"""Token of characters outside the vocabulary."""


@FAMILIES.register("mindalle")
class MinDALLEFamily(PriorFamily):
    """Checkpoints of minDALL-E's second stage.

    Example:
        >>> from dalle_zoo.models.external.mindalle import MinDALLEConfig
        >>> MinDALLEFamily("mindalle").describe(MinDALLEConfig())
        'minDALL-E: 42 layers of width 1536, 64 text tokens, 16 x 16 codes'
    """

    title = "minDALL-E"
    expects = (
        "the folder of minDALL-E's release, or its stage2_last.ckpt; recognized by tensors tok_emb_txt, tok_emb_img, "
        "head_txt and head_img"
    )
    network = MinDALLE
    license = "CC-BY-NC-SA-4.0"
    license_note = "that of the published weights"
    data = "14 million images with captions of CC3M and CC12M, those of the published weights"

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields the prior.

        Raises:
            WeightFileError: The file holds a transfer of minDALL-E to ImageNet.
        """
        for root in ROOTS:
            tensors = checkpoint.state_dict(root)
            if "blocks.0.attn.key.weight" not in tensors:
                continue
            if {f"{name}.weight" for name in OUTSIDE} <= tensors.keys():
                yield "prior", tensors
                return
            if tensors.keys() >= TRANSFER and tensors.keys() & {"sos", "sos.weight"}:
                raise WeightFileError(
                    f"{checkpoint.path} is a transfer of minDALL-E to ImageNet, which samples from a class or nothing "
                    "and takes no captions: expected its text-to-image model, stage2_last.ckpt of the release"
                )

    def infer(self, found: Found) -> Architecture:
        """Infers sizes from shapes, the heads from a configuration, and the padding token from the vocabulary."""
        tensors, files = found.parts["prior"], _vocabulary(found.location)
        sizes = _sizes(tensors)
        heads, note = _heads(sizes, tensors, found.location.configs)
        _translated(tensors, sizes["num_layers"])  # so that missing tensors are reported before anything is written
        padding = text_tokenizer(**files).encode(PAD)[0] if files else None
        notes = {
            "num_heads": note,
            "image_height": "as image_width: the original samples squares",
            "padding_id": f"{PAD} in {files['vocabulary'].name}" if files else "unknown: no vocabulary was found",
        }
        return Architecture({**sizes, "num_heads": heads, "padding_id": padding}, notes, files)

    def translate(self, source: Source, config: MinDALLEConfig) -> Mapping[str, Lazy]:
        """Joins queries, keys and values, and fills in biases that the original does not have."""
        return _translated(source.parts["prior"], config.num_layers)

    def text_tokenizer(self, source: Source) -> HFTokenizer | None:
        """Reads vocabulary and merges."""
        return text_tokenizer(**source.files) if source.files else None


# ------------------------------------------------------------ tensors


def _sizes(tensors: Tensors) -> dict[str, int]:
    """Returns the fields of `MinDALLEConfig` that follow from shapes."""
    sizes: dict[str, tuple[int, int]] = {}
    for name in OUTSIDE:
        shape = tensors[f"{name}.weight"].shape
        if len(shape) != 2:
            raise WeightFileError(f"{name}.weight has shape {shape}, expected two dimensions")
        sizes[name] = (shape[0], shape[1])
    positions = sizes["pos_emb_img"][0]
    side = math.isqrt(positions)
    if side * side != positions:
        raise WeightFileError(f"pos_emb_img.weight has {positions} rows, expected a square, such as 16 x 16")
    layers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,4})\.", name))]
    return {
        "text_length": sizes["pos_emb_txt"][0],
        "text_vocab": sizes["tok_emb_txt"][0],
        "image_height": side,
        "image_width": side,
        "codebook_size": sizes["tok_emb_img"][0],
        "width": sizes["tok_emb_img"][1],
        "num_layers": 1 + max(layers),
    }


def _translated(tensors: Tensors, num_layers: int) -> dict[str, Lazy]:
    """Returns all tensors under native names; matrices without biases in the original get zeros.

    Raises:
        WeightFileError: A tensor is missing or unexpected.
    """
    left = dict(tensors)
    unbiased = {part for parts in MATRICES.values() for part in parts if not _has_biases(tensors, part)}

    def take(name: str) -> StoredTensor:
        if name not in left:
            raise WeightFileError(f"it has no {name}")
        return left.pop(name)

    native: dict[str, Lazy] = {
        f"{native_name}.weight": take(f"{external_name}.weight") for external_name, native_name in OUTSIDE.items()
    }
    norms = {"final_norm": "ln_f"}
    for index in range(num_layers):
        norms |= {
            f"layers.{index}.{native_name}": f"blocks.{index}.{external_name}"
            for native_name, external_name in NORMS.items()
        }
        for native_name, parts in MATRICES.items():
            block = f"blocks.{index}"
            weights = {part: take(f"{block}.{part}.weight") for part in parts}
            biases: list[Lazy] = [
                filled(weight.shape[:1], 0.0, weight.dtype) if part in unbiased else take(f"{block}.{part}.bias")
                for part, weight in weights.items()
            ]
            native[f"layers.{index}.{native_name}.weight"] = concatenated(list(weights.values()))
            native[f"layers.{index}.{native_name}.bias"] = concatenated(biases)
    for native_name, external_name in norms.items():
        native |= {f"{native_name}.{kind}": take(f"{external_name}.{kind}") for kind in ("weight", "bias")}
    if left:
        raise WeightFileError(f"it has {', '.join(list(left)[:5])} in addition, which the original does not have")
    return native


def _has_biases(tensors: Tensors, part: str) -> bool:
    return any(name.endswith(f".{part}.bias") for name in tensors)


# ------------------------------------------------------------ other files


def _heads(config: Mapping[str, int], tensors: Tensors, files: Mapping[str, Mapping[str, Any]]) -> tuple[int, str]:
    """Returns the number of attention heads and its origin.

    Raises:
        WeightFileError: The configurations describe other networks, or disagree.
    """
    described = {name: values["stage2"] for name, values in files.items() if _is_description(values.get("stage2"))}
    if not described:
        if config["width"] % HEAD_SIZE:
            raise WeightFileError(
                f"the number of heads does not follow from the width {config['width']}: give the folder with its "
                "config.yaml"
            )
        return config["width"] // HEAD_SIZE, f"assumed, heads of {HEAD_SIZE}, as no configuration was found"
    stated = {
        "vocab_size_txt": config["text_vocab"],
        "vocab_size_img": config["codebook_size"],
        "ctx_len_txt": config["text_length"],
        "ctx_len_img": config["image_height"] * config["image_width"],
        "embed_dim": config["width"],
        "n_layers": config["num_layers"],
        "attn_bias": _has_biases(tensors, "attn.query"),
        "mlp_bias": _has_biases(tensors, "mlp.0"),
        "gelu_use_approx": False,  # does not follow from tensors; only the exact GELU, the published one, is supported
    }
    heads = {}
    for name, stage in described.items():
        values = {**stage, **stage["hparams"]}
        wrong = [f"{k} is {shown(values[k])}, expected {v!r}" for k, v in stated.items() if values.get(k, v) != v]
        if wrong:
            raise WeightFileError(f"{name} does not describe this network: {'; '.join(wrong)}")
        heads[name] = values.get("n_heads", MinDALLEConfig.num_heads)  # the original's default
    if len(set(heads.values())) > 1:
        raise WeightFileError(f"configurations disagree on n_heads ({heads}): keep only the right one")
    name, number = next(iter(heads.items()))
    if type(number) is not int:
        raise WeightFileError(f"n_heads in {name} must be an integer, got {shown(number)}")
    return number, name


def _is_description(stage: Any) -> bool:
    return isinstance(stage, Mapping) and isinstance(stage.get("hparams"), Mapping)


def _vocabulary(location: Location) -> dict[str, Path]:
    """Returns the files of the text tokenizer, "vocabulary" and "merges"; empty unless there are both.

    Raises:
        WeightFileError: There are several vocabularies.
    """
    found = [
        {"vocabulary": location.files[name], "merges": location.files[other]}
        for name, pieces in location.configs.items()
        if UNKNOWN in pieces
        for other in location.unread
        if _merges(location.files[other], pieces)
    ]
    if len(found) > 1:
        names = ", ".join(str(file) for files in found for file in files.values())
        raise WeightFileError(
            f"{location.path} holds several vocabularies ({names}): name the files of one with --files or files="
        )
    return found[0] if found else {}


def _merges(file: Path, pieces: Mapping[str, Any]) -> bool:
    """Returns whether a file starts, after an optional version line, with two pieces that the vocabulary joins."""
    with file.open("rb") as opened:
        lines = opened.read(1000).decode("utf-8", errors="replace").splitlines()
    first = next((line for line in lines if not line.startswith("#version")), "")
    return first.count(" ") == 1 and first.replace(" ", "") in pieces


def text_tokenizer(vocabulary: Path, merges: Path) -> HFTokenizer:
    """Builds minDALL-E's text tokenizer: lower case, BPE of characters, [UNK] and [PAD] appended if absent.

    Raises:
        WeightFileError: The files are damaged, or do not belong together.
    """
    try:
        built = CharBPETokenizer(*BPE.read_file(str(vocabulary), str(merges)), unk_token=UNKNOWN, lowercase=True)
    except Exception as error:  # the library raises bare Exception
        raise WeightFileError(f"{vocabulary} and {merges} do not form a vocabulary: {error}") from None
    built.add_special_tokens([PAD])
    return HFTokenizer(Tokenizer.from_str(built.to_str()))
