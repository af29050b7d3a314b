"""Memory of a GPU, compared with PyTorch's own accounting at small sizes, and with the paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from dalle_zoo.adapters import LoRAConfig, add_adapters
from dalle_zoo.cli.main import main
from dalle_zoo.files import read_json, write_json
from dalle_zoo.models.attention import choice
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.external.mindalle import MinDALLE, MinDALLEConfig
from dalle_zoo.models.losses import dvae_loss
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.planning import recipe
from dalle_zoo.planning.dvae import DVAEWorkload
from dalle_zoo.planning.formats import FLOAT32, GIB
from dalle_zoo.planning.memory import BACKWARD, FORWARD, STEP, memory_of
from dalle_zoo.planning.prior import PriorWorkload
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import factors_of
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.optimizer import AdamWConfig, decayed_names, make_optimizer

NARROW = PriorConfig(
    text_length=32, text_vocab=512, image_height=8, image_width=8, codebook_size=256, width=128, num_layers=4,
    num_heads=2,
)  # fmt: skip
LONG = PriorConfig(
    text_length=16, text_vocab=256, image_height=16, image_width=16, codebook_size=128, width=96, num_layers=5,
    num_heads=3, masks="full, row",
)  # fmt: skip
WORDY = PriorConfig(
    text_length=64, text_vocab=2048, image_height=8, image_width=8, codebook_size=1024, width=192, num_layers=3,
    num_heads=3, mlp_ratio=2,
)  # fmt: skip
DEEP = PriorConfig(
    text_length=32, text_vocab=512, image_height=8, image_width=8, codebook_size=256, width=256, num_layers=6,
    num_heads=4,
)  # fmt: skip
SIZES = {"narrow": NARROW, "long": LONG, "wordy": WORDY, "deep": DEEP}
"""Priors that differ in what requires most memory."""

DVAES = {
    "small": DVAEConfig(image_size=64, width=16, num_groups=3, codebook_size=128, decoder_stem=16),
    "deep": DVAEConfig(image_size=64, width=32, num_groups=4, blocks_per_group=1, codebook_size=512, decoder_stem=32),
}


@pytest.fixture(autouse=True)
def attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are for GPUs, where attention in lines is also for short streams."""
    monkeypatch.setattr(choice, "SHORTEST_ON_CPU", 0)
    monkeypatch.setattr(choice, "LONGEST_DENSE", 0)


def prior(config: PriorConfig, precision: str, recompute: bool) -> Prior:
    """Returns a prior in a precision, with or without recomputation."""
    net = Prior(config)
    for block in net.residual_blocks():
        block.residual.recompute = recompute
    return net.bfloat16() if precision == "bf16-true" else net


def tokens(config: PriorConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Returns prompts that fill all text positions, and codes."""
    text = torch.randint(config.text_vocab, (batch, config.text_length))
    return text, torch.randint(config.codebook_size, (batch, config.image_height, config.image_width))


def precision_context(precision: str) -> AbstractContextManager[object]:
    """The context in which Lightning runs a training step."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def saved_bytes(net: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd retains for the backward pass, without parameters; each storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    retained: dict[int, Tensor] = {}  # references, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            retained.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in retained.values())


def plain_adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), foreach=False)


def peak_bytes(
    net: nn.Module,
    loss: Callable[[], Tensor],
    make: Callable[[nn.Module], torch.optim.Optimizer] = plain_adamw,
) -> int:
    """Peak bytes in two optimizer steps: weights, gradients, moments, activations and all others."""
    optimizer = make(net)
    tracker = MemTracker()
    tracker.track_external(net, optimizer)
    with tracker:
        for _ in range(2):
            value = loss()
            optimizer.zero_grad()  # where Lightning does it
            value.backward()
            del value
            optimizer.step()
            tracker.reset_mod_stats()  # it does not follow modules through several steps
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def prior_loss(net: Prior, batch: int, precision: str) -> Callable[[], Tensor]:
    text, codes = tokens(net.config, batch)

    def loss() -> Tensor:
        with precision_context(precision):
            return net.loss(text, codes).total

    return loss


def dvae_step(net: DVAE, batch: int, precision: str) -> Callable[[], Tensor]:
    images = torch.rand(batch, 3, net.config.image_size, net.config.image_size)

    def loss() -> Tensor:
        with precision_context(precision):
            parameters, logits = net(images, 0.5)
            return dvae_loss(net.map_pixels(images), parameters, logits, 1.0)[0]

    return loss


