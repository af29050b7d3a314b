"""DALLE-pytorch's priors, versions 0.1 to 1.6.6, with the image tokenizer in the same file and their vocabulary.

A file holds ``hparams`` (arguments of the original's class), ``vae_params``, ``weights`` and, since the end of 2021,
``version``. Fields that follow from the tensors are inferred and must agree with ``hparams``. Other fields are taken
from ``hparams``; if they are not stated there, they get the original's default. The record states the origin of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dalle_zoo.convert.dalle_pytorch_hparams import (
    HyperParameters,
    attention_masks,
    hyper_parameters,
    layers_of_kind,
    stated_version,
)
from dalle_zoo.convert.dalle_pytorch_tensors import (
    ANGLES,
    HEAD,
    Network,
    axial_name,
    count_unused,
    shared_numbers,
    sort_tensors,
    transformer_in,
    translated,
)
from dalle_zoo.convert.dalle_pytorch_text import about_vocabulary, find_vocabulary, read_vocabulary
from dalle_zoo.convert.family import FAMILIES, Architecture, Found, PriorFamily, Source
from dalle_zoo.convert.location import Location
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import Checkpoint, Tensors
from dalle_zoo.models.external.dalle_pytorch import DallePytorch
from dalle_zoo.models.external.dalle_pytorch_config import DallePytorchConfig
from dalle_zoo.tokenizers import TextTokenizer
from dalle_zoo.weights import Lazy


@FAMILIES.register("dalle_pytorch")
class DallePytorchFamily(PriorFamily):
    """Checkpoints of priors that DALLE-pytorch's train_dalle.py writes.

    Example:
        >>> from dalle_zoo.models.external.dalle_pytorch import DallePytorchConfig
        >>> DallePytorchFamily("dalle_pytorch").describe(DallePytorchConfig())
        'DALLE-pytorch: 2 layers of width 512, 256 text tokens, 32 x 32 codes'
    """

    title = "DALLE-pytorch"
    expects = (
        "dalle.pt of DALLE-pytorch's train_dalle.py, any version; recognized by tensors to_logits.1, "
        "transformer.layers….to_qkv and ….net.3"
    )
    network = DallePytorch

    def recognize(self, location: Location) -> Source | None:
        """Also reports files of DeepSpeed that lack the weights."""
        source = super().recognize(location)
        if source is None:
            _refuse_deepspeed(location)
        return source

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields the prior, without the image tokenizer."""
        tensors = transformer_in(checkpoint)
        if tensors is not None:
            yield "prior", tensors

    def infer(self, found: Found) -> Architecture:
        """Infers sizes from tensors and the rest from hyper-parameters; selects the vocabulary by its size."""
        checkpoint, network = found.checkpoints["prior"], sort_tensors(found.parts["prior"])
        hparams = hyper_parameters(found.location, checkpoint)
        config, notes = _infer(network, hparams, stated_version(found.location, checkpoint))
        vocabulary = find_vocabulary(found.location, config.text_vocab)
        notes["vocabulary"] = about_vocabulary(vocabulary, config.text_vocab)
        return Architecture(asdict(config), notes, {"vocabulary": vocabulary} if vocabulary is not None else {})

    def translate(self, source: Source, config: DallePytorchConfig) -> Mapping[str, Lazy]:
        """Renames the tensors, and computes the rotary embeddings."""
        return translated(sort_tensors(source.parts["prior"]), config)

    def unused(self, source: Source) -> dict[str, int]:
        """Counts masks, layouts and matrices that the native network does not need."""
        return count_unused(source.parts["prior"])

    def text_tokenizer(self, source: Source) -> TextTokenizer | None:
        """Reads the vocabulary."""
        return read_vocabulary(source.files["vocabulary"]) if "vocabulary" in source.files else None


def _infer(
    network: Network, hparams: HyperParameters, version: tuple[int, ...] | None
) -> tuple[DallePytorchConfig, dict[str, str]]:
    """Returns the architecture, and the origin of the fields that do not follow from tensors.

    Raises:
        WeightFileError: Tensors and hyper-parameters contradict each other, or the prior is not supported.
    """
    options = _options(network, hparams)
    text_length, text_vocab, text_ids = _text_sizes(network, hparams, tied=options["tied_embeddings"])
    height, width = _grid(network, text_length)
    masks, about_masks = attention_masks(hparams, len(network.layers), version, network.caches)
    config = DallePytorchConfig(
        text_length=text_length,
        text_vocab=text_vocab,
        image_height=height,
        image_width=width,
        codebook_size=network.matrix(HEAD).shape[0] - text_ids,
        masks=masks,
        padding="learned" if text_ids > text_vocab else "masked",
        padding_id=hparams.number("padding_id", least=0),
        divide_by_max=hparams.flag("stable"),
        **_attention(network, hparams),
        **options,
    )
    return config, _notes(config, hparams, about_masks)


