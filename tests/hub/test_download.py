"""Models of the Hub with the real client: found, pinned, verified, and used offline."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from dalle_zoo import DallePipeline, load_model, zoo
from dalle_zoo.hub import Access, download, is_hub_name
from dalle_zoo.hub_errors import HubError
from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.registry import UnknownNameError
from tools import fuzz_files

TOKEN = "hf_owner"


def change(hub: Any, path: str, content: bytes, branch: str = "main") -> str:
    """Replaces a file of org/toy in a new commit, which is returned."""
    repository = hub.repositories["org/toy"]
    files = repository.commits[repository.branches[branch]] | {path: hub.store(content)}
    commit: str = repository.commit(files, branch)
    return commit


def test_downloaded_model_equals_the_published_folder(on_the_hub: str, model_folder: Path) -> None:
    pipe = DallePipeline.from_pretrained(on_the_hub)
    mine = DallePipeline.from_pretrained(model_folder)
    generated = [p("ab", num_images_per_prompt=2, seed=0, output_type="pt").images for p in (pipe, mine)]
    assert torch.equal(*generated)
    half = DallePipeline.from_pretrained(on_the_hub, dtype=torch.bfloat16)
    assert half.prior.start_of_text.dtype == torch.bfloat16
    assert half.image_tokenizer.encoder.input.weight.dtype == torch.float32  # type: ignore[attr-defined]


def test_only_listed_files_are_downloaded(on_the_hub: str, local_hub: Any) -> None:
    change(local_hub, "prior/evil.pkl", b"code")
    change(local_hub, "stray.json", b"{}")
    folder = download(on_the_hub)
    listed = json.loads((folder / "sha256.json").read_text())
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*listed, "sha256.json"}


def test_single_part_is_downloaded_and_verified(on_the_hub: str, local_hub: Any) -> None:
    net = load_model(on_the_hub, "dvae")
    assert net.codebook_size == 7
    assert not [path for _, path in local_hub.requests if "/prior/" in path]
    with pytest.raises(
        UnknownNameError, match=r"unknown component 'ranker'.* Known: dvae, prior, tokenizer of org/toy"
    ):
        load_model(on_the_hub, "ranker")
    change(local_hub, "tokenizer/tokenizer_config.json", b"{}")
    with pytest.raises(ModelFolderError, match=r"tokenizer_config.json differs from its sha256"):
        zoo.find_component(on_the_hub, "tokenizer")


def test_local_folder_precedes_the_hub(
    on_the_hub: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    model_folder.rename(tmp_path / "org/toy")
    monkeypatch.chdir(tmp_path)
    assert zoo.find_model(on_the_hub) == Path("org/toy")
    assert [is_hub_name(name) for name in ("a/b", "a", "./a", "../a", "a/b/c", "/a/b", "a/.b", Path("a/b"))] == [
        True, *[False] * 7,
    ]  # fmt: skip


def test_revision_is_pinned(on_the_hub: str, local_hub: Any) -> None:
    repository = local_hub.repositories[on_the_hub]
    first = repository.branches["main"]
    repository.branches["v1"] = first
    second = change(local_hub, "record.json", b"{}")
    for revision, commit in (("v1", first), (first, first), ("main", second), (None, second)):
        assert download(on_the_hub, Access(revision=revision)).name == commit
    with pytest.raises(HubError, match="has no revision 'v2'"):
        DallePipeline.from_pretrained(on_the_hub, revision="v2")


@pytest.mark.parametrize("path", ["prior/model-00001-of-00002.safetensors", "dvae/config.json", "model_index.json"])
def test_corrupted_file_raises(on_the_hub: str, local_hub: Any, path: str) -> None:
    path = path.replace("00002", f"{len([p for p in local_hub.files(on_the_hub) if 'prior/model-' in p]):05d}")
    content = local_hub.files(on_the_hub)[path]
    change(local_hub, path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelFolderError, match=rf"{path} differs from its sha256"):
        DallePipeline.from_pretrained(on_the_hub)


def test_missing_listed_file_raises_with_its_name(on_the_hub: str, local_hub: Any) -> None:
    repository = local_hub.repositories[on_the_hub]
    files = dict(repository.commits[repository.branches["main"]])
    del files["dvae/config.json"]
    repository.commit(files, "main")
    with pytest.raises(HubError, match=r"dvae/config.json of org/toy \(\w+\) is not on the Hub"):
        DallePipeline.from_pretrained(on_the_hub)


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_private_repository_needs_token(on_the_hub: str, local_hub: Any, token: str | None) -> None:
    local_hub.repositories[on_the_hub].private = True
    with pytest.raises(
        HubError, match=r"there is no org/toy on .*, or it is private and the token does not give access"
    ):
        DallePipeline.from_pretrained(on_the_hub, token=token)
    assert DallePipeline.from_pretrained(on_the_hub, token=TOKEN).prior.config.codebook_size == 7


def test_gated_repository_is_reported(on_the_hub: str, local_hub: Any) -> None:
    local_hub.repositories[on_the_hub].gated = True
    with pytest.raises(HubError, match=r"org/toy on .* is gated: request access on its page"):
        DallePipeline.from_pretrained(on_the_hub)


@pytest.mark.slow  # the client tries again for 23 s
def test_unreachable_hub_is_reported(local_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(local_hub.url, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(HubError, match=r"did not respond .*: check the network; it is not in the cache either"):
        DallePipeline.from_pretrained("org/toy")


def test_missing_repository_or_revision_is_reported(on_the_hub: str, local_hub: Any) -> None:
    with pytest.raises(HubError, match=r"there is no org/tyo on .* no folder 'org/tyo' exists"):
        DallePipeline.from_pretrained("org/tyo")
    with pytest.raises(
        UnknownNameError, match=r"unknown model 'compositoin'. Did you mean 'composition'.* or a model on the Hub"
    ):
        DallePipeline.from_pretrained("compositoin")
    repository = local_hub.repositories[on_the_hub]
    repository.commit({"pytorch_model.bin": local_hub.store(b"x")}, "main")
    with pytest.raises(HubError, match=r"is not a model of dalle-zoo, as it has no sha256.json"):
        DallePipeline.from_pretrained(on_the_hub)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"[1]", "does not list model_index.json"),
        (b"{", "does not list model_index.json"),
        (b'{"a.json": "0"}', "does not list model_index.json"),
        (b'{"model_index.json": "0", "../a.json": "0"}', r"lists '../a.json'"),
        (b'{"model_index.json": "0", "/etc/a.json": "0"}', r"lists '/etc/a.json'"),
        (
            b'{"model_index.json": "0", "prior/a.pkl": "0"}',
            r"lists 'prior/a.pkl'.*expected paths inside the repository that end in .json",
        ),
    ],
)
def test_listed_paths_outside_the_folder_raise(on_the_hub: str, local_hub: Any, listed: bytes, message: str) -> None:
    change(local_hub, "sha256.json", listed)
    local_hub.requests.clear()
    with pytest.raises(HubError, match=message):
        DallePipeline.from_pretrained(on_the_hub)
    # The client may send requests of its own, which concern no repository.
    of_the_model = [path for _, path in local_hub.requests if on_the_hub in path]
    assert {path.rpartition("/")[2] for path in of_the_model} == {"sha256.json"}


def test_offline_uses_cache_or_reports_missing_files(
    on_the_hub: str, local_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        HubError, match=r"org/toy is neither a local folder nor in the Hub's cache.*local_files_only is set"
    ):
        DallePipeline.from_pretrained(on_the_hub, local_files_only=True)
    load_model(on_the_hub, "dvae")
    with pytest.raises(HubError, match=r"prior/.* and more of org/toy .*is not in the cache, and local_files_only"):
        DallePipeline.from_pretrained(on_the_hub, local_files_only=True)
    DallePipeline.from_pretrained(on_the_hub)
    local_hub.requests.clear()
    assert DallePipeline.from_pretrained(on_the_hub, local_files_only=True).prior.config.codebook_size == 7
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert DallePipeline.from_pretrained(on_the_hub).prior.config.codebook_size == 7
    with pytest.raises(HubError, match=r"org/other is neither a local folder.*HF_HUB_OFFLINE is set: go online once"):
        DallePipeline.from_pretrained("org/other")
    with pytest.raises(HubError, match=r"org/toy at revision 'v9' is neither"):
        DallePipeline.from_pretrained(on_the_hub, revision="v9")
    assert local_hub.requests == []


def test_cache_folder_can_be_chosen(on_the_hub: str, tmp_path: Path) -> None:
    pipe = DallePipeline.from_pretrained(on_the_hub, cache_dir=tmp_path / "elsewhere")
    assert pipe.folder is not None
    assert pipe.folder.is_relative_to(tmp_path / "elsewhere")
    assert not (tmp_path / "hub-cache").exists()


# ------------------------------------------------------------ weights of another code base


@pytest.fixture
def external(local_hub: Any) -> str:
    """A repository with a VQGAN of another code base: weights in two formats, and code."""
    weights = fuzz_files.vqgan_weights()
    buffer = io.BytesIO()
    torch.save({"state_dict": weights}, buffer)
    files = {"vqgan.ckpt": buffer.getvalue(), "run.py": b"raise SystemExit", "tf_model.h5": b"another kind"}
    local_hub.add("other/vqgan", files)
    return "other/vqgan"


def test_external_repository_is_converted_once(external: str, local_hub: Any, conversion_cache: Path) -> None:
    first = load_model(external, "dvae")
    (folder,) = (conversion_cache / "converted").iterdir()
    stamp = (folder / "record.json").stat().st_mtime_ns
    assert not [path for _, path in local_hub.requests if path.endswith((".py", ".h5"))], (
        "neither code nor other kinds"
    )
    codes = torch.randint(first.codebook_size, (1, 2, 2))
    assert torch.equal(load_model(external, "dvae").decode(codes), first.decode(codes))
    assert (folder / "record.json").stat().st_mtime_ns == stamp
    with pytest.raises(UnknownNameError, match="unknown component 'prior'"):
        load_model(external, "prior")
    with pytest.raises(ModelFolderError, match="lack prior and tokenizer, so no image can be generated"):
        DallePipeline.from_pretrained(external)


def test_only_matching_files_are_downloaded(external: str, local_hub: Any) -> None:
    with pytest.raises(HubError, match=r"other/vqgan has no file that matches \*.bin"):
        load_model(external, "dvae", files=["*.bin"])
    assert not [path for _, path in local_hub.requests if path.endswith(".ckpt")]
    assert load_model(external, "dvae", files=["*.ckpt"]).codebook_size


def test_unrelated_repository_raises(local_hub: Any) -> None:
    local_hub.add("other/text", {"config.json": b"{}"})
    with pytest.raises(
        HubError, match=r"not a model of dalle-zoo, as it has no sha256\.json, and it contains no weights"
    ):
        DallePipeline.from_pretrained("other/text")


@pytest.mark.parametrize("how", ["flag", "variable", pytest.param("no answer", marks=pytest.mark.slow)])
def test_external_repository_is_read_from_cache(
    external: str, local_hub: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.zeros(1, 2, 2, dtype=torch.long)
    first = load_model(external, "dvae").decode(codes)
    if how == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "no answer":  # a port that nobody listens on
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}")
    offline = {"local_files_only": True} if how == "flag" else {}
    assert torch.equal(load_model(external, "dvae", **offline).decode(codes), first)
    with pytest.raises(HubError, match="cache"):
        load_model("other/unseen", "dvae", **offline)


def test_patterns_match_files_in_folders(local_hub: Any) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": fuzz_files.vqgan_weights()}, buffer)
    local_hub.add("other/nested", {"weights/vqgan.ckpt": buffer.getvalue(), "weights/other.ckpt": b"x"})
    assert load_model("other/nested", "dvae", files=["vqgan*"]).codebook_size
    assert not [path for _, path in local_hub.requests if path.endswith("other.ckpt")]
