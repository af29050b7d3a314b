"""Fine-tuning: one name gives everything, adapters of every prior, words, and what a run writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from dalle_zoo import DallePipeline
from dalle_zoo.adapters import (
    LoRAConfig,
    adapter_folder,
    add_adapters,
    merge_adapters,
    merged_weights,
    save_adapters,
)
from dalle_zoo.model_folder import ADAPTER, ModelFolderError
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.networks import load_prior, save_network
from dalle_zoo.publish import prepare
from dalle_zoo.tokenizers import CaptionEncoder
from dalle_zoo.training.data_modules import ImageDataModule, TextConfig
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.words import freeze_all_but_words, limit_to_words
from dalle_zoo.zoo import find_component

SIZES = {"text_length": 5, "text_vocab": 11, "image_height": 3, "image_width": 4, "codebook_size": 9, "width": 16}
TINY: dict[str, dict[str, Any]] = {
    "prior": {**SIZES, "num_layers": 2, "num_heads": 2, "masks": "row, column"},
    "mindalle": {**SIZES, "num_layers": 2, "num_heads": 2, "padding_id": 1},
    "rudalle": {**SIZES, "num_layers": 2, "num_heads": 2},
    "dalle_mini": {
        **SIZES, "image_rows": 12, "start_token": 10, "encoder_layers": 1, "encoder_heads": 2, "encoder_hidden": 20,
        "decoder_layers": 2, "decoder_heads": 4, "decoder_hidden": 24,
    },
    "dalle_pytorch": {**SIZES, "num_layers": 2, "num_heads": 2, "head_size": 8},
}  # fmt: skip
ROUNDING = {"atol": 1e-5, "rtol": 1e-4}
"""A sum of two products, or a product of the sum, in float32."""

every_prior = pytest.mark.parametrize("kind", TINY)


def tiny(kind: str) -> ImagePrior:
    torch.manual_seed(0)
    prior = PRIORS[kind](PRIORS[kind].config_class(**TINY[kind]))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape) / 5)
    return prior


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, 11, (3, 5), generator=generator)
    return text, torch.randint(9, (3, 3, 4), generator=generator)


def trained(prior: ImagePrior, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in prior.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        prior.loss(*batch()).total.backward()
        optimizer.step()


def test_every_prior_is_covered() -> None:
    assert set(TINY) == set(PRIORS) - {"example_prior"}


@every_prior
def test_adapters_alone_are_trained_and_merge_and_open_again(kind: str, tmp_path: Path) -> None:
    prior, (text, codes) = tiny(kind), batch()
    base = tmp_path / "base"
    (base / "prior").mkdir(parents=True)
    save_network(prior, kind, base / "prior")
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    start = prior.image_logits(text, codes)
    add_adapters(prior, LoRAConfig(rank=2, alpha=4.0))
    assert torch.equal(prior.image_logits(text, codes), start), "B is 0 at first"
    own = [name for name, p in prior.named_parameters() if p.requires_grad]
    assert own
    assert all(".lora_" in name for name in own)
    trained(prior)
    for name, parameter in prior.named_parameters():
        if ".lora_B" in name:
            assert parameter.abs().max() > 0, f"{name} takes no part in the loss"
    merged, plain = merged_weights(prior), tiny(kind)
    assert merged.keys() == before.keys()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed == {name.partition(".lora_")[0] + ".weight" for name in own}
    plain.load_state_dict(merged)
    expected = prior.image_logits(text, codes)
    assert (expected - start).abs().max() > 1e-2
    torch.testing.assert_close(plain.image_logits(text, codes), expected, **ROUNDING)

    (tmp_path / ADAPTER).mkdir()
    save_adapters(prior, tmp_path / ADAPTER, str(base), base / "prior")
    assert sorted(path.name for path in (tmp_path / ADAPTER).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    again = load_prior(base / "prior")
    merge_adapters(again, tmp_path / ADAPTER, base / "prior")
    torch.testing.assert_close(again.image_logits(text, codes), expected, **ROUNDING)


def test_peft_opens_the_adapters_by_itself(tmp_path: Path) -> None:
    import peft

    prior, (text, codes) = tiny("prior"), batch()
    save_network(tiny("prior"), "prior", tmp_path)
    add_adapters(prior, LoRAConfig(rank=2))
    trained(prior)
    save_adapters(prior, tmp_path, "some/model", tmp_path)
    opened = peft.PeftModel.from_pretrained(load_prior(tmp_path), tmp_path).base_model.model
    torch.testing.assert_close(opened.image_logits(text, codes), prior.image_logits(text, codes), **ROUNDING)


def test_adapters_of_other_weights_are_refused(tmp_path: Path) -> None:
    prior = tiny("prior")
    save_network(prior, "prior", tmp_path)
    add_adapters(prior, LoRAConfig(layers=("attention",)))
    assert {n.split(".")[2] for n, p in prior.named_parameters() if p.requires_grad} == {"attention"}
    save_adapters(prior, tmp_path, "some/model", tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    save_network(tiny("mindalle"), "mindalle", other)
    with pytest.raises(ModelFolderError, match=r"trained on other weights than those .* expected sha256"):
        merge_adapters(load_prior(tmp_path), tmp_path, other)
    with pytest.raises(ValueError, match=r"lora.layers \['qkw'\] are in no name of a matrix of Prior: expected .*mlp"):
        add_adapters(tiny("prior"), LoRAConfig(layers=("qkw",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "lora"}, "model.tune lora keeps most weights as they are: set model.init_from"),
        ({"lora": LoRAConfig(), "init_from": "composition"}, "model.lora has no effect with model.tune null"),
        ({"tune": "words", "init_from": "composition", "muon": MuonConfig()}, "leave model.muon out"),
        ({"words": ["robin"], "init_from": "composition"}, "model.words must name words, and needs model.tune words"),
        ({"words": [], "tune": "words", "init_from": "composition"}, "model.words must name words"),
        ({}, "model.init_args.config is missing: state the architecture, or a model to start from in init_from"),
    ],
)
def test_contradictions_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorModule(**options)


def test_one_name_gives_everything() -> None:
    module = PriorModule(init_from="composition", tune="words", attention="dense")
    own = [name for name, p in module.net.named_parameters() if p.requires_grad]
    assert own == ["text_embedding.weight"]
    assert module.decayed == frozenset()
    data = ImageDataModule("composition:val-styles", text=TextConfig(bpe_dropout=0.0), batch_size=2)
    module.complete_data(data)
    data.setup("fit")
    module.check_data(data)
    assert data.text is not None
    assert (data.text.length, data.image_size) == (module.net.config.text_length, module.image_size)
    assert next(iter(data.train_dataloader()))["text"].shape == (2, data.text.length)
    alone = ImageDataModule("composition:val-styles", text=TextConfig(), batch_size=2)
    with pytest.raises(ValueError, match=r"data.init_args.text.tokenizer is missing: .* model.init_args.init_from"):
        alone.setup("fit")


class Spelled:
    """Stands for an encoder of captions: "robin" has another token at the beginning than within a caption."""

    tokenizer = SimpleNamespace(decode=str)
    ids: ClassVar[dict[str, list[int]]] = {"robin": [4, 9], "a robin": [5, 7, 9], "a": [5, 9], "": [9, 9], "it": [9]}

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([(self.ids.get(text, []) + 3 * [9])[:3] for text in texts])


@every_prior
def test_only_the_tokens_of_chosen_words_are_trained(kind: str) -> None:
    prior, encoder = tiny(kind), cast(CaptionEncoder, Spelled())
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    embeddings = freeze_all_but_words(prior)
    limit_to_words(embeddings, ["robin"], encoder)
    trained(prior)
    (name,) = prior.word_embeddings()
    for other in before.keys() - {name}:
        assert torch.equal(prior.state_dict()[other], before[other]), other
    changed = (prior.state_dict()[name] != before[name]).any(1).nonzero().flatten().tolist()
    assert changed == [4, 7], "neither the word before it nor the padding"
    with pytest.raises(ValueError, match=r"model\.words: 'it' has no tokens in the text tokenizer"):
        limit_to_words(embeddings, ["it"], encoder)


def test_a_recipe_names_new_words(caplog: pytest.LogCaptureFixture) -> None:
    module = PriorModule(init_from="composition", tune="words", words=["heart"], attention="dense")
    data = ImageDataModule("composition:val-styles", text=TextConfig(bpe_dropout=0.0), batch_size=2)
    module.complete_data(data)
    data.setup("fit")
    for _ in range(2):  # the command checks before Lightning does
        module.check_data(data)
    assert len(module._limits) == 1
    assert "1 text tokens are trained: 'heart'" in caplog.text
    text = data.encode_captions(["a red heart", "a blue car"])
    shape = module.net.config.image_height, module.net.config.image_width
    codes = torch.zeros(2, *shape, dtype=torch.long)
    module.net.loss(text, codes).total.backward()
    gradient = module.net.get_parameter("text_embedding.weight").grad
    assert gradient is not None
    (row,) = gradient.abs().sum(1).nonzero().flatten().tolist()
    assert row in text[0]
    assert row not in text[1]


@pytest.mark.parametrize("kind", ["mindalle", "dalle_mini"])
def test_priors_of_other_code_bases_are_trained_behind_the_same_module(kind: str, tmp_path: Path) -> None:
    save_network(tiny(kind), kind, tmp_path)
    module = PriorModule(init_from=str(tmp_path), tune="lora", recompute=kind == "mindalle")
    assert type(module.net) is PRIORS[kind]
    assert module.architecture()["type"] == kind
    text, codes = batch()
    torch.testing.assert_close(module.net.loss(text, codes).total, tiny(kind).loss(text, codes).total)
    assert set(module.exports()) == {"prior", ADAPTER}
    for name, write in module.exports().items():
        (tmp_path / "out" / name).mkdir(parents=True)
        write(tmp_path / "out" / name)
    assert type(load_prior(tmp_path / "out/prior")) is PRIORS[kind]
    if kind == "dalle_mini":
        with pytest.raises(ValueError, match=r"DalleMini has no residual blocks for model.recompute"):
            PriorModule(init_from=str(tmp_path), recompute=True)


def test_a_folder_of_adapters_opens_like_a_model(tmp_path: Path) -> None:
    module = PriorModule(init_from="composition", tune="lora", lora=LoRAConfig(rank=2, layers=("mlp",)))
    with torch.no_grad():
        for name, parameter in module.net.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.02)
    (tmp_path / "run").mkdir()
    module.exports()[ADAPTER](tmp_path / "run")
    record = {"description": "", "license": "Apache-2.0", "data": "made up"}
    adapter_folder(tmp_path / "run", tmp_path / "mine", record)
    pipe = DallePipeline.from_pretrained(tmp_path / "mine")
    expected = merged_weights(module.net)
    assert all(torch.allclose(t, expected[n], atol=1e-6) for n, t in pipe.prior.state_dict().items())
    original = load_prior(find_component("composition", "prior")).state_dict()
    assert not torch.equal(original["layers.0.mlp.hidden.weight"], expected["layers.0.mlp.hidden.weight"])
    assert pipe.ranker is not None
    published = prepare(tmp_path / "mine", "org/mine")
    assert {f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"} < published.files.keys()
    assert "| adapter |" in published.card
    assert not any(path.endswith("model.safetensors") and ADAPTER not in path for path in published.files)
    (tmp_path / "mine" / ADAPTER / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="differs from its sha256"):
        DallePipeline.from_pretrained(tmp_path / "mine")
