"""Reads and writes rankers: CLIP folders, in every layout that transformers 4 and 5 write.

| file | content |
|---|---|
| ``config.json`` | architecture |
| ``model.safetensors``, or shards with ``model.safetensors.index.json`` | weights |
| ``processor_config.json`` or ``preprocessor_config.json`` | preprocessing of images; OpenAI's if there is neither |
| ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` | text tokenizer |

A folder may come from anywhere. Transformers itself would fetch code that a configuration names, open pickles that an
index names, and accept missing and additional tensors. So it gets only the class and checked fields from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dalle_zoo.files import read_json, write_json
from dalle_zoo.model_folder import CONFIG, WEIGHTS, ModelFolderError, has_type
from dalle_zoo.models.ranker import Preprocessing, Ranker
from dalle_zoo.paths import user_path
from dalle_zoo.registry import suggest
from dalle_zoo.tokenizers.library import TOKENIZER_FILE, open_tokenizer_json
from dalle_zoo.weights import check_numbers, index_path, load_weights, read_headers, without_storage

PREPROCESSING, PROCESSOR = "preprocessor_config.json", "processor_config.json"
"""Files of the preprocessing: of transformers 4 alone, and of all parts of a processor, which counts if it has one."""
ATTENTION = "sdpa"
"""Implementation of attention, PyTorch's. A configuration could name another one that is downloaded and run."""
OBSOLETE = tuple(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision"))
"""Tensors that transformers before 4.31 stored; they are the numbers 0, 1, 2, …"""
SIDE = 224
"""Default of the size and crop in transformers, pixels."""
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODES = {2: "bilinear", 3: "bicubic"}
"""Interpolations by their number in PIL."""
CLIP_PROCESSORS = {f"CLIP{kind}" for kind in ("ImageProcessor", "ImageProcessorFast", "FeatureExtractor")}
"""Types of preprocessing whose steps are those of `Preprocessing`."""
OPERATIONS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}

_COMMON = {
    "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int, "num_attention_heads": int,
    "hidden_act": str, "layer_norm_eps": float, "attention_dropout": float,
}  # fmt: skip
_TEXT = {
    **_COMMON, "vocab_size": int, "max_position_embeddings": int, "bos_token_id": int | None, "eos_token_id": int,
    "pad_token_id": int | None,
}  # fmt: skip
_VISION = {**_COMMON, "image_size": int, "patch_size": int, "num_channels": int}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def load_ranker(folder: str | Path) -> Ranker:
    """Loads a CLIP folder, in float32 and evaluation mode.

    Args:
        folder: Folder with the files above.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The folder has another kind of model, pickled weights, a preprocessing that is not supported, or
            files that do not fit together.
    """
    folder = user_path(folder, "folder")
    from transformers.models.clip.modeling_clip import CLIPModel

    values = _read_config(folder)
    _check_weights(folder)
    tokenizer, headers = _open_tokenizer(folder), read_headers(folder / WEIGHTS)
    config = _clip_config(values, headers, folder / CONFIG)

    def make() -> Any:
        model = CLIPModel(config)
        for tower in (model.text_model, model.vision_model):  # the only buffers that are not stored
            positions = torch.arange(tower.embeddings.position_ids.shape[-1], device="cpu")
            tower.embeddings.position_ids = positions.expand(1, -1)
        return model

    model = without_storage(make, headers)
    load_weights(model, folder / WEIGHTS, ignored=OBSOLETE)
    preprocessing = read_preprocessing(folder, config.vision_config.image_size)
    return Ranker(model, tokenizer, preprocessing).eval()


