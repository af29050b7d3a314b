"""Losses against distributions of PyTorch and sums written out."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from dalle_zoo.models import losses
from dalle_zoo.models.losses import contrastive_loss, dvae_loss, head_loss, kl_to_uniform, logit_laplace_nll

INTEGRAL = 1e-4
"""Midpoint rule with 200,000 points on densities with a kink."""
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
"""Float32 rounding between two ways to compute one thing."""


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("mu", [-2.0, 0.0, 1.5])
def test_the_density_integrates_to_one(mu: float, scale: float) -> None:
    count = 200_000
    x = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    log_scale = torch.full_like(x, math.log(scale))
    density = torch.exp(-logit_laplace_nll(x, torch.full_like(x, mu), log_scale))
    assert float(density.sum()) / count == pytest.approx(1, abs=INTEGRAL)


def test_the_density_is_that_of_the_sigmoid_of_a_laplace_variable() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(500, generator=generator) * 0.8 + 0.1
    mu, log_scale = 2 * torch.randn(2, 500, generator=generator)
    law = D.TransformedDistribution(D.Laplace(mu, log_scale.exp()), [D.SigmoidTransform()])
    torch.testing.assert_close(logit_laplace_nll(x, mu, log_scale), -law.log_prob(x), **ROUNDING)


def test_the_divergence_is_that_of_the_categorical_distributions() -> None:
    logits = 3 * torch.randn(2, 11, 3, 4, generator=torch.Generator().manual_seed(0))
    q = D.Categorical(logits=logits.movedim(1, -1))
    uniform = D.Categorical(logits=torch.zeros(11))
    torch.testing.assert_close(kl_to_uniform(logits), D.kl_divergence(q, uniform), **ROUNDING)


def test_the_divergence_is_between_0_and_the_log_of_the_codebook_size() -> None:
    same = torch.full((1, 8192, 1, 1), 3.0)
    assert float(kl_to_uniform(same)) == pytest.approx(0, abs=1e-4)
    one = torch.zeros(1, 8192, 1, 1)
    one[0, 5] = 200
    assert float(kl_to_uniform(one)) == pytest.approx(math.log(8192), abs=1e-4)
    assert kl_to_uniform(torch.zeros(1, 4, 1, 1, dtype=torch.bfloat16)).dtype == torch.float32


def sample() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 16, 8, generator=generator) * 0.8 + 0.1
    return x, torch.randn(1, 6, 16, 8, generator=generator), torch.randn(1, 7, 4, 2, generator=generator)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_bound_does_not_depend_on_the_batch_size(batch: int) -> None:
    expected, _ = dvae_loss(*sample(), kl_weight=6.6)
    repeated = [tensor.repeat(batch, 1, 1, 1).requires_grad_() for tensor in sample()]
    loss, parts = dvae_loss(*repeated, kl_weight=6.6)
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"nll", "kl"}
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()
    assert all(tensor.grad is not None for tensor in repeated)


def test_the_bound_equals_the_papers_sum_over_the_number_of_values() -> None:
    x, parameters, logits = sample()
    beta, values = 6.6, 16 * 8 * 3
    nll = sum(
        float(logit_laplace_nll(x[0, c, i, j], parameters[0, c, i, j], parameters[0, c + 3, i, j]))
        for c in range(3)
        for i in range(16)
        for j in range(8)
    )
    kl = 0.0
    for i in range(4):
        for j in range(2):
            q = logits[0, :, i, j].softmax(0)
            kl += float((q * (q * 7).log()).sum())
    loss, parts = dvae_loss(x, parameters, logits, beta)
    assert float(loss) == pytest.approx((nll + beta * kl) / values, rel=1e-5)
    assert float(parts["nll"]) == pytest.approx(nll / values, rel=1e-5)
    assert float(parts["kl"]) == pytest.approx(kl / 8, rel=1e-5)


def test_the_weight_of_a_cell_is_1_in_192_at_the_papers_sizes() -> None:
    x, parameters = torch.full((2, 3, 256, 256), 0.5), torch.zeros(2, 6, 256, 256)
    logits = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    without, parts = dvae_loss(x, parameters, logits, 0.0)
    loss, _ = dvae_loss(x, parameters, logits, 6.6)
    assert float(loss - without) == pytest.approx(0.034375 * float(parts["kl"]), rel=1e-4)


def test_the_contrastive_loss_equals_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 5, 8, generator=generator), dim=-1)
    scale = torch.tensor(3.0)
    score = [[3 * float(images[i] @ texts[j]) for j in range(5)] for i in range(5)]
    total = 0.0
    for i in range(5):
        total += math.log(sum(math.exp(score[i][j]) for j in range(5))) - score[i][i]  # its text among all
        total += math.log(sum(math.exp(score[j][i]) for j in range(5))) - score[i][i]  # its image among all
    loss = contrastive_loss(images, texts, scale)
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)
    assert float(contrastive_loss(texts, images, scale)) == pytest.approx(float(loss), rel=1e-5)
    assert float(contrastive_loss(images[:1], texts[:1], scale)) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------ heads


def head(positions: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Inputs, matrix and offsets of a head with 13 tokens, and targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(positions, 6), (13, 6), (13,)]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randint(13, (positions,), generator=generator)


def summed(leaves: list[Tensor], target: Tensor) -> Tensor:
    """What `head_loss` restates."""
    return F.cross_entropy(F.linear(*leaves).float(), target, reduction="sum")


@pytest.mark.parametrize("logits", [1, 26, 39, 1000])  # one row, two, three that do not divide five, all at once
@pytest.mark.parametrize("positions", [0, 1, 5])
def test_the_chunked_loss_of_a_head_equals_that_of_all_logits(
    positions: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_ON_CPU", logits)
    leaves, target = head(positions)
    native, oracle = head_loss(*leaves, target), summed(leaves, target)
    torch.testing.assert_close(native, oracle, atol=1e-6, rtol=1e-6)
    for came, expected in zip(*(torch.autograd.grad(3 * loss, leaves) for loss in (native, oracle)), strict=True):
        torch.testing.assert_close(came, expected, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_raises() -> None:
    leaves, target = head(5)
    loss = head_loss(*leaves, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_head_under_autocast_computes_in_the_autocast_dtype() -> None:
    leaves, target = head(5)
    with torch.autocast("cpu", torch.bfloat16):
        native, oracle = head_loss(*leaves, target), summed(leaves, target)
    assert native.dtype == torch.float32
    assert torch.equal(native, oracle)
    assert not torch.equal(native, summed(leaves, target)), "the type of autocast makes a difference"
    for came, expected in zip(*(torch.autograd.grad(loss, leaves) for loss in (native, oracle)), strict=True):
        assert came.dtype == torch.float32
        torch.testing.assert_close(came, expected, atol=0.02, rtol=0.02)  # products rounded to 8 bits


def test_a_bfloat16_head_has_bfloat16_gradients() -> None:
    leaves, target = head(5, torch.bfloat16)
    native, oracle = head_loss(*leaves, target), summed(leaves, target)
    for came, expected in zip(*(torch.autograd.grad(loss, leaves) for loss in (native, oracle)), strict=True):
        assert came.dtype == torch.bfloat16
        torch.testing.assert_close(came, expected, atol=0.02, rtol=0.02)


def test_no_gradients_are_computed_without_grad_mode() -> None:
    leaves, target = head(5)
    with torch.no_grad():
        assert head_loss(*leaves, target).grad_fn is None
    matrix = leaves[1].detach()
    (gradient,) = torch.autograd.grad(head_loss(leaves[0], matrix, leaves[2], target), [leaves[0]])
    torch.testing.assert_close(gradient, torch.autograd.grad(summed(leaves, target), leaves)[0], **ROUNDING)


def test_a_head_computes_only_the_required_gradients() -> None:
    target = torch.tensor([1, 0, 2])
    hidden, weight, bias = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    with torch.no_grad(), mock.patch.object(losses, "_add_product") as multiplied:
        head_loss(hidden, weight, bias, target)
    assert not multiplied.called, "validation needs no gradient of the matrix"
    frozen = head_loss(hidden.requires_grad_(), weight.detach(), bias, target)
    with mock.patch.object(losses, "_add_product") as multiplied:
        (gradient,) = torch.autograd.grad(frozen, [hidden])
        head_loss(hidden, weight.detach(), bias, target)
    assert not multiplied.called, "nor does a frozen head"
    oracle = torch.nn.functional.cross_entropy(hidden @ weight.detach().T + bias, target, reduction="sum")
    torch.testing.assert_close(gradient, torch.autograd.grad(oracle, [hidden])[0])