def retained_bytes(work: PriorWorkload | DVAEWorkload, setup: Setup) -> float:
    """Planned bytes that the forward pass retains: activations, early gradients, copies of weights."""
    activations = sum(work.retained(setup.batch, setup.formats, setup.recompute).values())
    activations += FLOAT32 * sum(p.total for p in work.trained if p.early)
    if setup.precision != "bf16-mixed":
        return activations
    copied = (p for p in work.parameters if p.autocast and (p.unit == "root" or not setup.recompute))
    return activations + 2 * sum(p.total for p in copied)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("size", "batch"), [("narrow", 2), ("long", 1), ("long", 3), ("wordy", 4), ("deep", 2)])
def test_activations_equal_those_that_autograd_retains(size: str, batch: int, precision: str, recompute: bool) -> None:
    torch.manual_seed(0)
    net = prior(SIZES[size], precision, recompute)
    measured = saved_bytes(net, prior_loss(net, batch, precision))
    setup = Setup(devices=1, batch=batch, precision=precision, recompute=recompute)
    assert retained_bytes(PriorWorkload(SIZES[size]), setup) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("size", "batch"), [("narrow", 2), ("long", 3), ("wordy", 4), ("deep", 2)])
def test_the_peak_equals_that_of_the_memory_tracker(size: str, batch: int, precision: str, recompute: bool) -> None:
    torch.manual_seed(0)
    net = prior(SIZES[size], precision, recompute)
    measured = peak_bytes(net, prior_loss(net, batch, precision))
    setup = Setup(devices=1, batch=batch, precision=precision, recompute=recompute)
    assert memory_of(PriorWorkload(SIZES[size]), setup, reserve=0).total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"])
