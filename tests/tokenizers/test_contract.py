"""The contract of every registered text tokenizer."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dalle_zoo.registry import UnknownNameError
from dalle_zoo.tokenizers import (
    TEXT_TOKENIZERS,
    CaptionEncoder,
    TextTokenizer,
    load_text_tokenizer,
)
from dalle_zoo.tokenizers.library import LibraryTokenizer


def test_registered_name_is_the_kind(tokenizer: TextTokenizer) -> None:
    assert TEXT_TOKENIZERS[tokenizer.kind] is type(tokenizer)


def test_round_trip_and_range(tokenizer: TextTokenizer, captions: list[str]) -> None:
    for caption in captions:
        ids = tokenizer.encode(caption)
        assert ids
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == caption


def test_empty_caption(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_decoding_drops_padding(tokenizer: TextTokenizer, captions: list[str]) -> None:
    row = CaptionEncoder(tokenizer, 64)(captions[:1])[0]
    assert (row >= tokenizer.vocab_size).any()
    assert tokenizer.decode(row) == tokenizer.decode(row.tolist()) == captions[0]


def test_save_and_load(tokenizer: TextTokenizer, saved: Path, captions: list[str]) -> None:
    for opened in (load_text_tokenizer(saved), type(tokenizer).load(str(saved))):
        assert type(opened) is type(tokenizer)
        assert opened.vocab_size == tokenizer.vocab_size
        assert opened.files() == tokenizer.files()
        assert [opened.encode(c) for c in captions] == [tokenizer.encode(c) for c in captions]


def test_save_writes_only_its_files_and_replaces_them(tokenizer: TextTokenizer, saved: Path) -> None:
    names = {"tokenizer_config.json", *tokenizer.files()}
    for name in names:
        (saved / name).write_text("half a fi")
    tokenizer.save(saved)
    assert {path.name for path in saved.iterdir()} == names
    assert load_text_tokenizer(saved).files() == tokenizer.files()


def test_failed_save_keeps_the_old_file(
    tokenizer: TextTokenizer, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_library_opens_the_file(library_tokenizer: LibraryTokenizer, saved: Path, captions: list[str]) -> None:
    external = Tokenizer.from_file(str(saved / "tokenizer.json"))
    for caption in captions:
        assert external.encode(caption, add_special_tokens=False).ids == library_tokenizer.encode(caption)


@pytest.mark.usefixtures("library_tokenizer")
def test_the_saved_file_has_no_dropout(saved: Path) -> None:
    model = json.loads((saved / "tokenizer.json").read_text())["model"]
    assert model.get("dropout") is None


def test_tokenizers_can_be_pickled(tokenizer: TextTokenizer, captions: list[str]) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [copy.encode(c) for c in captions] == [tokenizer.encode(c) for c in captions]


def test_invalid_arguments_raise(tokenizer: TextTokenizer) -> None:
    for wrong in (None, 3, b"bytes", ["a"]):
        with pytest.raises(TypeError, match="caption must be a str"):
            tokenizer.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("half a pair \ud83c")
    with pytest.raises(ValueError, match="seed must be at least 0"):
        tokenizer.encode("a", seed=-1)
    with pytest.raises(ValueError, match="dropout must be in"):
        tokenizer.encode("a", dropout=1.5)
    with pytest.raises(ValueError, match="ids must be at least 0"):
        tokenizer.decode([0, -1])
    if not tokenizer.supports_dropout:
        with pytest.raises(ValueError, match="does not support dropout"):
            tokenizer.encode("a", dropout=0.1)
        with pytest.raises(ValueError, match="does not support dropout"):
            CaptionEncoder(tokenizer, 8, dropout=0.1)


def test_same_ids_in_another_process(tokenizer: TextTokenizer, saved: Path, captions: list[str]) -> None:
    dropout = 0.3 if tokenizer.supports_dropout else 0.0
    program = f"""
import json, sys
from dalle_zoo.tokenizers import load_text_tokenizer
tokenizer = load_text_tokenizer(sys.argv[1])
captions = json.load(sys.stdin)
ids = [tokenizer.encode(c, dropout={dropout}, seed=i) for i, c in enumerate(captions)]
assert "transformers" not in sys.modules and "lightning" not in sys.modules
json.dump(ids, sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved)],
        input=json.dumps(captions),
        env=os.environ | {"PYTHONHASHSEED": "4321", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    native = [tokenizer.encode(c, dropout=dropout, seed=i) for i, c in enumerate(captions)]
    assert json.loads(done.stdout) == native


def test_a_missing_folder_raises(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*gone does not exist"):
        type(tokenizer).load(tmp_path / "gone")


def test_missing_files_raise(library_tokenizer: LibraryTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        type(library_tokenizer).load(tmp_path)


def test_a_corrupt_tokenizer_json_raises(library_tokenizer: LibraryTokenizer, saved: Path) -> None:
    (saved / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a file of the tokenizers library"):
        type(library_tokenizer).load(saved)


@pytest.mark.usefixtures("tokenizer")
def test_a_corrupt_config_raises(saved: Path) -> None:
    for content in ("{", "[1]", '"bpe"'):
        (saved / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            load_text_tokenizer(saved)


def test_loading_another_kind_raises(tokenizer: TextTokenizer, saved: Path) -> None:
    for name, other in TEXT_TOKENIZERS.items():
        if name != tokenizer.kind:
            with pytest.raises(ValueError, match=f"has a tokenizer of kind '{tokenizer.kind}'"):
                other.load(saved)
    (saved / "tokenizer_config.json").write_text('{"text_tokenizer": "bpee"}')
    with pytest.raises(UnknownNameError, match="Did you mean 'bpe'"):
        load_text_tokenizer(saved)


def test_padding_differs_by_position(tokenizer: TextTokenizer) -> None:
    row = CaptionEncoder(tokenizer, 5)([""])
    assert torch.equal(row, tokenizer.vocab_size + torch.arange(5)[None])
