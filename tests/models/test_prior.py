"""The prior: size, layout, losses, and the inputs that each prediction depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import MASKS
from dalle_zoo.models.attention import BACKENDS
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.registry import UnknownNameError

Maker = Callable[..., Prior]

ROUNDING = {"atol": 1e-5, "rtol": 1e-4}
"""Float32 rounding over two layers between two ways to compute the same values."""

SCHEDULES = [*MASKS, "conv(kernel=3)", "row, column", "paper", "paper(kernel=3)"]
V, K, T, H, W = 10, 7, 4, 3, 4
N = H * W
"""Sizes of the small prior (tests/conftest.py)."""


def batch(size: int = 3) -> tuple[Tensor, Tensor]:
    """Captions of 0, 1, 2, … tokens and random codes."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(V, (size, T), generator=generator)
    for row in range(size):
        count = row % (T + 1)
        text[row, count:] = V + torch.arange(count, T)
    return text, torch.randint(K, (size, H, W), generator=generator)


# ------------------------------------------------------------ size


@pytest.mark.parametrize(
    ("width", "matrices"),
    [(1920, 2_831_155_200), (2688, 5_549_064_192), (3968, 12_092_178_432)],
)
def test_the_three_sizes_of_the_paper(width: int, matrices: int) -> None:
    config = PriorConfig(width=width, num_heads=width // 64)
    with torch.device("meta"):
        prior = Prior(config)
    terms = config.count_parameters()
    assert terms["matrices"] == matrices == 12 * width**2 * 64
    of: dict[str, int] = dict.fromkeys(terms, 0)
    for name, parameter in prior.named_parameters():
        pads = T_PAPER * width if name == "text_embedding.weight" else 0
        of[term(name)] += parameter.numel() - pads
        of["padding tokens"] += pads
    assert of == terms
    assert sum(parameter.numel() for parameter in prior.parameters()) == sum(terms.values())
    assert len(prior.layers) == 64
    assert prior.config.layout.length == 1280
    specs = [mask.spec for mask in prior.masks]
    assert specs[-1] == "conv"
    assert [index for index, spec in enumerate(specs) if spec == "column"] == list(range(1, 63, 4))


T_PAPER = 256


def term(name: str) -> str:
    """Term of `count_parameters` that a parameter belongs to."""
    if name.startswith("layers"):
        if "norm" in name:
            return "layer norms"
        return "matrices" if name.endswith("weight") else "biases of the matrices"
    by_start = {
        "final_norm": "layer norms",
        "text_embedding": "text tokens",
        "text_position": "text positions",
        "image_embedding": "image tokens",
        "row_position": "rows and columns",
        "column_position": "rows and columns",
        "start_of": "start of text, start of image",
        "text_head": "text head",
        "image_head": "image head",
    }
    return next(kind for start, kind in by_start.items() if name.startswith(start))


def test_statistics_of_initial_weights() -> None:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(text_length=T, text_vocab=V, codebook_size=64, width=64, num_layers=8, num_heads=4))
    for name, parameter in prior.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or "head" in name:
            assert not parameter.any(), name
        else:
            residual = "attention.output" in name or "mlp.output" in name
            std = 0.02 / math.sqrt(16) if residual else 0.02  # 1 / sqrt(2 layers)
            # Six standard errors of a standard deviation.
            assert parameter.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * parameter.numel())), name


# ------------------------------------------------------------ layout