def save_ranker(ranker: Ranker, folder: str | Path) -> None:
    """Writes a folder that `load_ranker` and transformers can load.

    Args:
        ranker: The ranker.
        folder: Folder to write; it is created if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _no_progress_bars():
        ranker.model.save_pretrained(str(folder))
    write_json(folder / PREPROCESSING, _preprocessing_values(ranker.preprocessing))
    ranker.tokenizer.save(str(folder / TOKENIZER_FILE))
    ids = ranker.tokenizer.encode("").ids
    start, end = (ranker.tokenizer.id_to_token(ids[i]) for i in (0, -1))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": ranker.text_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", names)


# ---------------------------------------------------------------- architecture and weights


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: expected a CLIP folder in the format of transformers")
    values = read_json(folder / CONFIG)
    if values.get("model_type") != "clip":
        raise ModelFolderError(f'{folder / CONFIG} must have "model_type": "clip", got {values.get("model_type")!r}')
    return values


def _check_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file() or index_path(folder / WEIGHTS).is_file():
        return
    pickled = [path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern)]
    if pickled:
        raise ModelFolderError(
            f"{folder} has its weights as a pickle ({pickled[0]}), which can run code when it is read: convert it to "
            f"{WEIGHTS} first"
        )
    raise FileNotFoundError(f"no {WEIGHTS} in {folder}")


def _clip_config(values: Mapping[str, Any], headers: Mapping[str, Any], path: Path) -> Any:
    """Returns the configuration of transformers, made of checked fields alone."""
    from transformers.models.clip.configuration_clip import CLIPConfig

    text, vision = (_tower(values, tower, headers, path) for tower in ("text", "vision"))
    projection = values.get("projection_dim", 512)
    if type(projection) is not int or projection < 1:
        raise ModelFolderError(f"{path}: projection_dim must be a positive integer, got {projection!r}")
    check_numbers({"projection_dim": projection}, headers, str(path))
    fields: dict[str, Any] = {"text_config": text, "vision_config": vision, "projection_dim": projection}
    fields["attn_implementation"] = ATTENTION
    try:
        return CLIPConfig(**fields)
    except Exception as error:  # transformers has several kinds for sizes that contradict each other
        raise ModelFolderError(f"{path} describes no CLIP: {' '.join(str(error).split())[:300]}") from None


def _tower(values: Mapping[str, Any], tower: str, headers: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the known fields of a tower; what else the file states, such as generation options, has no effect."""
    from transformers.activations import ACT2FN

    # Transformers 4.21 to 4.30 wrote the values that count under a second name.
    key = f"{tower}_config_dict" if values.get(f"{tower}_config_dict") is not None else f"{tower}_config"
    stated = values.get(key) or {}
    if not isinstance(stated, dict):
        raise ModelFolderError(f"{path}: {key} must be an object, got {type(stated).__name__}")
    hints = _TEXT if tower == "text" else _VISION
    fields = {name: stated[name] for name in hints if name in stated}
    where = f"{path}: {key}"
    for name, value in fields.items():
        if not has_type(value, hints[name]):
            raise ModelFolderError(f"{where}: {name} has the wrong type, got {str(value)[:100]!r}")
        if name in (*_SIZES, "vocab_size", "max_position_embeddings", "image_size", "patch_size") and value < 1:
            raise ModelFolderError(f"{where}: {name} must be at least 1, got {value}")
    check_numbers(fields, headers, where)
    if fields.get("num_channels", 3) != 3:
        raise ModelFolderError(f"{where}: num_channels must be 3, got {fields['num_channels']}")
    if "hidden_act" in fields and fields["hidden_act"] not in ACT2FN:
        raise ModelFolderError(f"{where}: {suggest('hidden_act', fields['hidden_act'], ACT2FN)}")
    return fields


# ---------------------------------------------------------------- text tokenizer


def _open_tokenizer(folder: Path) -> Tokenizer:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / TOKENIZER_FILE).is_file() or not (vocabulary.is_file() and merges.is_file()):
        return open_tokenizer_json(folder / TOKENIZER_FILE)
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    try:
        built: Any = CLIPTokenizer(vocab=str(vocabulary), merges=str(merges))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelFolderError(f"{vocabulary} and {merges} are not a tokenizer of CLIP: {str(error)[:200]}") from None
    return Tokenizer.from_str(built.backend_tokenizer.to_str())


# ---------------------------------------------------------------- preprocessing


