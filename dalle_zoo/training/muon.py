"""Muon: momentum whose matrices are orthogonalized, for the hidden layers; AdamW for everything else.

```
M ← momentum M + (1 − momentum) G      U ← orthogonalize((1 − momentum) G + momentum M)      (Nesterov)
W ← W − lr · weight_decay · W − lr · √max(1, rows / columns) · U
```

`torch.optim.Muon` computes the same, but always in bfloat16 and one matrix at a time. On a CPU without bfloat16
arithmetic that takes several times as long as float32, more than the rest of a small update. Here the precision
follows the device, matrices of one shape are orthogonalized in one batched product, and the ranks of a run share the
matrices among them. The tests compare both.

Reference: Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024). Not in the paper.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

# R rows, C columns of a matrix, N matrices of one shape

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: they maximize its slope at 0, and singular values end between 0.7 and 1.2."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the weight matrices of the residual blocks; the other parameters stay with AdamW.

    The learning rate of the schedule is that of the matrices, of the order of 0.02.
    """

    momentum: float = 0.95
    """Decay of the momentum."""
    weight_decay: float = 0.0
    """Decoupled weight decay multiplier of the matrices."""
    iterations: int = 5
    """Newton-Schulz iterations of the orthogonalization."""
    adamw_ratio: float = 0.15
    """Learning rate of the parameters that AdamW updates, as a share of that of the matrices."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the orthogonalization; auto is bfloat16 where the device computes in it, else float32."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 1 <= self.iterations < 100:
            raise ValueError(f"iterations must be in 1..99, got {self.iterations}")
        if not self.adamw_ratio > 0:
            raise ValueError(f"adamw_ratio must be above 0, got {self.adamw_ratio}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype must be 'auto', 'bfloat16' or 'float32', got {self.dtype!r}")

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Precision of the orthogonalization on a device."""
        if self.dtype != "auto":
            return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]
        if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16
        return torch.float32


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest, as one optimizer with one state.

    The state of a matrix is ``momentum_buffer``, that of the others is AdamW's. A parameter without a gradient is left
    alone.

    Args:
        matrices: Parameters of two dimensions that Muon updates.
        adamw: Optimizer of all other parameters; its groups become groups of this one.
        lr: Learning rate of the matrices; that of the others is ``adamw_ratio`` times it.
        config: Settings.

    Raises:
        ValueError: There is no matrix, or one of them has another number of dimensions or is sharded.
    """

    def __init__(
        self, matrices: Iterable[Tensor], adamw: torch.optim.Optimizer, lr: float, config: MuonConfig
    ) -> None:
        chosen = list(matrices)
        if not chosen:
            raise ValueError("Muon has nothing to update: none of the matrices of the residual blocks is trained")
        for matrix in chosen:
            if isinstance(matrix, DTensor) or matrix.ndim != 2:
                raise ValueError(
                    f"Muon updates complete matrices, got shape {tuple(matrix.shape)}"
                    f"{' in shards' if isinstance(matrix, DTensor) else ''}: use strategy ddp or ddp_powersgd, or "
                    "leave model.muon out"
                )
        self.config, self._adamw = config, adamw
        group = {"params": chosen, "lr": lr, "lr_ratio": 1.0, "weight_decay": config.weight_decay}
        for other in adamw.param_groups:
            other.update(lr=lr * config.adamw_ratio, lr_ratio=config.adamw_ratio)
        super().__init__([group, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one step; the closure, if any, computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_matrices(self.param_groups[0])
        # Loading a state dict replaces groups and state, so AdamW is given them anew.
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
        self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int, torch.device], list[Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[*matrix.shape, matrix.device].append(matrix)
        for (rows, columns, device), matrices in by_shape.items():
            directions = torch.stack([self._direction(matrix) for matrix in matrices])
            updates = orthogonalized_by_all(directions, self.config.iterations, self.config.dtype_on(device))
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.to(matrix.dtype), alpha=-rate)

    def _direction(self, matrix: Tensor) -> Tensor:
        """Nesterov momentum of a matrix, float32 (R, C)."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix, dtype=torch.float32)
        gradient = matrix.grad.float()
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - self.config.momentum)
        return gradient.lerp(momentum, self.config.momentum)


def orthogonalized_by_all(matrices: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Orthogonalizes a share of the matrices on each rank, and gathers all of them on every rank.

    Args:
        matrices: float32 (N, R, C), the same on every rank: gradients are averaged before.
        iterations: Number of iterations.
        dtype: Precision of the products.

    Returns:
        Tensor of ``dtype``, (N, R, C), the same on every rank.
    """
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if ranks == 1:
        return orthogonalized(matrices, iterations, dtype)
    share = math.ceil(len(matrices) / ranks)
    start = share * distributed.get_rank()
    own = matrices.new_zeros((share, *matrices.shape[1:]), dtype=dtype)
    if mine := len(matrices[start : start + share]):
        own[:mine] = orthogonalized(matrices[start : start + share], iterations, dtype)
    gathered = own.new_empty((ranks * share, *matrices.shape[1:]))
    distributed.all_gather_into_tensor(gathered, own)
    return gathered[: len(matrices)]


def orthogonalized(matrices: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Replaces every singular value by one near 1, with a quintic Newton-Schulz iteration.

    Args:
        matrices: float32 (N, R, C).
        iterations: Number of iterations.
        dtype: Precision of the products.

    Returns:
        Tensor of ``dtype``, (N, R, C).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT.contiguous() if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
