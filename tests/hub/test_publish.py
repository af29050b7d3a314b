"""Publishing with the real client: checked beforehand, atomic, with a card of the measured scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from dalle_zoo import DallePipeline
from dalle_zoo.cli.main import main
from dalle_zoo.files import read_json, write_json
from dalle_zoo.hub import upload
from dalle_zoo.hub_errors import HubError
from dalle_zoo.model_folder import ModelFolderError, write_checksums
from dalle_zoo.publish import Publication, prepare

ROOT = Path(__file__).parents[2]
TOKEN = "hf_owner"

# Replaces the upload of files, which the client implements without its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def make_result(folder: Path, **changes: Any) -> dict[str, Any]:
    """A result file for the weights of a model."""
    listed = json.loads((folder / "sha256.json").read_text())
    return {
        "protocol": {"name": "coco-30k", "title": "MS-COCO, 30,000 captions"},
        "source": {"name": "toy", "weights_sha256": {n: d for n, d in listed.items() if n.endswith(".safetensors")}},
        "groups": {"all": {"samples": 30000, "captions": 30000, "dataset": {"sha256": "0"}}},
        "metrics": {
            "fid": {
                "label": "FID", "unit": "", "format": ".2f", "section": "", "parts": {},
                "extractor": ["inception-2015", "dmgan"], "sweep": True, "bars": False, "lower_is_better": True,
            }
        },
        "scores": [
            {"metric": "fid", "family": "inception-2015", "value": 27.345, "samples": 30000, "candidates": 512}
        ],
    } | changes  # fmt: skip


@pytest.fixture
def result(model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "coco-30k.json"
    path.write_text(json.dumps(make_result(model_folder)))
    return path


def publish(publication: Publication, **options: Any) -> str:
    return upload(publication.name, publication.files, **options)


def again_with(folder: Path, **record: str) -> Path:
    """Changes the record of a model, and its checksums."""
    write_json(folder / "record.json", read_json(folder / "record.json") | record)
    write_checksums(folder)
    return folder


# ------------------------------------------------------------ end to end


def test_published_model_round_trips(
    local_hub: Any, model_folder: Path, result: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    (run / "model/prior").mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 0\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["publish", str(model_folder), "org/toy", "--result", str(result), "--run", str(run)]
    assert main([*arguments, "--recipe", "prior/tiny", "--private"]) == 0
    assert f"{local_hub.url}/org/toy/commit/" in capsys.readouterr().out
    files = local_hub.files("org/toy")
    listed = json.loads(files["sha256.json"])
    assert set(files) == {*listed, "sha256.json", "README.md", ".gitattributes"}
    assert {"results/coco-30k.json", "runs/prior.yaml", "recipes/prior-tiny.yaml", "record.json"} <= set(listed)
    assert local_hub.repositories["org/toy"].private
    assert len(local_hub.repositories["org/toy"].commits) == 2, "one commit, after that of the empty repository"
    pipe = DallePipeline.from_pretrained("org/toy")
    mine = DallePipeline.from_pretrained(model_folder)
    generated = [p("ab", num_images_per_prompt=2, seed=0, output_type="pt").images for p in (pipe, mine)]
    assert torch.equal(*generated)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="or it is private and the token does not give access"):
        DallePipeline.from_pretrained("org/toy", cache_dir=tmp_path / "empty")


def test_pipeline_is_pushed(local_hub: Any, model_folder: Path) -> None:
    pipe = DallePipeline.from_pretrained(model_folder)
    first = pipe.push_to_hub("org/toy", token=TOKEN)
    second = pipe.push_to_hub("org/toy", token=TOKEN, dtype=torch.float16, revision="half")
    branches = local_hub.repositories["org/toy"].branches
    assert first.endswith(f"/commit/{branches['main']}")
    assert second.endswith(f"/commit/{branches['half']}")
    assert "prior/model.safetensors" in local_hub.files("org/toy")
    assert "Nothing was measured." in local_hub.files("org/toy")["README.md"].decode()
    for revision in ("main", "half"):
        assert DallePipeline.from_pretrained("org/toy", revision=revision).prior.config == pipe.prior.config


def test_publishing_again_uploads_only_changes(local_hub: Any, model_folder: Path, result: Path) -> None:
    publish(prepare(model_folder, "org/toy", results=[result]), token=TOKEN)
    commits, uploads = len(local_hub.repositories["org/toy"].commits), len(local_hub.uploads)
    publish(prepare(model_folder, "org/toy", results=[result]), token=TOKEN)
    assert len(local_hub.repositories["org/toy"].commits) == commits, "nothing changed"
    publish(prepare(again_with(model_folder, description="Better."), "org/toy"), token=TOKEN)
    assert len(local_hub.uploads) == uploads, "the weights were there"
    files = local_hub.files("org/toy")
    assert json.loads(files["record.json"])["description"] == "Better."
    assert "results/coco-30k.json" not in files, "what is no longer part of the model goes"
    assert ".gitattributes" in files


def test_interrupted_upload_changes_nothing_and_continues(local_hub: Any, model_folder: Path) -> None:
    publish(prepare(model_folder, "org/toy"), token=TOKEN)
    before = local_hub.files("org/toy")
    pipe = DallePipeline.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in pipe.prior.parameters():
            parameter.add_(1)
    pipe.save_pretrained(model_folder, overwrite=True, shard_bytes=8192)
    local_hub.uploads.clear()
    local_hub.stall_after = 1
    command = [sys.executable, "-m", "dalle_zoo", "publish", str(model_folder), "org/toy"]
    offline = {"HF_ENDPOINT": local_hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **offline})
    assert local_hub.stalled.wait(120)
    process.kill()
    process.wait()
    assert local_hub.files("org/toy") == before
    assert local_hub.uploads, "something had arrived"
    local_hub.stall_after = None
    publish(prepare(model_folder, "org/toy"), token=TOKEN)
    assert len(local_hub.uploads) == len(set(local_hub.uploads)), "nothing was sent twice"
    assert local_hub.files("org/toy")["sha256.json"] == prepare(model_folder, "org/toy").files["sha256.json"]
    text = DallePipeline.from_pretrained("org/toy").prior.start_of_text
    assert torch.equal(text, DallePipeline.from_pretrained(model_folder).prior.start_of_text)


def test_missing_write_permission_is_reported(local_hub: Any, on_the_hub: str, model_folder: Path) -> None:
    publication = prepare(model_folder, on_the_hub)
    with pytest.raises(HubError, match=r"org/toy on .* cannot be written to with this token"):
        publish(publication, token="hf_stranger")
    with pytest.raises(HubError, match="org/toy exists and is public: make it private on the Hub"):
        publish(publication, token=TOKEN, private=True)
    assert len(local_hub.repositories[on_the_hub].commits) == 1


def test_unrelated_repository_is_not_changed(local_hub: Any, on_the_hub: str, model_folder: Path) -> None:
    repository = local_hub.repositories[on_the_hub]
    commit = repository.commit({"README.md": local_hub.store(b"x"), "thesis.json": local_hub.store(b"{}")}, "main")
    with pytest.raises(HubError, match="org/toy contains files that are not a model of dalle-zoo"):
        publish(prepare(model_folder, on_the_hub), token=TOKEN)
    assert repository.branches["main"] == commit
    new = {"README.md": local_hub.store(b"---\nlicense: mit\n---\n"), "LICENSE": local_hub.store(b"MIT")}
    repository.commit(new, "main")  # as the Hub creates a repository
    publish(prepare(model_folder, on_the_hub), token=TOKEN)
    assert local_hub.files(on_the_hub)["LICENSE"] == b"MIT"


def add_on_the_hub(local_hub: Any, name: str, files: dict[str, bytes]) -> str:
    """A commit that was made on the Hub, after those of dalle-zoo."""
    repository = local_hub.repositories[name]
    head = repository.commits[repository.branches["main"]]
    return str(repository.commit(head | {path: local_hub.store(data) for path, data in files.items()}, "main"))


def test_publishing_again_deletes_only_published_files(local_hub: Any, model_folder: Path, result: Path) -> None:
    publish(prepare(model_folder, "org/toy", results=[result]), token=TOKEN)
    others = {"LICENSE": b"MIT", "samples/cat.png": b"png", "results/others.json": b"{}"}
    add_on_the_hub(local_hub, "org/toy", others)
    publish(prepare(model_folder, "org/toy"), token=TOKEN)
    files = local_hub.files("org/toy")
    assert "results/coco-30k.json" not in files
    assert {name: files.get(name) for name in others} == others


def test_unrelated_file_is_not_replaced(local_hub: Any, model_folder: Path, result: Path) -> None:
    publish(prepare(model_folder, "org/toy"), token=TOKEN)
    commit = add_on_the_hub(local_hub, "org/toy", {"results/coco-30k.json": b"{}"})
    with pytest.raises(HubError, match=r"org/toy contains results/coco-30k\.json, which dalle-zoo did not publish"):
        publish(prepare(model_folder, "org/toy", results=[result]), token=TOKEN)
    assert local_hub.repositories["org/toy"].branches["main"] == commit


def test_edited_card_is_not_replaced(local_hub: Any, model_folder: Path) -> None:
    publish(prepare(model_folder, "org/toy"), token=TOKEN)
    card = local_hub.files("org/toy")["README.md"]
    publication = prepare(again_with(model_folder, description="Better."), "org/toy")
    for edited in (
        card.replace(b"A toy.", b"My toy."),
        card + b"Thanks!\n",
        card.replace(b"apache-2.0", b"mit"),
        b"x",
    ):
        assert edited != card
        commit = add_on_the_hub(local_hub, "org/toy", {"README.md": edited})
        with pytest.raises(HubError, match=r"README\.md of org/toy was written or edited on the Hub, and would be"):
            publish(publication, token=TOKEN)
        assert local_hub.repositories["org/toy"].branches["main"] == commit
    add_on_the_hub(local_hub, "org/toy", {"README.md": card})
    publish(publication, token=TOKEN)
    assert b"Better." in local_hub.files("org/toy")["README.md"]


def test_concurrent_commit_is_retained(
    local_hub: Any, on_the_hub: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = local_hub.repositories[on_the_hub]
    commit = HfApi.create_commit

    def late(*arguments: Any, **options: Any) -> Any:
        repository.commit(repository.commits[repository.branches["main"]], "main")
        return commit(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    publication = prepare(again_with(model_folder, description="Better."), on_the_hub)
    with pytest.raises(
        HubError, match="received another commit in the meantime; nothing was changed: run the same command again"
    ):
        publish(publication, token=TOKEN)
    assert len(repository.commits) == 2


def test_unreachable_hub_is_reported(local_hub: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    publication = prepare(model_folder, "org/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot be written to: HF_HUB_OFFLINE is set"):
        publish(publication, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"did not respond .*: check the network; the same command resumes"):
        publish(publication, token=TOKEN)


# ------------------------------------------------------------ checks before anything is sent


def test_dry_run_prints_files_and_card(model_folder: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(model_folder), "org/toy", "--result", str(result), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{(model_folder / 'dvae/model.safetensors').stat().st_size:>14,}  dvae/model.safetensors" in shown
    assert "results/coco-30k.json" in shown
    assert "# org/toy" in shown
    assert "| FID, inception-2015, best of 512 | coco-30k | – | 27.34 | samples 30000, candidates 512 |" in shown


def test_card_has_metadata_that_the_client_reads(model_folder: Path, result: Path) -> None:
    data: Any = ModelCard(prepare(model_folder, "org/toy", results=[result]).card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "dalle-zoo", "text-to-image")
    (figure,) = data.eval_results
    assert (figure.metric_type, figure.metric_value, figure.dataset_type) == ("fid", 27.345, "coco-30k")
    assert figure.metric_args == {"samples": 30000, "candidates": 512}
    assert data.model_name == "org/toy"
    plain: Any = ModelCard(prepare(model_folder, "org/toy").card).data
    assert plain.eval_results is None


@pytest.mark.parametrize(
    ("stated", "identifier", "name"),
    [
        ("CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", None),
        ("Modified MIT (OpenAI): as it says", "other", "modified-mit-openai-as-it-says"),
        ("MIT AND Apache-2.0", "other", "mit-and-apache-2.0"),
    ],
)
def test_license_is_known_to_the_hub(model_folder: Path, stated: str, identifier: str, name: str | None) -> None:
    card = prepare(again_with(model_folder, license=stated), "org/toy").card
    data: Any = ModelCard(card).data
    assert (data.license, data.get("license_name")) == (identifier, name)
    assert f"Weights: {stated}." in card


@pytest.mark.parametrize(
    ("field", "value"),
    [("license", "unknown"), ("license", "unknown: see there"), ("license", ""), ("data", "unknown")],
)
def test_incomplete_record_raises(model_folder: Path, field: str, value: str) -> None:
    with pytest.raises(ModelFolderError, match=rf"record.json does not state {field} .*export --{field}"):
        prepare(again_with(model_folder, **{field: value}), "org/toy")


def test_incomplete_folder_raises(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'toy' is not a name on the Hub: expected organization/name"):
        prepare(model_folder, "toy")
    with pytest.raises(ModelFolderError, match=r"has no model_index.json"):
        prepare(tmp_path, "org/toy")
    (model_folder / "prior/notes.pkl").write_bytes(b"x")
    write_checksums(model_folder)
    with pytest.raises(ModelFolderError, match=r"lists 'prior/notes.pkl': only .json, .safetensors"):
        prepare(model_folder, "org/toy")
    (model_folder / "prior/notes.pkl").unlink()
    with pytest.raises(ModelFolderError, match=r"notes.pkl is missing"):
        prepare(model_folder, "org/toy")
    for path in (model_folder / "tokenizer").iterdir():
        path.unlink()
    write_checksums(model_folder)
    with pytest.raises(ModelFolderError, match=r"has no tokenizer, which model_index.json lists"):
        prepare(model_folder, "org/toy")


def test_result_of_other_weights_raises(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps(make_result(model_folder, source={"name": "toy", "weights_sha256": {"prior/x.safetensors": "0"}}))
    )
    with pytest.raises(ModelFolderError, match="measured with other weights"):
        prepare(model_folder, "org/toy", results=[other])
    other.write_text(json.dumps({"scores": []}))
    with pytest.raises(ValueError, match="expected a result file of dalle-zoo eval"):
        prepare(model_folder, "org/toy", results=[other])
    with pytest.raises(ValueError, match="is not a finished run"):
        prepare(model_folder, "org/toy", runs=[tmp_path])


def test_only_rendered_card_is_published(model_folder: Path, result: Path) -> None:
    rendered = prepare(model_folder, "org/toy", results=[result]).card
    card = model_folder / "README.md"
    card.write_text(rendered)
    assert prepare(model_folder, "org/toy", results=[result]).card == rendered
    refused = r"README\.md differs from the card that is rendered for org/toy from record\.json and the result files"
    by_hand = "# Mine\n\nIts FID is 27.3, measured by `nobody`.\n"
    for text in (rendered.replace("27.34", "12.34"), rendered + "\nIts FID is twelve.\n", by_hand, ""):
        assert text != rendered
        card.write_text(text)
        with pytest.raises(ValueError, match=refused):
            prepare(model_folder, "org/toy", results=[result])
    card.write_text(rendered)
    with pytest.raises(ValueError, match=refused):  # without the result file, its numbers are unproven
        prepare(model_folder, "org/toy")


def test_free_text_of_card_comes_from_record(model_folder: Path) -> None:
    text = "Trained on few images.\n\nIt cannot write."
    assert text in prepare(again_with(model_folder, description=text), "org/toy").card
