"""AdamW: the running variance clipped by value, and moments of reduced precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from dalle_zoo.models.initial import local
from dalle_zoo.training.muon import Muon, MuonConfig

BLOCK = 256
"""Number of values of a quantized moment that share a scale."""
SMALLEST = 4096
"""Tensors with fewer values have float32 moments in every format."""
CHUNK = 2**25
"""Number of values that are updated together. The temporary memory of a step is below two float32 arrays of this
size, and below four for quantized moments."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW; tensors of two or more dimensions decay (matrices, convolutions, embeddings), biases and gains do not.

    Example:
        >>> net, config = nn.Linear(2, 2), AdamWConfig(weight_decay=0.1)
        >>> optimizer = make_optimizer(net, config, learning_rate=1e-3, decayed=decayed_names(net))
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]  # matrix, bias
        [(1, 0.1), (1, 0.0)]
    """

    beta1: float = 0.9
    """Decay of the running mean."""
    beta2: float = 0.999
    """Decay of the running variance."""
    eps: float = 1e-8
    """Term added to the root of the running variance."""
    weight_decay: float = 1e-4
    """Decoupled weight decay multiplier."""
    variance_clip: float | None = None
    """Upper limit of the running variance, clipped by value before parameters and moments are updated (appendix B.2).
    Defaults to None, no clipping."""
    moments: Literal["float32", "8bit", "fp8"] = "float32"
    """Format of the running mean and variance of large tensors: 4 bytes per value, or 1. "8bit" and "fp8" are formats
    of torchao, with a float32 scale for every 256 values. The paper's 1-6-9 and 0-6-10 bit formats take 2 bytes."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.variance_clip is not None and not self.variance_clip > 0:
            raise ValueError(f"variance_clip must be above 0, or null for none, got {self.variance_clip}")
        if self.moments not in ("float32", "8bit", "fp8"):
            raise ValueError(f"moments must be 'float32', '8bit' or 'fp8', got {self.moments!r}")


