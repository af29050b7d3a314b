"""Precisions by name, as plugins of Lightning; ``16-resblock`` is that of the paper.

| name | inside residual branches | elsewhere | weights, moments | range of gradients |
|---|---|---|---|---|
| ``32-true`` | float32 | float32 | float32 | |
| ``bf16-mixed`` | bfloat16 | bfloat16 | float32 | |
| ``bf16-true`` | bfloat16 | bfloat16 | bfloat16 | |
| ``16-mixed`` | float16 | float16 | float32 | one loss scale |
| ``16-resblock`` | float16 | float32 | float32 | one scale per residual block |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecision as FSDP1Policy
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from dalle_zoo.models.gradient_scaling import Carrier, GradientScales, GradientScalingConfig, ScaledBranch
from dalle_zoo.models.initial import local
from dalle_zoo.models.residual import ResidualBlock, plain
from dalle_zoo.plots import GRADIENT_SCALES
from dalle_zoo.registry import Registry

StrategyKind = Literal["plain", "fsdp", "fsdp2"]
"""Strategy that a precision is for: one with unsharded weights, FSDP1, or fully_shard."""

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Dtype of computation of the precisions with float32 weights."""
PRECISIONS: Registry[Callable[[str], Precision]] = Registry("precision", group="dalle_zoo.precisions")
"""Precisions by name: functions from the type of a device to a plugin."""


@PRECISIONS.register("32-true")
def full(device: str) -> Precision:
    """float32 everywhere."""
    return Precision()


@PRECISIONS.register("bf16-mixed")
def bfloat16_mixed(device: str) -> Precision:
    """bfloat16, with weights and moments in float32."""
    return MixedPrecision("bf16-mixed", device)


@PRECISIONS.register("bf16-true")
def bfloat16_true(device: str) -> Precision:
    """bfloat16 everywhere, also weights and moments."""
    return HalfPrecision("bf16-true")


@PRECISIONS.register("16-mixed")
def float16_mixed(device: str) -> Precision:
    """float16 with one scale of the loss, weights and moments in float32; needs a GPU."""
    return MixedPrecision("16-mixed", device)


@PRECISIONS.register("16-resblock")
def float16_resblock(device: str) -> Precision:
    """float16 in residual branches with a gradient scale for each, float32 elsewhere, as in the paper."""
    return ResblockPrecision("emulated" if device == "cpu" else "float16")


_FSDP1: Mapping[str, Callable[[str], Precision]] = {
    "32-true": lambda device: FSDP1Precision("32-true", device),
    "bf16-mixed": lambda device: FSDP1Precision("bf16-mixed", device),
    "bf16-true": lambda device: FSDP1Precision("bf16-true", device),
    "16-mixed": lambda device: FSDP1Precision("16-mixed", device),
}


def make_precision(name: str, device_type: str, strategy_kind: StrategyKind = "plain") -> Precision:
    """Returns the plugin of a precision.

    Args:
        name: Name in the table of this module.
        device_type: "cuda", "cpu", …; on the CPU, the float16 of ``16-resblock`` is emulated.
        strategy_kind: Strategy that the plugin is for. Defaults to one with unsharded weights.

    Raises:
        UnknownNameError: The precision is unknown.
        ValueError: The device or the strategy does not support it.
    """
    make = PRECISIONS[name]
    if name == "16-mixed" and device_type == "cpu":  # Lightning would silently train in bfloat16
        raise ValueError(
            "precision 16-mixed needs a GPU: on the CPU use bf16-mixed, or 16-resblock, which emulates float16"
        )
    if strategy_kind != "fsdp":
        return make(device_type)
    if name not in _FSDP1:
        raise ValueError(f"strategy fsdp does not support precision {name}: use fsdp2, or {', '.join(_FSDP1)}")
    return _FSDP1[name](device_type)


