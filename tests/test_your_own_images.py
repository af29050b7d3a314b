"""The page docs/train/own-images.md: its commands run on a small made-up set of birds, and fine-tuning helps."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dalle_zoo import DallePipeline
from dalle_zoo.cli.fit import check_keys
from dalle_zoo.cli.main import main
from dalle_zoo.cli.train import recipe_parser
from dalle_zoo.data import ImageTextDataset, open_source
from dalle_zoo.data.decoding import decode_image
from dalle_zoo.recipes import find_part, find_recipe, read_recipe, split_arguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/train/own-images.md").read_text(encoding="utf-8")
COLORS = {
    "red": (200, 40, 40), "blue": (40, 70, 200), "green": (50, 150, 60), "yellow": (230, 200, 50),
    "brown": (120, 80, 50), "black": (30, 30, 30),
}  # fmt: skip
quiet = pytest.mark.filterwarnings("ignore:.*(does not have many workers|log_every_n_steps|treespec, LeafSpec).*")


def bird(body: str, wing: str, rng: np.random.Generator) -> Image.Image:
    """A bird on a branch, facing left or right, as small as a thumbnail and as unlike the emoji as photos are."""
    size = int(rng.integers(72, 97))
    sky = tuple(int(value) for value in rng.integers(170, 230, 3))
    image = Image.new("RGB", (size, size - int(rng.integers(0, 8))), sky)
    pen, unit = ImageDraw.Draw(image), size / 16
    left = bool(rng.integers(2))
    pen.rectangle((0, 12.5 * unit, size, 13.5 * unit), fill=(90, 70, 50))
    pen.ellipse((4 * unit, 5 * unit, 12 * unit, 13 * unit), fill=COLORS[body])
    head = 3 if left else 9
    pen.ellipse((head * unit, 3 * unit, (head + 4) * unit, 7 * unit), fill=COLORS[body])
    pen.ellipse((6 * unit, 7 * unit, 11 * unit, 11 * unit), fill=COLORS[wing])
    eye = (head + (1 if left else 2.5)) * unit
    pen.ellipse((eye, 4 * unit, eye + unit / 2, 4.5 * unit), fill=(255, 255, 255))
    return image


def write_birds(folder: Path, pairs: list[tuple[str, str]], each: int, seed: int) -> None:
    """Images with two captions each, in the words of CUB."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number, (body, wing) in enumerate(pairs * each):
        bird(body, wing, rng).save(folder / f"{body}-{wing}-{number:03d}.png")
        captions = f"a {body} bird with {wing} wings\nthis bird is {body} and has {wing} wings\n"
        (folder / f"{body}-{wing}-{number:03d}.txt").write_text(captions)


def all_birds() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs of colors for training and for validation: no combination is in both, every color is in both."""
    pairs = list(itertools.permutations(COLORS, 2))
    held_out = [pair for number, pair in enumerate(pairs) if number % 5 == 2]
    return [pair for pair in pairs if pair not in held_out], held_out


USABLE = ("wide", "gray", "transparent", "tiny", "cmyk", "deep", "turned", "animated", "palette")
"""Odd images that can be used: of four colors of ink, of 16 bits, turned by its EXIF, of two frames, …"""
UNUSABLE = {
    "broken": "not a readable image", "truncated": "not a readable image", "empty": "not a readable image",
    "without-caption": "no caption", "no-text": "no caption", "latin": "a caption is not valid Unicode",
}  # fmt: skip
"""Other odd files, and what the run says of them."""


def odd_images(folder: Path) -> None:
    """What folders of people contain besides."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (70, 64, 3), np.uint8))
    Image.fromarray(rng.integers(0, 256, (40, 300, 3), np.uint8)).save(folder / "wide.jpg")
    Image.fromarray(rng.integers(0, 256, (70, 64), np.uint8)).save(folder / "gray.png")
    Image.fromarray(rng.integers(0, 256, (64, 64, 4), np.uint8)).save(folder / "transparent.png")
    Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).save(folder / "tiny.PNG")
    Image.fromarray(rng.integers(0, 65536, (70, 64), np.uint16)).save(folder / "deep.png")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    noise.save(folder / "animated.gif", save_all=True, append_images=[noise.rotate(90, expand=False)])
    noise.save(folder / "truncated.jpg")
    data = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "empty.png").write_bytes(b"")
    for name in (*USABLE, *UNUSABLE):
        (folder / f"{name}.txt").write_text(f"a {name} image\n\n  \n")
    for name in ("without-caption", "no-text", "latin"):
        noise.save(folder / f"{name}.png")
    (folder / "without-caption.txt").unlink()
    (folder / "no-text.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes("ein Vogel über Köln".encode("latin-1"))
    (folder / "notes.md").write_text("not an image")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    import shlex

    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line.removeprefix("dalle-zoo ")) for line in lines if line.startswith("dalle-zoo ")]


