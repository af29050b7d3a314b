"""A model of a few thousand weights, and small benchmarks in the published layouts, made of noise."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

# Installed, the package is found by itself; in a checkout it is in eval/.
sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

import yaml
from dalle_zoo_eval.extractors.mobilenet import WEIGHTS_FILE, MobileNet

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.tokenizers import ByteTokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained model."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, blocks_per_group=1, decoder_stem=4, codebook_size=8))
    prior = PriorConfig(
        text_length=12, text_vocab=256, image_height=4, image_width=4, codebook_size=8, width=16,
        num_layers=1, num_heads=2, masks="full",
    )  # fmt: skip
    ranker = RankerConfig(
        image_size=16, patch_size=8, vision_width=8, vision_layers=1, vision_heads=1, text_width=8,
        text_layers=1, text_heads=1, embed_dim=8, text_length=12, text_vocab=256,
    )  # fmt: skip
    tokenizer = ByteTokenizer()
    pipe = DallePipeline(dvae, Prior(prior), tokenizer, Ranker.create(ranker, tokenizer))
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file of an untrained evaluator."""
    path = tmp_path_factory.mktemp("networks") / WEIGHTS_FILE
    torch.manual_seed(0)
    save_file(MobileNet().state_dict(), path)
    return path


BIRDS = {
    "001.Tern": ("Tern_0001_11", "Tern_0002_12"),
    "002.Wren": ("Wren_0001_21", "Wren_0002_22"),
    "003.Crow": ("Crow_0001_31", "Crow_0002_32"),
}


class Make:
    """Writes benchmarks below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def text(path: Path, *lines: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    @staticmethod
    def image(path: Path, size: tuple[int, int] = (16, 12), seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    @staticmethod
    def pickle(path: Path, value: object, protocol: int = 2) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(value, protocol))

    def coco(
        self,
        split: str = "val2014",
        captions: Mapping[int, list[str]] | None = None,
        *,
        inside: str = "",
        zipped: bool = False,
        name: str = "coco",
    ) -> Path:
        """Three images, or those of ``captions``."""
        captions = captions or {i: [f"caption {c} of {i}" for c in range(5)] for i in (9, 4, 25)}
        root, prefix = self.root / name, f"COCO_{split}_" if "2014" in split else ""
        record: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        for image, texts in captions.items():
            file = f"{prefix}{image:012d}.jpg"
            record["images"].append({"id": image, "file_name": file, "width": 16, "height": 12})
            record["annotations"] += [{"image_id": image, "id": 0, "caption": text} for text in texts]
            self.image(root / inside / split / file, seed=image)
        data = json.dumps(record).encode()
        path = root / f"annotations/captions_{split}.json{'.gz' if zipped else ''}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(data) if zipped else data)
        return root

    def cub(self, name: str = "CUB_200_2011", *, captions: bool = True) -> Path:
        """Six birds of three classes; the first two classes are those to train with."""
        root = self.root / name
        keys = [(number, f"{group}/{bird}") for number, group in enumerate(BIRDS, 1) for bird in BIRDS[group]]
        self.text(root / "classes.txt", *(f"{number} {group}" for number, group in enumerate(BIRDS, 1)))
        self.text(root / "images.txt", *(f"{i} {key}.jpg" for i, (_, key) in enumerate(keys, 1)))
        self.text(root / "image_class_labels.txt", *(f"{i} {number}" for i, (number, _) in enumerate(keys, 1)))
        self.text(root / "train_test_split.txt", *(f"{i} {i % 2}" for i in range(1, len(keys) + 1)))
        self.text(root / "bounding_boxes.txt", *(f"{i} {i}.0 2.0 4.0 6.0" for i in range(1, len(keys) + 1)))
        self.text(root / "zeroshot_train.txt", *(key for number, key in keys if number < 3))
        self.text(root / "zeroshot_test.txt", *(key for number, key in keys if number == 3))
        for i, (_, key) in enumerate(keys):
            self.image(root / f"images/{key}.jpg", (20, 20), seed=i)
            if captions:
                self.text(root / f"text_c10/{key}.txt", "a bird", *(f"bird {i} from side {side}" for side in range(9)))
        return root

    def attngan(self, *, birds: bool, text: bool = True, name: str = "attngan", test: Sequence[int] = (7, 3)) -> Path:
        """The layout of AttnGAN with two captions an image; without birds the test split is those of ``test``."""
        root = self.root / name
        if birds:
            cub = self.cub(f"{name}/CUB_200_2011", captions=False)
            keys = {s: (cub / f"zeroshot_{s}.txt").read_text().split() for s in ("train", "test")}
        else:
            keys = {"train": ["COCO_train2014_000000000001"], "test": [f"COCO_val2014_{i:012d}" for i in test]}
            for seed, key in enumerate([*keys["train"], *keys["test"]]):
                self.image(root / f"images/{key}.jpg", seed=seed)
        words = {0: "<end>", 1: "a", 2: "bird", 3: "two"}
        captions = [[ids for _ in part for ids in ([1, 2], [3, 2, 0])] for part in keys.values()]
        self.pickle(root / "captions.pickle", [*captions, words, {word: i for i, word in words.items()}])
        for split, part in keys.items():
            self.pickle(root / split / "filenames.pickle", part)
            if birds:
                self.pickle(root / split / "class_info.pickle", [int(key[:3]) for key in part])
            for key in part if text else ():
                self.text(root / f"text/{key}.txt", f"A bird, called {key}.", "", "Two birds?")
        return root


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


@pytest.fixture
def toy(make: Make, tmp_path: Path) -> Path:
    """File of a protocol of three groups with six images each, of noise: three concepts in two styles."""
    groups = ("train", "val-styles", "val-concepts")
    for number, group in enumerate(groups):
        for place, key in enumerate(f"{group}{concept}_{style}" for concept in "abc" for style in ("flat", "blob")):
            image = make.image(tmp_path / "data" / group / f"{key}.png", (16, 16), seed=10 * number + place)
            make.text(image.with_suffix(".txt"), f"a {key}")
    accuracy = {"metric": "concept_accuracy", "part": "top5", "images": "generated"}
    values: dict[str, Any] = {
        "name": "toy", "title": "Made-up images",
        "groups": {group: {"dataset": {"source": str(tmp_path / "data" / group)}} for group in groups},
        "captions": {"rule": "first"}, "image": {"size": None, "chunk": 4},
        "sampling": {"candidates": 3, "chunk": 2, "seeds": "chunk"},
        "metrics": [
            "psnr", "codebook_use", "bits_per_token", "retrieval", "concept_accuracy",
            {"frechet": {
                "extractor": "ranker", "images": ["reconstructed", "generated", "candidates"], "interval": False,
            }},
        ],
        "extractors": {"mobilenet": {"optional": True}, "ranker": {"optional": True}},
        "selfcheck": False,
        "targets": [
            {"name": "share, train", "group": "train", "score": accuracy, "divided_by": {"images": "real"},
             "required": 0.8},
            {"name": "bits, val-styles", "group": "val-styles", "required": 0.3, "minus": {"part": "right"},
             "score": {"metric": "bits_per_token", "part": "shuffled"}},
        ],
        "notes": ["Noise, all of it."],
    }  # fmt: skip
    values["groups"]["train"]["captions"] = {"count": 4}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