@dataclass(frozen=True)
class _Stated:
    """Values of a file; those that are missing have the defaults of transformers."""

    values: Mapping[str, Any]
    path: Path

    def get(self, name: str, default: Any, hint: Any) -> Any:
        value = self.values.get(name, default)
        if not has_type(value, hint):
            raise self.error(name, value, f"of the type {getattr(hint, '__name__', hint)}")
        return value

    def does(self, operation: str) -> bool:
        """Returns whether an operation is applied; null means no."""
        return self.values.get(operation, True) is not None and bool(self.get(operation, True, bool))

    def error(self, name: str, value: Any, expected: str) -> ModelFolderError:
        return ModelFolderError(f"{self.path}: {name} must be {expected}, got {str(value)[:100]!r}")


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """Reads the preprocessing of images in a CLIP folder.

    Args:
        folder: The folder. If it states no preprocessing, it is OpenAI's for the size of the network.
        image_size: Side of the network's images, pixels.

    Raises:
        ModelFolderError: The preprocessing needs an operation that is not supported, or does not fit the network.
        FileError: A file is not valid.
    """
    stated = _stated_preprocessing(folder)
    if stated is None:
        side = (image_size, image_size)
        return Preprocessing(size=image_size, resize=image_size, crop=side, mean=OPENAI_MEAN, std=OPENAI_STD)
    _check_operations(stated)
    resize = _resize(stated) if stated.does("do_resize") else None
    crop = _sides(stated, "crop_size") if stated.does("do_center_crop") else None
    fixed = crop or (resize if isinstance(resize, tuple) else (image_size, image_size))
    if fixed != (image_size, image_size):
        raise ModelFolderError(
            f"{stated.path} makes images of {fixed[0]}x{fixed[1]}, the network of that folder takes "
            f"{image_size}x{image_size}: the files do not belong together"
        )
    resample = stated.values.get("resample", 3)
    if resize is not None and (type(resample) is not int or resample not in MODES):
        raise stated.error("resample", resample, "2 (bilinear) or 3 (bicubic)")
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if stated.does("do_normalize"):
        mean, std = _channels(stated, "image_mean", OPENAI_MEAN), _channels(stated, "image_std", OPENAI_STD)
        if min(std) <= 0:
            raise stated.error("image_std", std, "positive")
    return Preprocessing(
        size=image_size,
        resize=resize,
        crop=crop,
        scale=255 * (stated.get("rescale_factor", 1 / 255, float) if stated.does("do_rescale") else 1.0),
        mean=mean,
        std=std,
        mode=MODES.get(resample, MODES[3]),
    )


def _stated_preprocessing(folder: Path) -> _Stated | None:
    """Returns the values that transformers would take; None if the folder has none."""
    parts = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    if "image_processor" in parts:
        values = parts["image_processor"]
        if not isinstance(values, dict):
            raise ModelFolderError(f"{folder / PROCESSOR}: image_processor must be an object")
        return _Stated(values, folder / PROCESSOR)
    path = folder / PREPROCESSING
    return _Stated(read_json(path), path) if path.is_file() else None


def _check_operations(stated: _Stated) -> None:
    """Raises `ModelFolderError` if images are processed by other steps than CLIP's."""
    for name in ("image_processor_type", "feature_extractor_type"):
        kind = stated.get(name, "CLIPImageProcessor", str)
        if kind not in CLIP_PROCESSORS:
            raise stated.error(name, kind, f"one of {', '.join(sorted(CLIP_PROCESSORS))}")
    for name, value in stated.values.items():
        if name.startswith(("do_", "use_")) and name not in OPERATIONS and value:
            raise stated.error(name, value, "false: this step is not supported")


def _resize(stated: _Stated) -> int | tuple[int, int]:
    size = stated.values.get("size", SIDE)
    if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size = size["shortest_edge"]
    elif not isinstance(size, int) or stated.values.get("default_to_square"):
        return _sides(stated, "size")
    if type(size) is not int or size < 1:
        raise stated.error("size", size, "a positive number")
    return size


def _sides(stated: _Stated, name: str) -> tuple[int, int]:
    """Returns height and width: of a number for both, a pair, or an object."""
    size = stated.values.get(name, SIDE)
    pair = size if isinstance(size, list) else (size, size)
    if isinstance(size, dict):
        if size.keys() != {"height", "width"}:
            raise stated.error(name, size, "a number, or an object with height and width or with shortest_edge")
        pair = (size["height"], size["width"])
    if not has_type(pair, tuple[int, int]) or min(pair) < 1:
        raise stated.error(name, size, "positive numbers")
    return pair[0], pair[1]


def _channels(stated: _Stated, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Returns one number per channel; a single one counts for all."""
    values = stated.values.get(name, default)
    values = (values,) * 3 if isinstance(values, int | float) else values
    if not has_type(values, tuple[float, float, float]):
        raise stated.error(name, values, "a finite number, or one for each of the 3 channels")
    return tuple(map(float, values))


def _preprocessing_values(p: Preprocessing) -> dict[str, Any]:
    """Returns the content of ``preprocessor_config.json``."""
    values: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": p.resize is not None,
        "do_center_crop": p.crop is not None,
        "do_rescale": True,
        "rescale_factor": p.scale / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
        "resample": next(number for number, mode in MODES.items() if mode == p.mode),
    }
    if p.resize is not None:
        values["size"] = {"shortest_edge": p.resize} if isinstance(p.resize, int) else _named(p.resize)
    if p.crop is not None:
        values["crop_size"] = _named(p.crop)
    return values


def _named(sides: tuple[int, int]) -> dict[str, int]:
    return {"height": sides[0], "width": sides[1]}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hides the progress bars of transformers for writing a single file."""
    from transformers.utils import logging as library

    logging: Any = library  # parts of it have no annotations
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
