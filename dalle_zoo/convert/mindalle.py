"""minDALL-E: its second stage, the prior, with the vocabulary and the first stage that lie beside it.

| file of the release | becomes | known by |
|---|---|---|
| ``stage2_last.ckpt`` | ``prior/`` | ``tok_emb_txt``, ``tok_emb_img``, ``head_txt``, ``head_img`` |
| ``tokenizer/bpe-16k-vocab.json`` | ``tokenizer/`` | a mapping with ``[UNK]`` |
| ``tokenizer/bpe-16k-merges.txt`` | the same | lines of two pieces that are one in the vocabulary |
| ``config.yaml`` | number of heads | ``stage2`` with ``hparams`` |
| ``stage1_last.ckpt`` | ``dvae/``, by `dalle_zoo.convert.vqgan` | as any VQGAN |

Queries, keys and values become one matrix. All but the number of heads follows from the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import CharBPETokenizer, Tokenizer
from tokenizers.models import BPE

from dalle_zoo.convert.base import FAMILIES, Conversion, Location, Source, check_single, image_tokenizer_in
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor
from dalle_zoo.convert.lazy import concatenated, filled, write_network
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.models.external.mindalle import PAD, MinDALLE, MinDALLEConfig
from dalle_zoo.tokenizers import HFTokenizer
from dalle_zoo.weights import Lazy

Tensors = Mapping[str, StoredTensor]

ROOTS = ("state_dict.", "", "state_dict.stage2.", "stage2.")
"""Where the tensors lie in a file: as released, bare, and in a checkpoint or state dict of both stages."""
OUTSIDE = {
    "tok_emb_txt": "text_embedding", "pos_emb_txt": "text_position", "head_txt": "text_head",
    "tok_emb_img": "image_embedding", "pos_emb_img": "image_position", "head_img": "image_head",
}  # fmt: skip
"""Matrices outside the layers, none of which has biases, and our names."""
MATRICES = {
    "attention.qkv": ("attn.query", "attn.key", "attn.value"), "attention.output": ("attn.proj",),
    "mlp.hidden": ("mlp.0",), "mlp.output": ("mlp.2",),
}  # fmt: skip
"""Our matrices of a layer, and those of the original that make one."""
NORMS = {"attention_norm": "ln1", "mlp_norm": "ln2"}
TRANSFER = {"tok_emb_img.weight", "pos_emb_img.weight", "head.weight"}
"""What minDALL-E's transfers to ImageNet have besides layers and ``sos``: a class, or nothing, in place of a text."""
HEAD_SIZE = 64
"""Width of a head where no configuration tells it; the published model has it."""
UNKNOWN = "[UNK]"
"""What stands for characters outside the vocabulary."""


@FAMILIES.register("mindalle")
class MinDALLEFamily:
    """Checkpoints of minDALL-E's second stage."""

    title = "minDALL-E"
    expects = (
        "the folder of minDALL-E's release, or stage2_last.ckpt of it; known by tensors tok_emb_txt, tok_emb_img, "
        "head_txt and head_img"
    )
    complete = True

    def recognize(self, location: Location) -> Source | None:
        """The one prior at a location, with what lies beside it."""
        found = [(c, tensors) for c in location.checkpoints if (tensors := _transformer(c)) is not None]
        check_single(location, [c.path for c, _ in found], "priors of minDALL-E")
        if not found:
            return None
        checkpoint, tensors = found[0]
        files = _vocabulary(location)
        try:
            config = _infer(tensors)
            heads, note = _heads(config, tensors, location.configs)
            padding = None
            if files:
                (padding,) = text_tokenizer(**files).encode(PAD)
            inferred = MinDALLEConfig(**config, num_heads=heads, padding_id=padding)
            _translated(tensors, inferred.num_layers)
        except ValueError as error:
            raise WeightFileError(f"{checkpoint.path} cannot be converted: {error}") from None
        notes = {
            "num_heads": note,
            "image_height": "as image_width: the original samples squares",
            "padding_id": f"{PAD} in {files['vocabulary'].name}" if files else "unknown: no vocabulary lies there",
        }
        return Source(
            "mindalle",
            location.path,
            {"prior": tensors},
            asdict(inferred),
            notes,
            files=files,
            image_tokenizer=image_tokenizer_in(location),
        )

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``prior/``, and ``tokenizer/`` where the vocabulary is there."""
        config = MinDALLEConfig(**source.config)
        with torch.device("meta"):
            net = MinDALLE(config)
        if source.files:
            tokenizer = text_tokenizer(**source.files)
            try:
                net.check_tokenizer(tokenizer)
            except ValueError as error:
                raise WeightFileError(f"{source.files['vocabulary']} is not that of the prior: {error}") from None
            tokenizer.save(out / "tokenizer")
        write_network(out / "prior", "mindalle", net, _translated(source.parts["prior"], config.num_layers))
        return Conversion(
            description=f"minDALL-E: {config.num_layers} layers of width {config.width}, {config.text_length} text "
            f"tokens, {config.image_height} x {config.image_width} codes",
            license="CC-BY-NC-SA-4.0",
            license_note="that of the published weights",
            data="14 million images with captions of CC3M and CC12M, those of the published weights",
            inferred={"type": "mindalle", **asdict(config)},
            notes=dict(source.notes),
            parameters={"prior": sum(p.numel() for p in net.parameters())},
        )


# ------------------------------------------------------------ tensors


def _transformer(checkpoint: Checkpoint) -> Tensors | None:
    """Tensors of the prior in a file, prefix taken off; None if there is none.

    Raises:
        WeightFileError: It is a transfer of minDALL-E to ImageNet.
    """
    for root in ROOTS:
        tensors = checkpoint.state_dict(root)
        if "blocks.0.attn.key.weight" not in tensors:
            continue
        if {f"{name}.weight" for name in OUTSIDE} <= tensors.keys():
            return tensors
        if tensors.keys() >= TRANSFER and tensors.keys() & {"sos", "sos.weight"}:
            raise WeightFileError(
                f"{checkpoint.path} is a transfer of minDALL-E to ImageNet, which samples from a class or nothing, "
                "and reads no captions: expected its text-to-image model, stage2_last.ckpt of the release"
            )
    return None


def _infer(tensors: Tensors) -> dict[str, int]:
    """Fields of `MinDALLEConfig` that shapes tell."""
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
    """All tensors under our names; where the original has a kind of matrix without biases, ours has zeros.

    Raises:
        WeightFileError: One is missing, or left over.
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
        raise WeightFileError(f"it has {', '.join(list(left)[:5])} besides, which the original has not")
    return native