class ResblockPrecision(Precision):
    """float16 inside residual branches, with one gradient scale per block; float32 elsewhere.

    ```
    closure      forward and backward pass; gradients of block b are multiplied by S_b
    unscale      they are divided by S_b; all processes agree which blocks have gradients that are not finite
    hooks        on_before_optimizer_step, where strategies exchange gradients, and clipping
    step         skipped, by removing all gradients, if anything is not finite
    update       of the scales
    ```
    Schedules and the trainer count a skipped step like any other.

    Works with unsharded weights, DDP and fully_shard, with recomputation, compilation and accumulated gradients.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.4 and appendix D.

    Args:
        carrier: Format of the numbers in a branch.
        config: Rules by which scales grow and shrink.

    Attributes:
        scales: Scales of the blocks; None until the trainer has set the network up.
        finite: Whether all gradients of the current step are finite in every process, bool () on their device.
        num_skipped: Steps skipped so far.
    """

    precision = "16-resblock"  # type: ignore[assignment]

    def __init__(
        self,
        carrier: Carrier = "float16",
        config: GradientScalingConfig = GradientScalingConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.carrier = carrier
        self.config = config
        self.scales: GradientScales | None = None
        self.finite = torch.tensor(True)
        self.num_skipped = 0
        self._module: nn.Module = nn.Module()
        self._blocks: Sequence[ResidualBlock] = ()
        self._groups: Sequence[Sequence[nn.Parameter]] = ()

    @property
    def unit_policy(self) -> MixedPrecisionPolicy:
        """Policy of fully_shard for a branch: weights gathered in 16 bits, gradients averaged in float32."""
        gathered = torch.float16 if self.carrier == "float16" else None
        # The inputs of a branch have 16 bits already.
        return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Finds the residual blocks of the network.

        Raises:
            ValueError: The network has none.
        """
        net = getattr(module, "net", None)
        find = getattr(net, "residual_blocks", None)
        if find is None:
            raise ValueError(
                f"precision 16-resblock is for networks of residual blocks, such as the prior; {type(net).__name__} "
                "has no residual_blocks(): use 16-mixed or bf16-mixed"
            )
        self._module, self._blocks = module, find()
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Adds gradient scales to the branches of the network, which is on its device by now."""
        groups = [[*block.norm.parameters(), *block.branch.parameters()] for block in self._blocks]
        in_blocks = {parameter for group in groups for parameter in group}
        self._groups = [*groups, [p for p in self._module.parameters() if p not in in_blocks]]
        device = groups[0][0].device
        scales = GradientScales(len(groups), self.config, device)
        if self.scales is not None:  # the trainer has been used before
            scales.load_state_dict(self.scales.state_dict())
        self.scales = scales
        self.finite = torch.tensor(True, device=device)
        for block, scale in zip(self._blocks, scales.values, strict=True):
            block.residual.around = ScaledBranch(scale, self.carrier)
        return model, optimizers, lr_schedulers

    def teardown(self) -> None:
        """Removes the gradient scales from the network."""
        for block in self._blocks:
            block.residual.around = plain

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Makes or skips one step, and updates the scales."""
        scales = self.scales
        assert scales is not None, "connect comes first"

        def prepare() -> Any:
            result = closure()
            finite = self._unscale(scales)
            self.finite = finite.all()
            self._after_closure(model, optimizer)
            if not self.finite:
                self.num_skipped += 1
                optimizer.zero_grad(set_to_none=True)
            scales.update(finite[:-1])
            return result

        result = optimizer.step(closure=prepare, **kwargs)
        self._log(model, scales)
        return result

    @torch.no_grad()
    def _unscale(self, scales: GradientScales) -> Tensor:
        """Divides the gradients of every block by its scale.

        Returns:
            Whether the gradients of every block, and last those of all other parameters, are finite everywhere.
        """
        inverse = torch.cat([scales.values.reciprocal(), scales.values.new_ones(1)])
        overflow = torch.zeros_like(inverse)
        for index, group in enumerate(self._groups):
            gradients = [local(parameter.grad) for parameter in group if parameter.grad is not None]
            if gradients:  # the function of PyTorch's gradient scaler: one pass over the memory
                torch._amp_foreach_non_finite_check_and_unscale_(
                    gradients, overflow[index : index + 1], inverse[index]
                )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(overflow, dist.ReduceOp.MAX)
        return overflow == 0

    def _log(self, module: LightningModule, scales: GradientScales) -> None:
        """Logs log2 of every scale and the number of skipped steps, whenever the trainer logs."""
        trainer = module.trainer
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (trainer.global_step + 1) % every:
            return
        values = scales.values.log2().tolist()
        metrics = {f"{GRADIENT_SCALES}{block.name}": value for block, value in zip(self._blocks, values, strict=True)}
        for logger in module.loggers:
            logger.log_metrics(metrics | {"train/skipped_steps": self.num_skipped}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Scales, their counters, and the number of skipped steps."""
        return {} if self.scales is None else {"num_skipped": self.num_skipped, "scales": self.scales.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`, after the trainer has set the network up."""
        assert self.scales is not None, "connect comes first"
        self.scales.load_state_dict(state_dict["scales"])
        self.num_skipped = state_dict["num_skipped"]


class FSDP1Precision(FSDPPrecision):
    """Precisions of FSDP1, with gradient averages and the identity path in float32; also on the CPU.

    Args:
        precision: "32-true", "bf16-mixed", "bf16-true" or "16-mixed".
        device_type: Where the network runs.
    """

    def __init__(self, precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"], device_type: str) -> None:
        super().__init__(precision)
        self.device_type = device_type

    @property
    def mixed_precision_config(self) -> FSDP1Policy:
        """Policy of the root unit: embeddings, norms and heads are gathered in float32."""
        return FSDP1Policy(reduce_dtype=torch.float32)

    @property
    def unit_config(self) -> FSDP1Policy:
        """Policy of a residual branch: weights are gathered in the dtype of computation."""
        gathered = MIXED.get(self.precision)
        return FSDP1Policy(param_dtype=gathered, reduce_dtype=torch.float32)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast on the device in use; Lightning's is for CUDA only."""
        dtype = MIXED.get(self.precision)
        if dtype is None:
            return super().forward_context()
        return torch.autocast(self.device_type, dtype, cache_enabled=False)
