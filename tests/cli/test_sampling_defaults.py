"""A model states how it is sampled where a call does not: from ``export`` to images, files of prompts and requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dalle_zoo import DallePipeline
from dalle_zoo.cli.main import main
from dalle_zoo.image_settings import read_settings
from dalle_zoo.model_folder import SAMPLING, ModelFolderError, write_checksums
from dalle_zoo.sampling import SamplingDefaults, SamplingOptions


@pytest.fixture
def cool(model: Path, scratch: Path) -> Path:
    """The model, exported with a temperature and a guidance scale of its own."""
    for stage in ("dvae", "prior"):
        shutil.copytree(model / stage, scratch / "runs" / stage / "model" / stage)
    parts = ["--dvae", "runs/dvae", "--prior", "runs/prior", "--tokenizer", str(model)]
    assert main(["export", *parts, "--temperature", "0.5", "--guidance-scale", "2", "--out", "cool"]) == 0
    return scratch / "cool"


def test_a_call_takes_what_it_does_not_state_from_the_model(cool: Path) -> None:
    pipe = DallePipeline.from_pretrained(cool)
    assert pipe.sampling == SamplingDefaults(0.5, 2.0)
    for stated, options in (
        ({}, SamplingOptions(temperature=0.5, guidance_scale=2)),
        ({"temperature": 1, "guidance_scale": 1}, SamplingOptions()),
        ({"temperature": 0, "top_k": 3}, SamplingOptions(temperature=0, top_k=3, guidance_scale=2)),
    ):
        output = pipe("a cat", seed=0, **stated)
        assert output.settings[0].options() == options
        text, seeds = pipe.encode_text("a cat"), output.seeds[:, None]
        assert pipe("a cat", seed=0, output_type="latent", **stated).images.equal(pipe.sample(text, seeds, options)[0])


def test_defaults_are_stored_with_the_model_unless_they_are_plain(cool: Path, model: Path, scratch: Path) -> None:
    assert json.loads((cool / SAMPLING).read_text()) == {"temperature": 0.5, "guidance_scale": 2.0}
    DallePipeline.from_pretrained(cool).save_pretrained("copy")
    assert DallePipeline.from_pretrained("copy").sampling == SamplingDefaults(0.5, 2.0)
    DallePipeline.from_pretrained(model).save_pretrained(cool, overwrite=True)
    assert not (cool / SAMPLING).exists()
    assert DallePipeline.from_pretrained(cool).sampling == SamplingDefaults()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be of the type float, got 'hot'"),
        ({"guidance_scale": 1e9}, "guidance_scale must be"),
        ({"guidance": 2}, "unknown field 'guidance'"),
    ],
)
def test_bad_defaults_name_the_file(cool: Path, values: dict[str, object], message: str) -> None:
    (cool / SAMPLING).write_text(json.dumps(values))
    write_checksums(cool)
    with pytest.raises(ModelFolderError) as raised:
        DallePipeline.from_pretrained(cool)
    assert str(cool / SAMPLING) in str(raised.value)
    assert message in str(raised.value)


def test_export_refuses_bad_defaults_and_defaults_of_adapters(
    model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--dvae", str(model), "--prior", str(model), "--tokenizer", str(model)]
    assert main(["export", *parts, "--temperature", "-1", "--out", "mine"]) == 2
    assert "temperature must be" in capsys.readouterr().err
    assert not (scratch / "mine").exists()
    with pytest.raises(SystemExit):
        main(["export", "--adapter", "runs/finetune", "--guidance-scale", "2", "--out", "mine"])
    assert "omit --guidance-scale" in capsys.readouterr().err


def test_commands_sample_as_the_model_says(cool: Path, scratch: Path) -> None:
    assert main(["generate", "a cat", "--model", "cool", "-n", "1", "--seed", "0", "--out", "a.png"]) == 0
    assert read_settings(scratch / "a.png").options() == SamplingOptions(temperature=0.5, guidance_scale=2)
    assert main(["generate", "--like", "a.png", "--out", "b.png"]) == 0
    assert (scratch / "b.png").read_bytes() == (scratch / "a.png").read_bytes()
    rows = [{"prompt": "a cat"}, {"prompt": "a cat", "temperature": 1}]
    (scratch / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--model", "cool", "--folder", "out", "--guidance-scale", "3"]
    assert main(["generate", "--prompts", "rows.jsonl", *common]) == 0
    lines = [json.loads(line) for line in (scratch / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(line["temperature"], line["guidance_scale"]) for line in lines] == [(0.5, 3.0), (1.0, 3.0)]


def test_whether_a_negative_prompt_acts_depends_on_the_model(
    cool: Path, model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch / "rows.txt").write_text("a cat\n")
    for source in (["a cat", "-n", "1"], ["--prompts", "rows.txt"]):
        common = ["generate", *source, "--negative-prompt", "a dog"]
        assert main([*common, "--model", "cool"]) == 0
        for refused in (["--model", str(model)], ["--model", "cool", "--guidance-scale", "1"]):
            assert main([*common, *refused, "--overwrite"]) == 2
            assert "negative_prompt acts through guidance" in capsys.readouterr().err