def _has_biases(tensors: Tensors, part: str) -> bool:
    return any(name.endswith(f".{part}.bias") for name in tensors)


# ------------------------------------------------------------ files beside


def _heads(config: Mapping[str, int], tensors: Tensors, files: Mapping[str, Mapping[str, Any]]) -> tuple[int, str]:
    """Number of attention heads, and where it comes from.

    Raises:
        WeightFileError: Configurations that lie there describe other networks, or disagree.
    """
    described = {name: values["stage2"] for name, values in files.items() if _is_description(values.get("stage2"))}
    if not described:
        if config["width"] % HEAD_SIZE:
            raise WeightFileError(
                f"width {config['width']} does not tell the heads: give the folder with its config.yaml"
            )
        return config["width"] // HEAD_SIZE, f"assumed, heads of {HEAD_SIZE}, as no configuration lies there"
    stated = {
        "vocab_size_txt": config["text_vocab"],
        "vocab_size_img": config["codebook_size"],
        "ctx_len_txt": config["text_length"],
        "ctx_len_img": config["image_height"] * config["image_width"],
        "embed_dim": config["width"],
        "n_layers": config["num_layers"],
        "attn_bias": _has_biases(tensors, "attn.query"),
        "mlp_bias": _has_biases(tensors, "mlp.0"),
        "gelu_use_approx": False,  # not told by tensors: only the published kind, the exact one, is known here
    }
    heads = {}
    for name, stage in described.items():
        values = {**stage, **stage["hparams"]}
        wrong = [f"{k} is {values[k]!r}, expected {v!r}" for k, v in stated.items() if values.get(k, v) != v]
        if wrong:
            raise WeightFileError(f"{name} does not describe this network: {'; '.join(wrong)}")
        heads[name] = values.get("n_heads", MinDALLEConfig.num_heads)  # what the original takes where it is not said
    if len(set(heads.values())) > 1:
        raise WeightFileError(f"configurations disagree on n_heads ({heads}): leave the right one there")
    name, number = next(iter(heads.items()))
    if type(number) is not int:
        raise WeightFileError(f"n_heads in {name} must be a number, got {number!r}")
    return number, name


def _is_description(stage: Any) -> bool:
    return isinstance(stage, Mapping) and isinstance(stage.get("hparams"), Mapping)


def _vocabulary(location: Location) -> dict[str, Path]:
    """The files of the text tokenizer, "vocabulary" and "merges"; none if not both are there.

    Raises:
        WeightFileError: There are several.
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
    """Whether a file begins, below the line of a version, with a pair of pieces that are one in the vocabulary."""
    with file.open("rb") as opened:
        lines = opened.read(1000).decode("utf-8", errors="replace").splitlines()
    first = next((line for line in lines if not line.startswith("#version")), "")
    return first.count(" ") == 1 and first.replace(" ", "") in pieces


def text_tokenizer(vocabulary: Path, merges: Path) -> HFTokenizer:
    """minDALL-E's text tokenizer: lower case, a BPE of characters, [UNK] and [PAD] appended if absent.

    Raises:
        WeightFileError: The files are damaged, or do not belong together.
    """
    try:
        built = CharBPETokenizer(*BPE.read_file(str(vocabulary), str(merges)), unk_token=UNKNOWN, lowercase=True)
    except Exception as error:  # the library raises bare Exception
        raise WeightFileError(f"{vocabulary} and {merges} make no vocabulary: {error}") from None
    built.add_special_tokens([PAD])
    return HFTokenizer(Tokenizer.from_str(built.to_str()))
