from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dalle_zoo.models import residual
from dalle_zoo.models.attention import choice
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.residual import Around, plain

CONFIG = PriorConfig(text_length=4, text_vocab=10, image_height=2, image_width=3, codebook_size=7, width=16,
                     num_layers=3, num_heads=2)  # fmt: skip


def gradients(prior: Prior) -> dict[str, Tensor]:
    text, codes = torch.tensor([[1, 2, 12, 13]]), torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    prior.zero_grad()
    prior.loss(text, codes).total.backward()
    return {name: parameter.grad.clone() for name, parameter in prior.named_parameters() if parameter.grad is not None}


def disturb(prior: Prior) -> None:
    """Weights with which every gradient is far from 0, also in the heads."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_blocks_are_in_order_of_depth_and_name_their_branch() -> None:
    prior = Prior(CONFIG)
    blocks = prior.residual_blocks()
    assert [block.name for block in blocks] == [f"layers.{i}.{k}" for i in range(3) for k in ("attention", "mlp")]
    for block in blocks:
        assert prior.get_submodule(block.name) is block.branch


def test_recomputation_gives_equal_gradients_and_stores_only_inputs() -> None:
    prior = Prior(CONFIG)
    disturb(prior)
    expected = gradients(prior)
    saved: list[Any] = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        gradients(prior)
        cached = len(saved)
        for block in prior.residual_blocks():
            block.residual.recompute = True
        saved.clear()
        recomputed = gradients(prior)
    assert len(saved) < cached / 2
    assert expected.keys() == recomputed.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, recomputed[name]), name


MASKS = "row, column, row_same, full, conv(kernel=3), conv"
"""Some in lines of one shape, whose graphs are shared; the last in one call."""
SQUARE = PriorConfig(text_length=16, text_vocab=10, image_height=12, image_width=12, codebook_size=7, width=16,
                     num_layers=6, num_heads=2, masks=MASKS)  # fmt: skip


def compare_with_compiled(recompute: bool) -> None:
    """Loss and gradients of a prior, before and after its blocks are compiled."""
    prior = Prior(SQUARE)
    disturb(prior)
    generator = torch.Generator().manual_seed(0)
    text, codes = torch.randint(10, (2, 16), generator=generator), torch.randint(7, (2, 12, 12), generator=generator)

    def step() -> dict[str, Tensor]:
        prior.zero_grad()
        loss = prior.loss(text, codes).total
        loss.backward()
        found = {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **found}

    expected = step()
    cached = [set(mask.cached) for mask in prior.masks]
    for block in prior.residual_blocks():
        block.residual.compiled = True
        block.residual.recompute = recompute
    counters.clear()
    names = list(prior.state_dict())
    for came in (step(), step()):
        assert came.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(came[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] > 3
    assert not counters["graph_break"]
    assert [set(mask.cached) for mask in prior.masks] == cached, "masks are made outside of the graphs"
    assert list(prior.state_dict()) == names


# Its warnings concern PyTorch's own code.
ignores_the_compiler = pytest.mark.filterwarnings("ignore")


@ignores_the_compiler
@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])  # each compiles
def test_compiled_blocks_equal_eager_ones(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(around: Around) -> Around:
        """Compiles without generating machine code."""
        return torch.compile(around, dynamic=False, backend="aot_eager")

    torch.compiler.reset()
    monkeypatch.setattr(choice, "SHORTEST_ON_CPU", 0)  # so that blocks differ in their back-ends
    monkeypatch.setattr(residual, "compiled", traced)
    with torch._dynamo.config.patch(recompile_limit=residual.GRAPHS):
        compare_with_compiled(recompute)


@pytest.mark.slow
@pytest.mark.usefixtures("cpp_compiler")
@ignores_the_compiler
def test_blocks_compiled_to_machine_code_equal_eager_ones() -> None:
    torch.compiler.reset()
    compare_with_compiled(recompute=False)


def test_a_branch_calls_its_around_function() -> None:
    prior = Prior(CONFIG)
    disturb(prior)
    text, codes = torch.tensor([[1, 2, 12, 13]]), torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    before = prior(text, codes).image

    def doubled(x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
        return 2 * plain(x, norm, branch)

    for block in prior.residual_blocks():
        block.residual.around = doubled
    assert not torch.allclose(before, prior(text, codes).image)


def test_fresh_weights_are_a_function_of_seed_and_name() -> None:
    first, second = Prior(CONFIG), Prior(CONFIG)
    assert not torch.equal(first.image_embedding.weight, second.image_embedding.weight)
    first.reset_parameters(7)
    second.reset_parameters(7)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.layers[0].attention.qkv.weight, first.layers[1].attention.qkv.weight)


def test_weight_names_do_not_contain_the_residual_path() -> None:
    assert not [name for name in Prior(CONFIG).state_dict() if "residual" in name]


@pytest.mark.parametrize("name", ["text_position.weight", "layers.0.mlp.hidden.weight"])
def test_initial_matrices_have_the_declared_standard_deviation(name: str) -> None:
    prior = Prior(PriorConfig(**{**CONFIG.__dict__, "width": 512}))
    assert prior.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
