"""Small benchmarks in the published layouts, made of noise."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dalle_zoo_eval.benchmarks import Benchmark, Item
from PIL import Image

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
    def picture(path: Path, size: tuple[int, int] = (16, 12), seed: int = 0) -> Path:
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
        """Three pictures, or those of ``captions``."""
        captions = captions or {i: [f"caption {c} of {i}" for c in range(5)] for i in (9, 4, 25)}
        root, prefix = self.root / name, f"COCO_{split}_" if "2014" in split else ""
        record: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        for image, texts in captions.items():
            file = f"{prefix}{image:012d}.jpg"
            record["images"].append({"id": image, "file_name": file, "width": 16, "height": 12})
            record["annotations"] += [{"image_id": image, "id": 0, "caption": text} for text in texts]
            self.picture(root / inside / split / file, seed=image)
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
            self.picture(root / f"images/{key}.jpg", (20, 20), seed=i)
            if captions:
                self.text(root / f"text_c10/{key}.txt", "a bird", *(f"bird {i} from side {side}" for side in range(9)))
        return root

    def attngan(self, *, birds: bool, text: bool = True, name: str = "attngan") -> Path:
        """The layout of AttnGAN with two captions a picture."""
        root = self.root / name
        if birds:
            cub = self.cub(f"{name}/CUB_200_2011", captions=False)
            keys = {s: (cub / f"zeroshot_{s}.txt").read_text().split() for s in ("train", "test")}
        else:
            keys = {"train": ["COCO_train2014_000000000001"], "test": [f"COCO_val2014_{i:012d}" for i in (7, 3)]}
            for key in [*keys["train"], *keys["test"]]:
                self.picture(root / f"images/{key}.jpg")
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
def toy(tmp_path: Path) -> Benchmark:
    """Twenty items with five captions, of which "a thing" is shared by all."""
    items = []
    for i in range(20):
        path = tmp_path / f"{i:02d}.png"
        path.write_bytes(bytes(i + 1))
        items.append(Item(key=f"{i:02d}", image=path, captions=("a thing", *(f"thing {i}, {c}" for c in range(4)))))
    return Benchmark(name="toy:all", root=tmp_path, items=tuple(items))