def decayed_names(net: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters with weight decay.

    It must be called before a strategy shards the network, since FSDP1 makes every parameter one-dimensional.
    """
    return frozenset(name for name, p in net.named_parameters() if p.ndim >= 2)


def make_optimizer(
    net: nn.Module,
    config: AdamWConfig,
    learning_rate: float,
    decayed: frozenset[str],
    muon: MuonConfig | None = None,
    hidden: frozenset[str] = frozenset(),
    others: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW over the parameters that need gradients: two groups, those that decay and the others.

    Args:
        net: Network, complete or as a strategy has sharded it.
        config: Settings.
        learning_rate: First learning rate.
        decayed: Names of the parameters that decay, of `decayed_names`.
        muon: Settings of `Muon`, which then updates the hidden matrices. Defaults to AdamW for all.
        hidden: Names of the matrices that Muon updates.
        others: Parameters outside the network that are trained with it and do not decay.

    Returns:
        PyTorch's fused AdamW where the settings are its own; else `ClippedAdamW`. Their states can be exchanged.

    Raises:
        ValueError: A name in ``decayed`` is not the network's.
        ImportError: The moments are of reduced precision, and torchao is missing.
    """
    parameters = {_plain(name): p for name, p in net.named_parameters()}
    if unknown := decayed - parameters.keys():
        raise ValueError(f"the network has no parameter {sorted(unknown)[0]!r}: expected one of {sorted(parameters)}")
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if muon is not None:
        if config.moments != "float32":
            raise ValueError(
                f"muon takes float32 moments, got adamw.moments {config.moments!r}: set it to float32, or drop muon"
            )
        rest = [name for name in trained if name not in hidden]
        adamw = _adamw({name: trained[name] for name in rest}, config, learning_rate, decayed, others)
        made: torch.optim.Optimizer = Muon(
            [p for name, p in trained.items() if name in hidden], adamw, learning_rate, muon
        )
    else:
        made = _adamw(trained, config, learning_rate, decayed, others)
    made.register_load_state_dict_post_hook(_lay_out_moments)
    return made


def _adamw(
    trained: dict[str, nn.Parameter],
    config: AdamWConfig,
    learning_rate: float,
    decayed: frozenset[str],
    others: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": config.weight_decay},
        {"params": [*(p for name, p in trained.items() if name not in decayed), *others], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.variance_clip is not None or config.moments != "float32":
        return ClippedAdamW(groups, **settings, variance_clip=config.variance_clip, moments=config.moments)
    fused = all(p.device.type in ("cpu", "cuda") for p in trained.values())
    optimizer = torch.optim.AdamW(groups, **settings, fused=fused or None)
    # A fused step can unscale gradients by itself, and Lightning then refuses to clip their norm under 16-mixed. This
    # has the gradient scaler do it before the step, as for every other optimizer.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded moments the memory layout of their parameters.

    A fused step on a CPU reads all arrays of a parameter in the order of memory without a check, and one on a GPU
    refuses arrays that differ. Checkpoints may have another layout than a network in channels-last order.
    """
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state.get(name)
            if type(moment) is Tensor and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def _share_layout(*tensors: Tensor) -> bool:
    """Whether tensors of one shape have their values in the same order of memory, without gaps."""
    formats = [torch.contiguous_format] + [torch.channels_last] * (tensors[0].ndim == 4)
    return any(all(tensor.is_contiguous(memory_format=format_) for tensor in tensors) for format_ in formats)


def _plain(name: str) -> str:
    """Removes the wrappers of FSDP1 and torch.compile from the name of a parameter."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


class ClippedAdamW(torch.optim.Optimizer):
    """AdamW whose running variance is clipped by value.

    ```
    m ← β₁ m + (1 − β₁) g        v ← min(β₂ v + (1 − β₂) g², variance_clip)
    θ ← θ − lr · weight_decay · θ − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps)
    ```

    A parameter without a gradient is not updated, nor are its moments and its step count: setting all gradients to
    None skips a step. Parameters may be DTensors; each process updates its own shard.

    The state of a parameter has the names of `torch.optim.AdamW`: ``step``, ``exp_avg``, ``exp_avg_sq``. A state dict
    has moments of reduced precision as float32 on the CPU, so it fits every format, number of processes and strategy.
    Loading rounds them once more, so a run with such moments does not resume bit by bit.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix B.2.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decays of the running mean and of the running variance.
        eps: Added to the root of the running variance.
        weight_decay: Decoupled weight decay multiplier.
        variance_clip: Largest running variance; None does not clip.
        moments: Format of the moments, as in `AdamWConfig`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variance_clip: float | None = None,
        moments: str = "float32",
    ) -> None:
        self.variance_clip = variance_clip
        self.moments = moments
        self.quantized: Any = quantized_type(moments) if moments != "float32" else None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one step. The closure, if given, computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for chunk in chunks([p for p in group["params"] if p.grad is not None]):
                self._update(chunk, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Updates some parameters of a group."""
        states = [self._state(p) for p in parameters]
        values = [local(p) for p in parameters]
        means = [self._unpacked(state["exp_avg"]) for state in states]
        variances = [self._unpacked(state["exp_avg_sq"]) for state in states]
        gradients = [local(p.grad).to(m.dtype) for p, m in zip(parameters, means, strict=True) if p.grad is not None]
        steps = [state["step"] for state in states]
        if self._clips_nothing(values, gradients, means, variances):
            beta1, beta2 = group["betas"]
            settings = {key: group[key] for key in ("lr", "eps", "weight_decay")}
            fused_adamw(
                values, gradients, means, variances, [], steps, fused=True, amsgrad=False, maximize=False, beta1=beta1,
                beta2=beta2, **settings,
            )  # fmt: skip
        else:
            self._update_clipped(values, gradients, means, variances, steps, group)

        for state, mean, variance in zip(states, means, variances, strict=True):
            for name, moment in (("exp_avg", mean), ("exp_avg_sq", variance)):
                if self._is_packed(state[name]):
                    state[name].copy_(moment)

    def _clips_nothing(
        self, values: list[Tensor], gradients: list[Tensor], means: list[Tensor], variances: list[Tensor]
    ) -> bool:
        """Whether PyTorch's own update is known to give the same result, in a quarter of the time on a CPU.

        If the stored variance is at most the limit, and every squared gradient is, the next variance is, too. A loaded
        variance may be above. A GPU is not asked, since the answer would have to be waited for.
        """
        if any(value.device.type != "cpu" or value.dtype != torch.float32 for value in values):
            return False
        if not all(map(_share_layout, values, gradients, means, variances)):
            return False
        if self.variance_clip is None:
            return True
        limit = self.variance_clip**0.5
        extremes = (torch.aminmax(gradient) for gradient in gradients if gradient.numel())
        return all(-limit <= float(low) and float(high) <= limit for low, high in extremes) and all(
            float(variance.max()) <= self.variance_clip for variance in variances if variance.numel()
        )

    def _update_clipped(
        self,
        values: list[Tensor],
        gradients: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        steps: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        beta1, beta2 = group["betas"]
        for step in steps:
            step.add_(1)
        counts = [float(step) for step in steps]
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, gradients, gradients, 1 - beta2)
        if self.variance_clip is not None:
            torch._foreach_clamp_max_(variances, self.variance_clip)
        roots = torch._foreach_sqrt(variances)
        torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(values, means, roots, [-group["lr"] / (1 - beta1**count) for count in counts])

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """Returns the state of a parameter, initialized with zeros before its first step."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the CPU, so that reading it does not wait for the GPU
            state["exp_avg"] = self._packed(torch.zeros_like(parameter), signed=True)
            state["exp_avg_sq"] = self._packed(torch.zeros_like(parameter), signed=False)
        return state

    def _packed(self, moment: Tensor, signed: bool) -> Tensor:
        """Converts a moment to its stored format; one of reduced precision has only this process's shard."""
        values = local(moment)
        if self.quantized is None or values.numel() < SMALLEST or values.numel() % BLOCK:
            return moment
        signs = {"signed": signed} if self.moments == "8bit" else {}  # fp8 values have signs
        packed: Tensor = self.quantized.zeros(values.shape, block_size=BLOCK, device=values.device, **signs)
        packed.copy_(values.float().contiguous())
        return packed

    def _is_packed(self, moment: Tensor) -> bool:
        return self.quantized is not None and isinstance(moment, self.quantized)

    def _unpacked(self, moment: Tensor) -> Tensor:
        """Returns this process's values of a moment; a float32 copy if its precision is reduced."""
        if not self._is_packed(moment):
            return local(moment)
        values: Tensor = moment.dequantize()
        return values

    def _unsharded(self, moment: Tensor, parameter: Tensor) -> Tensor:
        """Converts a moment of reduced precision to float32 on the CPU, sharded like the parameter."""
        if not self._is_packed(moment):
            return moment
        unsharded = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        local(unsharded).copy_(self._unpacked(moment))
        return unsharded.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as `torch.optim.AdamW` does, with moments of reduced precision as float32 on the CPU."""
        packed = super().state_dict()
        if self.quantized is None:
            return packed
        parameters = [p for group in self.param_groups for p in group["params"]]
        unsharded = {
            index: {name: self._unsharded(value, parameters[index]) for name, value in state.items()}
            for index, state in packed["state"].items()
        }
        return {**packed, "state": unsharded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of `torch.optim.AdamW`."""
        # Packed before the base class moves it to the GPU, which may not have memory for all of it in float32.
        packed = {
            index: {
                name: self._packed(value, signed=name == "exp_avg") if name != "step" else value
                for name, value in state.items()
            }
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": packed})
        for state in self.state.values():
            state["step"] = state["step"].cpu()  # a fused AdamW stores it on the GPU


def chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups parameters, in order, to at most `CHUNK` values of this process; larger parameters are groups of one."""
    chunk: list[Tensor] = []
    size = 0
    for parameter in parameters:
        own = local(parameter).numel()
        if chunk and size + own > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += own
    if chunk:
        yield chunk


def quantized_type(moments: str) -> type[Tensor]:
    """Returns torchao's tensor class of a format of quantized values.

    Args:
        moments: "8bit" or "fp8".

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
        from torchao.optim.subclass_fp8 import OptimStateFp8
    except ImportError as error:
        raise ImportError(f"adamw.moments {moments!r} needs torchao: pip install dalle-zoo[moments]") from error
    types: dict[str, type[Tensor]] = {"8bit": OptimState8bit, "fp8": OptimStateFp8}
    return types[moments]
