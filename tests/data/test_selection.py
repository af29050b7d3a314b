"""Selection of data files in a folder, and reports of ignored files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_zoo.data import FolderSource, ShardSource, Skipped, open_source
from dalle_zoo.data.decoding import FORMATS
from dalle_zoo.data.selection import IMAGE_SUFFIXES, select
from dalle_zoo.paths import user_path


def write(root: Path, *names: str, data: bytes = b"x") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def keys(source: Any) -> list[str]:
    return [sample.key for sample in source.stream()]


def test_suffixes_match_decoded_formats() -> None:
    Image.init()
    known = {suffix[1:] for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    optional = {"avif", "avifs", "webp"}  # builds of Pillow may lack them
    assert known | optional == IMAGE_SUFFIXES


def test_caption_suffixes_ignore_case(make: Any) -> None:
    root = write(make.root / "in", "a.PNG", "b.jfif", "c.png", data=make.image())
    write(root, "a.TXT", "c.Json", "c.txt", data=b'{"caption": "a thing"}')
    write(root, "b.TXT", data=b"upper")
    write(root, "b.txt", data=b"lower")
    captions = {sample.key: sample.captions for sample in FolderSource(root).stream()}
    assert captions == {"a": ('{"caption": "a thing"}',), "b": ("lower",), "c": ("a thing",)}


def test_other_files_are_reported_in_one_line(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = write(make.root / "in", "a.png", data=make.image())
    write(
        root, "a.txt", "._a.png", ".DS_Store", "__MACOSX/b.png", ".cache/x.png", "notes.txt", "c.heic", "sub/old.tgz"
    )
    assert keys(open_source(root)) == ["a"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"folder {root}: 1 images; ignored: 1 archives (sub/old.tgz), 1 files of other kinds (c.heic), "
        "4 hidden files (.DS_Store, ._a.png, .cache), 1 texts without an image (notes.txt)"
    )


def test_clean_folder_is_read_without_messages(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    open_source(write(make.root / "in", "a.png", "a.txt"))
    assert not caplog.records


def test_mixed_images_and_archives_raise(make: Any) -> None:
    folder = make.shards(2)
    write(folder, "._00000.tar", "images/a.png")
    with pytest.raises(ValueError, match=r"both images, such as 'images/a.png', and archives, such as '00000.tar'"):
        open_source(folder)
    with pytest.raises(ValueError, match="both images"):
        FolderSource(folder).images  # noqa: B018 (evaluation reads this)
    assert isinstance(open_source(f"{folder}/*.tar"), ShardSource)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("run.json", "report.html", "samples.png"), "an evaluation"),
        (("run.json", ".cache/a"), "an evaluation"),
        (("report.md", "report.html", "bars.png"), "a report"),
        (("config.yaml", "checkpoints/a.ckpt", "images/a.png"), "a training run"),
        (("config.yaml", "metrics/a.csv"), "a training run"),
        (("model_index.json", "dvae/config.json"), "a model"),
    ],
)
def test_output_of_dalle_zoo_is_not_read(
    make: Any, files: tuple[str, ...], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(make.root / "in", "a.png", data=make.image())
    write(root / "out", *files)
    assert keys(open_source(root)) == ["a"]
    assert "1 folders written by dalle-zoo (out)" in caplog.text
    with pytest.raises(ValueError, match=rf"is the output of dalle-zoo \({kind}\)"):
        open_source(root / "out")


def test_linked_folders_are_read_and_cycles_are_reported(make: Any) -> None:
    write(make.root / "real", "a.png", "sub/b.png")
    linked = write(make.root / "linked", "c.png")
    (linked / "r").symlink_to(make.root / "real")
    (make.root / "real/back").symlink_to(linked)
    (linked / "up").symlink_to(make.root)
    selection = select(linked)
    assert [path.as_posix() for path in selection.images] == ["c.png", "r/a.png", "r/sub/b.png"]
    assert selection.passed_over == {"links to a folder above them": ["up", "r/back"]}


def test_broken_links_and_pipes_are_counted_and_listed(make: Any) -> None:
    root = write(make.root / "in", "a.png", data=make.image())
    (root / "b.png").symlink_to("/nowhere/b.png")
    os.mkfifo(root / "c.png")
    source = open_source(root)
    records = list(source.read(seed=None, epoch=0, start=0, stop=3))
    assert source.num_samples == 3
    assert records[1:] == [
        Skipped("b", "a broken link"),
        Skipped("c", "not a file"),
    ]


def test_names_that_are_not_utf8_are_escaped(make: Any) -> None:
    root = write(make.root / "in", "a.png", data=make.image())
    for name in (b"caf\xe9", b"caf\xe8"):
        write(root, os.fsdecode(name + b".png"), data=make.image())
        write(root, os.fsdecode(name + b".txt"), data=b"coffee")
    source = open_source(root)
    assert keys(source) == ["a", "caf\\udce8", "caf\\udce9"]
    assert [key.encode() for key in keys(source)]
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize("location", ["", " "])
def test_empty_location_raises(make: Any, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(make.root / "in", "a.png", data=make.image()))
    assert open_source(".").num_samples == 1
    with pytest.raises(ValueError, match="location of the data is empty, as an unset variable is"):
        open_source(location)


def test_home_folder_is_expanded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(make.root))
    assert user_path("~/x") == make.root / "x"
    with pytest.raises(ValueError, match="location of the data '~nobody-here/x': this home folder is not known"):
        open_source("~nobody-here/x")


def test_folder_without_images_raises_with_its_contents(make: Any) -> None:
    make.shards(1, folder="in/part")
    with pytest.raises(ValueError, match=r"holds no image \(0 images; ignored: 1 archives \(part/00000.tar\)\)"):
        open_source(make.root / "in")