@pytest.mark.parametrize(("size", "batch"), [("small", 2), ("deep", 4)])
def test_memory_of_the_dvae(size: str, batch: int, precision: str) -> None:
    torch.manual_seed(0)
    net, work = DVAE(DVAES[size]), DVAEWorkload(DVAES[size])
    setup = Setup(devices=1, batch=batch, precision=precision)
    loss = dvae_step(net, batch, precision)
    assert retained_bytes(work, setup) == pytest.approx(saved_bytes(net, loss), rel=0.02)
    assert memory_of(work, setup, reserve=0).total == pytest.approx(peak_bytes(net, loss), rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_peak_equals_that_of_the_cuda_allocator(precision: str, recompute: bool) -> None:
    config = PriorConfig(width=512, num_layers=8, num_heads=8)
    net = prior(config, precision, recompute).cuda()
    text, codes = (part.cuda() for part in tokens(config, 4))
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = net.loss(text, codes).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    setup = Setup(devices=1, batch=4, precision=precision, recompute=recompute)
    planned = memory_of(PriorWorkload(config), setup, reserve=0).total
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_weights_gradients_and_moments_are_exact() -> None:
    net = prior(NARROW, "32-true", False)
    optimizer = torch.optim.AdamW(net.parameters())
    prior_loss(net, 1, "32-true")().backward()
    optimizer.step()
    parameters = list(net.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = memory_of(PriorWorkload(NARROW), Setup(devices=1)).held
    assert held == {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "AdamW moments": sum(m.nbytes for m in moments),
    }


def test_muon_has_one_moment_for_the_matrices_of_the_blocks() -> None:
    work = PriorWorkload(NARROW)
    adamw, muon = Setup(devices=1), Setup(devices=1, muon_iterations=MuonConfig().iterations)
    matrices = sum(p.nbytes for name, p in Prior(NARROW).named_parameters() if p.ndim == 2 and "layers." in name)
    held, plain = memory_of(work, muon).held, memory_of(work, adamw).held
    assert held["Muon momentum"] == matrices > 0
    assert held["AdamW moments"] == plain["AdamW moments"] - 2 * matrices
    # The temporary arrays of AdamW are of the other parameters alone.
    wordy = [p for name, p in Prior(WORDY).named_parameters() if p.ndim == 1 or "layers." not in name]
    step = memory_of(PriorWorkload(WORDY), replace(muon, clips_variance=True)).phases[STEP]
    assert step == {"AdamW: arrays of the step": 2 * sum(p.nbytes for p in wordy)}
    assert MuonConfig().iterations == recipe.MUON_ITERATIONS  # a copy, since the planner does not import Lightning


@pytest.mark.parametrize(
    ("change", "wanted"),
    [({"strategy": "fsdp2", "devices": 2}, "complete matrices"), ({"moments": "8bit"}, "float32 moments")],
)
def test_a_plan_refuses_what_training_with_muon_refuses(change: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=f"Muon needs {wanted}.*leave model.muon out"):
        PriorWorkload(NARROW).check(Setup(**{"devices": 1, "muon_iterations": 5, **change}))
    with pytest.raises(ValueError, match="no residual blocks of matrices"):
        DVAEWorkload(DVAES["small"]).check(Setup(devices=1, muon_iterations=5))


def test_the_peak_with_muon_equals_that_of_the_memory_tracker() -> None:
    torch.manual_seed(0)
    net = prior(DEEP, "32-true", True)
    hidden = frozenset(name for name, p in net.named_parameters() if p.ndim == 2 and "layers." in name)

    def optimizer(net: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(net, AdamWConfig(variance_clip=None), 1e-3, decayed_names(net), MuonConfig(), hidden)

    measured = peak_bytes(net, prior_loss(net, 1, "32-true"), optimizer)
    setup = Setup(devices=1, batch=1, recompute=True, muon_iterations=5)
    planned = memory_of(PriorWorkload(DEEP), setup, reserve=0)
    assert planned.fullest == STEP
    assert planned.total == pytest.approx(measured, rel=0.1)


# ------------------------------------------------------------ the paper

PAPER = PriorWorkload(PriorConfig())
SHARDED = Setup(
    devices=8, nodes=128, strategy="hsdp_powersgd(rank=896)", precision="16-resblock", batch=1, recompute=True,
    average="host",
)  # fmt: skip


def test_twelve_billion_parameters_do_not_fit_one_gpu_of_16_gib() -> None:
    for setup in (
        Setup(devices=1, batch=1, recompute=True, paper_formats=True),
        Setup(devices=1, batch=1, recompute=True, precision="bf16-true", moments="8bit"),
    ):
        memory = memory_of(PAPER, setup, reserve=0)
        assert memory.held["weights"] == pytest.approx(24e9, rel=0.05)  # section 2.5: about 24 GB in 16 bits
        assert memory.total > 16 * GIB


def test_twelve_billion_parameters_fit_eight_gpus_in_the_papers_formats() -> None:
    setup = replace(SHARDED, paper_formats=True)
    assert memory_of(PAPER, setup).total < 16 * GIB
    assert memory_of(PAPER, replace(setup, recompute=False)).total > 16 * GIB
    assert memory_of(PAPER, replace(setup, strategy="ddp_powersgd(rank=896)")).total > 16 * GIB


def test_float32_weights_and_moments_do_not_fit_gpus_of_16_gib() -> None:
    memory = memory_of(PAPER, SHARDED, reserve=0)
    assert memory.held["weights"] + memory.held["gradients"] + memory.held["AdamW moments"] > 16 * GIB
    assert memory_of(PAPER, replace(SHARDED, moments="8bit")).total > 16 * GIB
    fits = replace(SHARDED, strategy="hsdp", precision="bf16-true")
    assert memory_of(PAPER, fits).total < 16 * GIB


# ------------------------------------------------------------ effects of the setup


def total(**changes: object) -> float:
    setup = Setup(**{"devices": 8, "batch": 4, "precision": "bf16-mixed", "strategy": "hsdp", **changes})  # type: ignore[arg-type]
    return memory_of(PriorWorkload(DEEP), setup).total


def test_every_choice_changes_memory_in_the_right_direction() -> None:
    base = total()
    assert total(recompute=True) < base
    assert total(batch=2) < base
    assert total(precision="bf16-true") < base
    assert total(moments="8bit") < base
    assert total(average="host") == base
    assert total(average="gpu") > base
    assert total(strategy="ddp") > base
    assert total(nodes=2, strategy="fsdp2") < base
    assert total(nodes=2, strategy="hsdp_powersgd(rank=64)") > base
    assert total(accumulate=2) >= base


def test_averages_on_the_host_are_counted_for_every_process_of_a_node() -> None:
    work = PriorWorkload(DEEP)
    weights = 4 * sum(p.total for p in work.parameters)
    for strategy, copies in (("ddp", 8), ("hsdp", 1)):
        setup = Setup(devices=8, strategy=strategy, average="host")
        assert memory_of(work, setup).host["averaged weights"] == pytest.approx(copies * weights, rel=0.01)


def test_phases_of_a_step() -> None:
    memory = memory_of(PriorWorkload(DEEP), Setup(devices=1, recompute=True))
    assert set(memory.phases) == {FORWARD, BACKWARD, STEP}
    assert memory.fullest == max(memory.phases, key=lambda name: sum(memory.phases[name].values()))
    # With accumulation, old gradients exist together with activations.
    again = memory_of(PriorWorkload(DEEP), Setup(devices=1, recompute=True, accumulate=2))
    assert sum(again.phases[BACKWARD].values()) > sum(memory.phases[BACKWARD].values())


def test_sixteen_bit_gradients_are_exchanged_through_float32() -> None:
    setup = Setup(devices=2, nodes=2, strategy="hsdp_powersgd(rank=16)", precision="bf16-true")
    work = PriorWorkload(DEEP)
    step = [sum(memory_of(work, replace(setup, precision=p)).phases[STEP].values()) for p in ("bf16-true", "32-true")]
    assert step[0] - step[1] == 4 * factors_of(work.parameters, 2, 8).matrices


# ------------------------------------------------------------ fine-tuning

TUNED = MinDALLEConfig(
    text_length=32, text_vocab=512, image_height=8, image_width=8, codebook_size=256, width=128, num_layers=4,
    num_heads=2, padding_id=1,
)  # fmt: skip


def tuned(recompute: bool, lora: LoRAConfig) -> MinDALLE:
    net = MinDALLE(TUNED)
    for block in net.residual_blocks():
        block.residual.recompute = recompute
    add_adapters(net, lora)
    return net


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_frozen_weights_have_neither_gradients_nor_moments(precision: str, recompute: bool) -> None:
    torch.manual_seed(0)
    lora = LoRAConfig(rank=4, layers=("attention",))
    net = tuned(recompute, lora)
    text, codes = torch.randint(2, 512, (2, 32)), torch.randint(256, (2, 8, 8))

    def loss() -> Tensor:
        with precision_context(precision):
            return net.loss(text, codes).total

    work = PriorWorkload(TUNED, "lora", lora)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(p.total for p in work.trained) == trained
    assert sum(p.total for p in work.parameters) == sum(p.numel() for p in net.parameters())
    setup = Setup(devices=1, batch=2, precision=precision, recompute=recompute)
    held = memory_of(work, setup).held
    assert (held["gradients"], held["AdamW moments"]) == (4 * trained, 8 * trained)
    planned = retained_bytes(work, setup)
    assert planned == pytest.approx(saved_bytes(net, loss), rel=0.06)


def test_mindalle_is_tuned_on_one_gpu_of_24_gb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prior").mkdir()
    write_json(tmp_path / "prior/config.json", {"type": "mindalle", **asdict(MinDALLEConfig(padding_id=1))})
    command = ["plan", "prior/finetune", "--parts", "lora", "1gpu", "--model.init_from", str(tmp_path)]
    command += ["--gpu", "rtx3090-24gb", "--model.recompute", "true", "--json", str(tmp_path / "plan.json")]
    assert main(command) == 0
    plan = read_json(tmp_path / "plan.json")
    parameters = sum(plan["parameters"].values())
    trained = sum(count for part, count in plan["parameters"].items() if part.endswith("trained"))
    assert parameters - trained == 1_291_081_728
    assert trained == 42 * 8 * (4 * 1536 + 2 * 1536 + 2 * 5 * 1536), "rank 8 beside qkv, output and both of the MLP"
    assert plan["memory_bytes"]["held"]["AdamW moments"] == 8 * trained
    assert plan["fits"] is True
    assert plan["memory_bytes"]["total"] < 14 * GIB
    assert "FITS" in capsys.readouterr().out
    assert main([*command, "--overwrite", "--model.tune", "null", "--model.lora", "null"]) == 0
    assert read_json(tmp_path / "plan.json")["fits"] is False, "all weights do not fit, or this shows nothing"