def bits(model: str, folder: Path) -> float:
    """Bits per image token, on images and their first captions."""
    files = sorted(folder.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text().splitlines()[0] for file in files]
    images = [Image.open(file).convert("RGB") for file in files]
    pipe = DallePipeline.from_pretrained(model)
    return -float(pipe.log_likelihood(images, captions).mean()) / math.log(2) / pipe.encode_image(images[0]).numel()


def test_every_command_of_the_page_has_its_options() -> None:
    listed = commands()
    assert [words[0] for words in listed].count("fit") == 3
    for words in listed:
        if words[0] == "fit":
            known, keys = recipe_parser("fit").parse_known_args(words[1:])
            paths = [find_recipe(known.recipe), *map(find_part, known.parts)]
            check_keys("fit", {path: read_recipe(path) for path in paths}, split_arguments(keys)[0])
    for recipe in re.findall(r"`((?:prior|dvae|ranker)/[\w.-]+)`", PAGE):
        assert find_recipe(recipe).is_file()


def test_the_split_puts_whole_samples_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_birds(Path("mine/train"), all_birds()[0], 1, 0)
    (code,) = blocks("python")
    before = len(list(Path("mine/train").iterdir()))
    exec(compile(code, "your-own-images.md", "exec"), {})
    val, train = (sorted(path.name for path in Path(f"mine/{side}").iterdir()) for side in ("val", "train"))
    assert len(val) + len(train) == before
    assert 0 < len(val) < len(train)
    for side in (val, train):
        assert {Path(name).stem for name in side if name.endswith(".txt")} == {Path(name).stem for name in side}


def test_the_plan_on_this_machine_is_in_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "prior/tiny", "--gpu", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"seconds of one step: measured on this machine, \d+ threads", printed)
    minutes = re.search(r"run of 10 steps, minutes +([\d.]+)", printed)
    assert minutes is not None
    assert 0 <= float(minutes[1]) < 60


def test_odd_images_are_used_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd_images(tmp_path)
    source = open_source(tmp_path)
    assert "1 files of other kinds (notes.md)" in caplog.text
    data = ImageTextDataset(source, transform="prior", size=64)
    assert {item["key"] for item in data} == set(USABLE)
    for name, reason in UNUSABLE.items():
        assert re.search(rf"skipped {name}: {reason}", caplog.text), name
    turned = decode_image((tmp_path / "turned.jpg").read_bytes())
    assert turned.size == (70, 64), "as its EXIF says"


@pytest.mark.slow  # two minutes: three runs that load PyTorch's parts and generate images
@quiet
def test_the_commands_run_on_birds_and_odd_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dalle-zoo"])
    write_birds(Path("mine/train"), all_birds()[0], 2, 0)
    odd_images(Path("mine/train"))
    exec(compile(blocks("python")[0], "your-own-images.md", "exec"), {})
    short = ["--trainer.max_steps", "5", "--trainer.val_check_interval", "5", "--trainer.log_every_n_steps", "1"]
    short += ["--trainer.enable_progress_bar", "false", "--data.batch_size", "16"]  # some epochs
    for words in commands():
        words = ["2" if word == "16" else word for word in words]  # images
        words = [*words, *short] if words[0] == "fit" else words
        assert main(words) == 0, words
    named = {name for name in UNUSABLE if f"skipped {name}: " in caplog.text}
    assert named == set(UNUSABLE), "five steps go over the data once, and name what they cannot use"
    assert {"birds.png", "birds-lora.png"} <= {path.name for path in Path().iterdir()}
    assert sorted(path.name for path in Path("models/mine-lora/adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.slow  # half a minute of one core
@quiet
def test_fine_tuning_beats_zero_shot_on_held_out_birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dalle-zoo"])
    train, held_out = all_birds()
    assert len(set(train) & set(held_out)) == 0
    write_birds(Path("train"), train, 4, 0)
    write_birds(Path("val"), held_out, 4, 1)
    before = bits("composition", Path("val"))
    run = ["fit", "prior/finetune", "--parts", "cpu", "--data.train", "train", "--data.val", "val", "--run", "run"]
    run += ["--trainer.max_steps", "60", "--trainer.val_check_interval", "60", "--samples.enabled", "false"]
    run += ["--model.learning_rate.peak", "5e-4", "--trainer.enable_progress_bar", "false"]
    assert main(run) == 0
    parts = ["--dvae", "composition", "--prior", "run", "--tokenizer", "composition"]
    assert main(["export", *parts, "--out", "model"]) == 0
    after = bits("model", Path("val"))
    assert after < before - 1, f"bits per token on held-out birds: {before:.2f} zero-shot, {after:.2f} fine-tuned"