def _options(network: Network, hparams: HyperParameters) -> dict[str, Any]:
    """Returns the fields of the config that follow from names and shapes alone, after comparing them with ``hparams``.

    Raises:
        WeightFileError: They contradict each other.
    """
    first = network.layers[0][0]
    options = {
        "width": network.matrix(HEAD).shape[1],
        "num_layers": len(network.layers),
        "positions": "rotary" if ANGLES in network.outside else "axial",
        "shift_tokens": network.shifts,
        "layer_scale": "scale" in first,
        "norm": "rms" if "norm.g" in first else "layer",
        "sandwich_norm": "norm_out.weight" in first,
        "reversible": network.reversible,
        "tied_embeddings": "text_emb.linear.weight" in network.outside,
        "shared_attention": shared_numbers([attention for attention, _ in network.layers]),
        "shared_mlp": shared_numbers([mlp for _, mlp in network.layers]),
    }
    stated = {
        "dim": options["width"],
        "depth": options["num_layers"],
        "reversible": options["reversible"],
        "rotary_emb": options["positions"] == "rotary",
        "shift_tokens": options["shift_tokens"],
        "sandwich_norm": options["sandwich_norm"],
        "share_input_output_emb": options["tied_embeddings"],
    }
    hparams.check(stated)
    return options


def _text_sizes(network: Network, hparams: HyperParameters, *, tied: bool) -> tuple[int, int, int]:
    """Returns the number of text positions, of text tokens, and of text tokens with those for padding."""
    if ANGLES in network.outside:
        text_length = hparams.number("text_seq_len")
    else:
        text_length = network.matrix("text_pos_emb.weight").shape[0] - 1
        hparams.check({"text_seq_len": text_length})
    text_vocab = hparams.number("num_text_tokens")
    text_ids = text_vocab + text_length if tied else network.matrix("text_emb.weight").shape[0]
    if text_ids - text_vocab not in (0, text_length):
        raise WeightFileError(
            f"its table of {text_ids} text tokens fits neither num_text_tokens {text_vocab} nor as many more as "
            f"text_seq_len {text_length}"
        )
    return text_length, text_vocab, text_ids


def _attention(network: Network, hparams: HyperParameters) -> dict[str, Any]:
    """Returns the heads, and the layers whose attention differs from that of the others in more than the mask."""
    heads, head_size = hparams.number("heads"), hparams.number("dim_head")
    matrices = [attention["to_qkv.weight"] for attention, _ in network.layers if "to_qkv.weight" in attention]
    if matrices and 3 * heads * head_size != (rows := matrices[0].shape[0]):
        raise WeightFileError(
            f"heads {heads} and dim_head {head_size} need a to_qkv of {3 * heads * head_size} rows, it has {rows}"
        )
    gmlps = tuple(index for index, (attention, _) in enumerate(network.layers) if "proj_in.0.weight" in attention)
    if gmlps != (stated := layers_of_kind("mlp", hparams, len(network.layers))):
        raise WeightFileError(f"attn_types in {hparams.where} has gMLP layers {stated}, the tensors have {gmlps}")
    sparse = layers_of_kind("sparse", hparams, len(network.layers))
    return {"num_heads": heads, "head_size": head_size, "gmlp_layers": gmlps, "sparse_layers": sparse}


def _notes(config: DallePytorchConfig, hparams: HyperParameters, about_masks: str) -> dict[str, str]:
    """Returns the origin of the fields that do not follow from tensors."""
    notes = {
        "text_vocab": hparams.origin("num_text_tokens"),
        "num_heads": hparams.origin("heads"),
        "head_size": hparams.origin("dim_head"),
        "masks": about_masks,
        "divide_by_max": hparams.origin("stable"),
        "padding_id": hparams.origin("padding_id"),
    }
    if config.sparse_layers:
        notes["sparse_layers"] = (
            f"{hparams.origin('attn_types')}; all attend to the blocks of the first, as with DeepSpeed"
        )
    if config.positions == "rotary":
        notes["text_length"] = hparams.origin("text_seq_len")
    return notes


def _grid(network: Network, text_length: int) -> tuple[int, int]:
    """Returns rows and columns of the code grid."""
    if ANGLES not in network.outside:
        sides = [network.outside.get(axial_name(network, axis)) for axis in (0, 1)]
        if any(side is None or len(side.shape) != 4 for side in sides):
            raise WeightFileError("it has neither rotary nor axial image positions")
        return sides[0].shape[1], sides[1].shape[2]  # type: ignore[union-attr]
    shape = network.outside[ANGLES].shape
    rows = shape[-2] if len(shape) > 1 else 0
    for cells in (rows - text_length - 1, rows - text_length):  # the last row was added in version 1.1.2
        if cells > 0 and math.isqrt(cells) ** 2 == cells:
            return math.isqrt(cells), math.isqrt(cells)
    raise WeightFileError(f"{ANGLES} has {rows} rows, expected text_seq_len {text_length} plus a square grid")


def _refuse_deepspeed(location: Location) -> None:
    """Raises `WeightFileError` if there is DeepSpeed's auxiliary file without the weights."""
    for checkpoint in location.checkpoints:
        content = checkpoint.content
        if isinstance(content, Mapping) and isinstance(content.get("weights"), str) and "hparams" in content:
            raise WeightFileError(
                f"{checkpoint.path} has no weights: DALLE-pytorch writes it next to DeepSpeed's partitions. "
                "Join these with DeepSpeed's zero_to_fp32.py, which is among them, and give its output together with "
                f"{checkpoint.path.name}"
            )
