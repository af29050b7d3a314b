"""Loading Hugging Face folders, and opening saved folders with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dalle_zoo.tokenizers import BPETokenizer, HFTokenizer, TextTokenizer, load_text_tokenizer


def test_an_external_folder_loads_without_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "a": 1, "cat": 2}, "[CLS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 0)])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1}')
    opened = load_text_tokenizer(tmp_path)
    assert isinstance(opened, HFTokenizer)
    assert opened.encode("a cat") == [1, 2]


def test_vocab_size_includes_gaps() -> None:
    opened = HFTokenizer(Tokenizer(models.WordLevel({"a": 0, "cat": 9}, "a")))
    assert opened.vocab_size == 10
    assert opened.encode("cat") == [9]


def test_special_tokens_in_a_caption_round_trip() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, "a"))
    tokenizer.add_special_tokens(["<end>"])
    assert HFTokenizer(tokenizer).decode([0, 1]) == "a <end>"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_an_unreadable_folder_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match="transformers cannot open the tokenizer in"):
        load_text_tokenizer(tmp_path)


def test_vocabulary_files_are_converted(tmp_path: Path, captions: list[str]) -> None:
    native = BPETokenizer.train(captions, 300)
    model = json.loads(native.files()["tokenizer.json"])["model"]
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (slow / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    opened = load_text_tokenizer(slow)
    assert isinstance(opened, HFTokenizer)
    # The same merges; GPT-2 puts no space in front.
    assert opened.encode(" a red apple") == native.encode("a red apple")
    opened.save(tmp_path / "fast")
    assert load_text_tokenizer(tmp_path / "fast").encode(captions[0]) == opened.encode(captions[0])


def test_transformers_opens_a_saved_folder(tokenizer: TextTokenizer, saved: Path, captions: list[str]) -> None:
    from transformers import AutoTokenizer

    external = AutoTokenizer.from_pretrained(str(saved), local_files_only=True)
    for caption in captions:
        ids = tokenizer.encode(caption)
        assert external(caption, add_special_tokens=False).input_ids == ids
        assert external.decode(ids) == caption
