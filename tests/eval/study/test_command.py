"""The command ``dalle-zoo study``: its options and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from dalle_zoo_eval.study.command import main
from dalle_zoo_eval.study.design import Study

from dalle_zoo.cli.errors import UserError
from dalle_zoo.registry import UnknownNameError
from tests.eval.study.conftest import write_systems


def test_make_writes_page_codes_and_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_systems(tmp_path, ("ours", "theirs"))
    systems = [str(tmp_path / name) for name in ("ours", "theirs")]
    common = ["make", *systems, "--captions", str(tmp_path / "captions.txt"), "--votes", "2", "--controls", "1"]
    main([*common, "--out", str(tmp_path / "one")])
    assert "2 raters, at most 8 answers each" in capsys.readouterr().out
    study = Study.read(tmp_path / "one")
    assert study.systems == ("ours", "theirs")
    addresses = (tmp_path / "one/raters.txt").read_text().splitlines()
    assert addresses == [f"index.html#{rater.code}" for rater in study.raters]
    main([*common, "--out", str(tmp_path / "two"), "--name", "A", "--name", "B"])
    assert Study.read(tmp_path / "two").systems == ("A", "B")
    with pytest.raises(FileExistsError, match="not empty"):
        main([*common, "--out", str(tmp_path / "one")])
    with pytest.raises(UserError, match="--name is given 1 times for 2 systems"):
        main([*common, "--out", str(tmp_path / "three"), "--name", "A"])
    with pytest.raises(ValueError, match="two systems have the name 'A'"):
        main([*common, "--out", str(tmp_path / "three"), "--name", "A", "--name", "A"])
    assert not (tmp_path / "three").exists()


def test_mistakes_raise_with_explanation(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="mak"):
        main(["mak"])
    with pytest.raises(ValueError, match=r"study\.json is missing: expected the folder of a study"):
        main(["serve", str(tmp_path)])
    with pytest.raises(UserError, match=r"--port must be 0\.\.65535, got 70000"):
        main(["serve", str(tmp_path), "--port", "70000"])
    with pytest.raises(ValueError, match=r"no study\.json at or above .*: give the folder of the study with --study"):
        main(["report", str(tmp_path)])