def test_inputs_and_targets_by_position(random_prior: Maker) -> None:
    prior, (text, codes) = random_prior(), batch()
    received: list[Tensor] = []
    first = prior.layers[0]
    first.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    prior(text, codes)
    (x,) = received
    assert x.shape == (3, T + N, 16)
    raster = codes.flatten(1)
    for b in range(3):
        for p in range(T):
            token = prior.start_of_text if p == 0 else prior.text_embedding.weight[text[b, p - 1]]
            torch.testing.assert_close(x[b, p], token + prior.text_position.weight[p])
        for p in range(N):
            token = prior.start_of_image if p == 0 else prior.image_embedding.weight[raster[b, p - 1]]
            # Row and column of the token that is predicted here.
            place = prior.row_position.weight[p // W] + prior.column_position.weight[p % W]
            torch.testing.assert_close(x[b, T + p], token + place)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centered = x - x.mean()
    return centered / (centered.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def slow_logits(prior: Prior, text: list[int], codes: list[int]) -> tuple[Tensor, Tensor]:
    """One image, position by position and head by head."""
    xs = [prior.start_of_text, *(prior.text_embedding.weight[t] for t in text[:-1])]
    xs = [x + prior.text_position.weight[p] for p, x in enumerate(xs)]
    image = [prior.start_of_image, *(prior.image_embedding.weight[c] for c in codes[:-1])]
    xs += [x + prior.row_position.weight[p // W] + prior.column_position.weight[p % W] for p, x in enumerate(image)]
    for layer, mask in zip(prior.layers, prior.masks, strict=True):
        allowed = mask.dense()
        attention, mlp = layer.attention, layer.mlp
        projected = [attention.qkv.weight @ norm(x, layer.attention_norm) + attention.qkv.bias for x in xs]
        mixed: list[Tensor] = []
        for i in range(len(xs)):
            heads = []
            for head in range(2):  # 16 = 2 heads of 8; queries, keys and values one after the other
                at = slice(8 * head, 8 * head + 8)
                keys = [j for j in range(len(xs)) if allowed[i, j]]
                scores = torch.stack([projected[i][at] @ projected[j][16:32][at] / math.sqrt(8) for j in keys])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * projected[j][32:][at] for w, j in zip(weights, keys, strict=True)))
            mixed.append(torch.cat(heads))
        xs = [x + attention.output.weight @ m + attention.output.bias for x, m in zip(xs, mixed, strict=True)]
        for p, x in enumerate(xs):
            hidden = mlp.hidden.weight @ norm(x, layer.mlp_norm) + mlp.hidden.bias
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            xs[p] = x + mlp.output.weight @ hidden + mlp.output.bias
    final = [norm(x, prior.final_norm) for x in xs]
    text_logits = [prior.text_head.weight @ x + prior.text_head.bias for x in final[:T]]
    image_logits = [prior.image_head.weight @ x + prior.image_head.bias for x in final[T:]]
    return torch.stack(text_logits), torch.stack(image_logits)


@torch.no_grad()
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flex"])
@pytest.mark.parametrize("masks", ["row, column", "conv(kernel=3)"])
def test_the_forward_pass_equals_loops(random_prior: Maker, masks: str, backend: str) -> None:
    prior, (text, codes) = random_prior(masks=masks, backend=backend), batch()
    logits = prior(text, codes)
    assert logits.text.shape == (3, T, V)
    assert logits.image.shape == (3, N, K)
    for b in range(3):
        slow = slow_logits(prior, text[b].tolist(), codes[b].flatten().tolist())
        torch.testing.assert_close(logits.text[b], slow[0], **ROUNDING)
        torch.testing.assert_close(logits.image[b], slow[1], **ROUNDING)


# ------------------------------------------------------------ dependencies between positions


@pytest.mark.parametrize("masks", SCHEDULES)
def test_a_prediction_depends_on_earlier_tokens(random_prior: Maker, masks: str) -> None:
    prior, (text, codes) = random_prior(masks=masks, num_layers=3), batch(2)
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs.append(arguments[0].detach().requires_grad_())
        return (inputs[0],)

    prior.layers[0].register_forward_pre_hook(keep)
    logits = prior(text, codes)
    for position in range(T + N):
        row = logits.text[:, position] if position < T else logits.image[:, position - T]
        (gradient,) = torch.autograd.grad(row[:, :3].sum(), inputs[0], retain_graph=True)
        reached = gradient.abs().sum(-1) > 0
        assert not reached[:, position + 1 :].any(), "no later position"
        assert reached[:, position].all(), "itself: the start token or the token before"
        assert reached[:, : min(position + 1, T)].all(), "all text before it, padding included"


@torch.no_grad()
@pytest.mark.parametrize("masks", SCHEDULES)
def test_a_token_changes_only_later_predictions(random_prior: Maker, masks: str) -> None:
    prior, (text, codes) = random_prior(masks=masks), batch(1)
    before = prior(text, codes)
    for place in range(N):
        changed = codes.flatten(1).clone()
        changed[0, place] = (changed[0, place] + 1) % K
        after = prior(text, changed.view_as(codes))
        torch.testing.assert_close(after.text, before.text)
        torch.testing.assert_close(after.image[:, : place + 1], before.image[:, : place + 1], **ROUNDING)
        if place + 1 < N:
            assert (after.image[:, place + 1] - before.image[:, place + 1]).abs().max() > 1e-3
    for place in range(T - 1):  # the last text token and the last code are targets, never inputs
        changed = text.clone()
        changed[0, place] = (changed[0, place] + 1) % V
        after = prior(changed, codes)
        torch.testing.assert_close(after.text[:, : place + 1], before.text[:, : place + 1], **ROUNDING)
        difference = (after.image - before.image).abs().amax(-1)
        assert (difference > 1e-5).all(), "every image position sees every text position"


# ------------------------------------------------------------ loss


@pytest.mark.parametrize("weight", [0.125, 0.0, 0.5])
def test_the_loss_equals_loops(random_prior: Maker, weight: float) -> None:
    prior, (text, codes) = random_prior(text_loss_weight=weight), batch(5)
    logits, loss = prior(text, codes), prior.loss(text, codes)
    of_text, of_image = [], []
    for b in range(5):
        for p in range(T):
            if text[b, p] < V:  # padding is no target
                of_text.append(-logits.text[b, p].log_softmax(-1)[text[b, p]].item())
        for p in range(N):
            of_image.append(-logits.image[b, p].log_softmax(-1)[codes[b, p // W, p % W]].item())
    assert (len(of_text), len(of_image)) == (10, 5 * N)
    assert loss.text.item() == pytest.approx(sum(of_text) / 10, rel=1e-5)
    assert loss.image.item() == pytest.approx(sum(of_image) / (5 * N), rel=1e-5)
    assert loss.total.item() == pytest.approx(weight * loss.text.item() + (1 - weight) * loss.image.item(), rel=1e-6)


def test_the_default_loss_weights_are_those_of_the_paper() -> None:
    assert PriorConfig().text_loss_weight == 1 / 8


def outputs_of(prior: Prior, *names: str) -> dict[str, list[Tensor]]:
    """Outputs of the named modules during the computation of the loss, with retained gradients."""
    came: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            output.retain_grad()
            came[name].append(output)

        getattr(prior, name).register_forward_hook(hook)

    for name in names:
        note(name)
    return came


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_every_target_gets_gradient_once_from_its_head(random_prior: Maker) -> None:
    prior, (text, codes) = random_prior(), batch(5)
    prior.loss(text, codes).total.backward()
    hidden = prior.hidden(text, codes).detach()
    of_text, of_image = hidden[:, :T][text < V], hidden[:, T:].flatten(0, 1)
    heads = [(prior.text_head, of_text, text[text < V], 1 / 8), (prior.image_head, of_image, codes.flatten(), 7 / 8)]
    for head, rows, target, kind_weight in heads:
        probabilities = head(rows).detach().softmax(-1)
        errors = kind_weight * (probabilities - F.one_hot(target, len(head.weight))) / len(target)
        torch.testing.assert_close(gradient(head.weight), errors.t() @ rows)
        torch.testing.assert_close(gradient(head.bias), errors.sum(0))


def test_each_loss_reaches_the_positions_of_its_kind_and_no_other(random_prior: Maker) -> None:
    prior, (text, codes) = random_prior(), batch(5)
    positions = torch.arange(T + N).expand(5, -1)
    text_targets = F.pad(text < V, (0, N))
    for part, expected in (("image", positions >= T), ("text", text_targets)):
        came = outputs_of(prior, "final_norm")
        getattr(prior.loss(text, codes), part).backward()
        reached = gradient(came["final_norm"][0]).abs().sum(-1) > 0
        assert torch.equal(reached, expected), f"{part} loss"


def test_a_fresh_model_predicts_uniformly() -> None:
    prior = Prior(PriorConfig(text_length=T, text_vocab=V, image_height=H, image_width=W, codebook_size=K,
                              width=16, num_layers=2, num_heads=2))  # fmt: skip
    loss = prior.loss(*batch(5))
    assert loss.text.item() == pytest.approx(math.log(V), abs=1e-6)
    assert loss.image.item() == pytest.approx(math.log(K), abs=1e-6)
    assert loss.total.item() == pytest.approx(math.log(V) / 8 + 7 * math.log(K) / 8, abs=1e-6)


def test_one_batch_can_be_overfitted() -> None:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(text_length=T, text_vocab=V, image_height=H, image_width=W, codebook_size=K,
                              width=32, num_layers=2, num_heads=2))  # fmt: skip
    text, codes = batch(5)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        prior.loss(text, codes).total.backward()
        optimizer.step()
    logits = prior(text, codes)
    assert prior.loss(text, codes).image.item() < 0.05
    # Captions of several lengths start alike, so that the first tokens of the text stay uncertain.
    assert torch.equal(logits.image.argmax(-1).view_as(codes), codes)


@pytest.mark.parametrize("masks", SCHEDULES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flex"])
def test_a_batch_of_one_image_gives_all_weights_a_gradient(random_prior: Maker, masks: str, backend: str) -> None:
    prior, (text, codes) = random_prior(masks=masks, backend=backend), batch(5)
    prior.loss(text[3:4], codes[3:4]).total.backward()
    for name, parameter in prior.named_parameters():
        assert gradient(parameter).abs().sum() > 0, name


def test_empty_captions_have_no_text_loss(random_prior: Maker) -> None:
    prior, (_, codes) = random_prior(), batch(2)
    text = prior.null_text().expand(2, -1)
    assert text.tolist() == [[10, 11, 12, 13]] * 2
    loss = prior.loss(text, codes)
    assert loss.text.item() == 0
    assert loss.total.item() == pytest.approx(7 / 8 * loss.image.item())
    loss.total.backward()
    assert not gradient(prior.text_head.weight).any()
    assert gradient(prior.text_embedding.weight)[V : V + T - 1].abs().sum(-1).all(), "pads are inputs"
    assert all(parameter.grad.isfinite().all() for parameter in prior.parameters() if parameter.grad is not None)


# ------------------------------------------------------------ invalid input


@pytest.mark.parametrize(
    ("text", "codes", "message"),
    [
        ((2, 5), (2, 3, 4), r"text must have shape \(B, 4\), got \(2, 5\)"),
        ((4,), (2, 3, 4), r"text must have shape \(B, 4\), got \(4,\)"),
        ((2, 4), (2, 4, 3), r"codes must have shape \(B, 3, 4\), got \(2, 4, 3\)"),
        ((2, 4), (2, 12), r"codes must have shape \(B, 3, 4\), got \(2, 12\)"),
        ((2, 4), (3, 3, 4), "text and codes must have the same batch size, got 2 and 3"),
    ],
)
def test_shapes_are_checked(random_prior: Maker, text: tuple[int, ...], codes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_prior()(torch.zeros(text, dtype=torch.long), torch.zeros(codes, dtype=torch.long))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 100, "num_heads": 3}, "width 100 is not a multiple of num_heads 3"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"codebook_size": -1}, "codebook_size must be an integer of at least 1, got -1"),
        ({"text_loss_weight": 1.0}, r"text_loss_weight must be in \[0, 1\), got 1.0"),
        ({"masks": "rwo"}, "unknown schedule or mask 'rwo'. Did you mean 'row'"),
        ({"masks": "conv(kernal=3)"}, "Did you mean 'kernel'"),
    ],
)
def test_invalid_configurations_raise(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**wrong)


def test_an_unknown_back_end_suggests_the_nearest(random_prior: Maker) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'dense'"):
        random_prior(backend="dnse")


# ------------------------------------------------------------ growing


def grown_pair(random_prior: Maker) -> tuple[Prior, Prior]:
    small = random_prior(masks="paper(kernel=3)")
    config = replace(small.config, image_height=2 * H, image_width=2 * W)
    large = Prior(config)
    large.grow_from(small)
    return small, large


def test_a_grown_prior_has_the_weights_of_the_small_one(random_prior: Maker) -> None:
    small, large = grown_pair(random_prior)
    for name, weight in small.state_dict().items():
        own = large.state_dict()[name]
        assert own.equal(weight) if "_position" not in name or "text" in name else len(own) == 2 * len(weight)
    for position in ("row_position", "column_position"):
        rows = getattr(large, position).weight
        assert rows[0::2].equal(rows[1::2])
        assert rows[0::2].equal(getattr(small, position).weight)
    text, codes = batch()
    enlarged = codes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():  # text does not attend to the grid
        torch.testing.assert_close(small(text, codes).text, large(text, enlarged).text, **ROUNDING)


def test_growing_from_another_architecture_raises(random_prior: Maker) -> None:
    small, large = grown_pair(random_prior)
    with pytest.raises(ValueError, match=rf"alone, expected and got: text_length {T}, {T + 1}$"):
        large.grow_from(Prior(replace(small.config, text_length=T + 1)))
    with pytest.raises(ValueError, match=f"image_height {2 * H} is not a multiple of {2 * H - 1}"):
        large.grow_from(Prior(replace(small.config, image_height=2 * H - 1)))
