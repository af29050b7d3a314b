"""PowerSGD: the mean of gradient matrices over machines, sent as two thin factors, with error feedback.

```
E_i  + gradient_i          (s, l)   on machine i of n; includes what has not been applied yet
P  = mean(E_i) Q           (s, r)   first all-reduce; Q is Gaussian, fixed, the same on all machines
P  = orthonormal(P)        (s, r)
R  = mean(E_i)^T P         (l, r)   second all-reduce
G  = P R^T                 (s, l)   is applied: the projection of mean(E_i) onto the columns of P
E_i - G                    (s, l)   error, added to the gradient of the next step
```

Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.5 and appendix E.2, after PowerSGD
(Vogels et al., 2019). The paper writes Q for both thin matrices.

**What each machine subtracts.** The paper divides its loss by the overall batch, so the gradient of all machines is
the *sum* of the original: G stands for the sum of n buffers, and each gives up its share G / n (step 12). Here the
loss is a mean over the local batch, gradients are n times as large, and G stands for the *mean* of the buffers. In
units of the paper ``E_i - G / n`` with ``G = sum E_i`` is, multiplied by n, ``E_i - G`` with ``G = mean E_i``: each
machine subtracts all of G. Either way the defining invariant holds: over any number of steps, the sum of what was
applied plus ``mean(E_i)`` equals the sum of the exact mean gradients. For the same reason the paper's sum of buffers,
which is what a checkpoint needs, is their mean here.

Departures from the paper: buffers and factors are float32 or bfloat16 where it has a 16-bit format of its own with a
narrower range, so none of its constants that move numbers into that range are needed; the identity that keeps QR
from breaking down is relative to P's largest entry; a step that is skipped leaves no trace in the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_zoo.models.initial import fill

# n machines, i one of them; s the shorter and l the longer side of a matrix; r rank

IDENTITY = 1e-6
"""Multiple of the rectangular identity added to P, scaled to a largest entry of 1, before QR (appendix E.2)."""


class Traffic(NamedTuple):
    """Bytes that one process passes to the all-reduces of one step, without the flag."""

    factors: int
    """P and R of the compressed matrices, in the wire dtype."""
    uncompressed: int
    """Uncompressed tensors, float32."""
    matrices: int
    """Size of the compressed matrices before compression, in the wire dtype."""

    @property
    def sent(self) -> int:
        """Total bytes of the step."""
        return self.factors + self.uncompressed

    @property
    def compression_rate(self) -> float:
        """Share of the bytes of compressed matrices that is saved, as in table 1 of the paper."""
        return 1 - self.factors / self.matrices if self.matrices else 0.0


def compresses(shape: Sequence[int], rank: int) -> bool:
    """Whether the two factors of a matrix are smaller than the matrix: ``r (s + l) < s l``, which implies r < s.

    Example:
        >>> compresses((496, 3968), 112), compresses((496, 3968), 448)
        (True, False)
    """
    rows, columns = shape
    return rank * (rows + columns) < rows * columns


class PowerSGD:
    """Averages the gradients of a step over machines, in place, after the backward pass.

    Matrices are processed with their shorter side first, transposed if needed, since orthogonalizing the shorter
    factor is cheaper; Q is sampled for the longer side. Q depends only on (seed, name, shape). It is sampled once and
    never updated: warm starts gain nothing, and resampling it at every step hurts.

    A matrix whose factors would not be smaller is sent uncompressed, together with the error that a run of smaller
    rank has left for it.

    All processes of a group must call with the same names and shapes in the same order. The all-reduces give them
    bitwise equal factors, from which equal hardware computes equal gradients.

    Args:
        rank: Rank r of every matrix that this process sends; for a sharded matrix, the total rank / shards.
        group: Processes to average over: those with the same local rank on all machines. Defaults to all processes.
        world: Processes that must agree whether a step is finite. Defaults to all processes.
        seed: Seed of Q. Defaults to 0.
        wire_dtype: Dtype of P and R in the all-reduces. bfloat16 halves the bytes; values that round to infinity are
            clamped to its largest number, and error feedback retains the difference. Defaults to float32.
        error_dtype: Dtype of the error buffers; bfloat16 halves their memory and rounds them. Defaults to float32.
        error_feedback: Whether the error of a step is added to the next one; otherwise it is lost. Defaults to True.

    Attributes:
        traffic: Traffic of the last `reduce`; None before the first.
    """

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup | None = None,
        world: dist.ProcessGroup | None = None,
        *,
        seed: int = 0,
        wire_dtype: torch.dtype = torch.float32,
        error_dtype: torch.dtype = torch.float32,
        error_feedback: bool = True,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}: with shards it is the total rank / shards")
        for what, dtype in (("wire_dtype", wire_dtype), ("error_dtype", error_dtype)):
            if dtype not in (torch.float32, torch.bfloat16):  # float16 would need the paper's hand-tuned constants
                raise ValueError(f"{what} must be torch.float32 or torch.bfloat16, got {dtype}")
        self.rank, self.group, self.world, self.seed = rank, group, world, seed
        self.wire_dtype, self.error_dtype, self.error_feedback = wire_dtype, error_dtype, error_feedback
        self.size = dist.get_world_size(group)
        self.traffic: Traffic | None = None
        self._gaussians: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}

    @torch.no_grad()
    def reduce(
        self, matrices: Mapping[str, Tensor], others: Sequence[Tensor] = (), finite: Tensor | None = None
    ) -> bool:
        """Replaces this process's gradients by the means over the group.

        Only the returned flag waits for the device.

        Args:
            matrices: Local gradients by name, each (rows, columns) with any strides; overwritten by P R^T.
            others: Local gradients of any shape that are not compressed; overwritten by their mean, from one float32
                all-reduce. Defaults to none.
            finite: Whether this process's gradients are finite, a boolean scalar on their device. Defaults to
                unknown.

        Returns:
            Whether all numbers of all processes are finite. If not, the caller must drop the gradients. The error
            buffers are then unchanged, except that buffers with numbers that are not finite are reset to zero (step
            12).

        Raises:
            ValueError: There are no gradients, a matrix does not have two dimensions, or an error buffer has no
                matrix of its shape.
        """
        if not matrices and not others:
            raise ValueError("there are no gradients to reduce: call reduce after the backward pass")
        self._check(matrices)
        factored = [name for name, matrix in matrices.items() if compresses(matrix.shape, self.rank)]
        uncompressed = {name: matrix for name, matrix in matrices.items() if not compresses(matrix.shape, self.rank)}
        totals = {name: self._add_error(name, matrix) for name, matrix in matrices.items()}
        wide = [shorter_side_first(totals[name]) for name in factored]

        gaussians = [self._gaussian(name, total) for name, total in zip(factored, wide, strict=True)]
        left, left_finite = self._mean([e @ q for e, q in zip(wide, gaussians, strict=True)], self.wire_dtype)
        left = orthonormal(left)
        right, right_finite = self._mean([e.t() @ p for e, p in zip(wide, left, strict=True)], self.wire_dtype)
        means, means_finite = self._mean([*(totals[name] for name in uncompressed), *others], torch.float32)
        self.traffic = Traffic(
            factors=self.wire_dtype.itemsize * sum(p.numel() + r.numel() for p, r in zip(left, right, strict=True)),
            uncompressed=4 * sum(mean.numel() for mean in means),
            matrices=self.wire_dtype.itemsize * sum(total.numel() for total in wide),
        )

        # A number of a matrix that is not finite spreads to a row of P, so checking P and R suffices for matrices.
        flags = [left_finite, right_finite, means_finite, *([] if finite is None else [finite])]
        if not self._everywhere([flag for flag in flags if flag is not None]):
            for error in self._errors.values():
                error.copy_(torch.where(error.isfinite().all(), error, 0.0))
            return False
        for name, total, p, r in zip(factored, wide, left, right, strict=True):
            gradient = (p @ r.t()).to(matrices[name].dtype)  # rounded as applied, so that the error includes rounding
            if self.error_feedback:
                torch.sub(total, gradient, out=shorter_side_first(self._errors[name]))
            shorter_side_first(matrices[name]).copy_(gradient)
        for tensor, mean in zip([*uncompressed.values(), *others], means, strict=True):
            tensor.copy_(mean)
        for name in uncompressed:  # their pending errors have been sent
            self._errors.pop(name, None)
        return True

    def error_means(self) -> dict[str, Tensor]:
        """Returns the mean of the error buffers over the group, by name: all that a checkpoint needs (appendix E.2).

        The invariant depends only on their mean, so a run may resume with another number of machines. Every process
        of the group must call. The tensors are float32 on the CPU, since the device may not have memory for them.
        """
        return {name: self._mean([error], torch.float32)[0][0].cpu() for name, error in self._errors.items()}

    def load_error_means(self, means: Mapping[str, Tensor]) -> None:
        """Sets the error buffers of every process to means from `error_means`, of a group of any size.

        Raises:
            ValueError: Error feedback is off.
        """
        if not self.error_feedback:
            raise ValueError("error_feedback is off, so error buffers cannot be loaded: enable it")
        self._errors = {name: mean.to(self.error_dtype, copy=True) for name, mean in means.items()}

    def _check(self, matrices: Mapping[str, Tensor]) -> None:
        """Raises `ValueError` for a tensor that is not a matrix, and for buffers that do not fit the matrices."""
        for name, matrix in matrices.items():
            if matrix.ndim != 2:
                raise ValueError(f"{name} must have two dimensions, got {tuple(matrix.shape)}: put it with the others")
        for name, error in self._errors.items():
            found = tuple(matrices[name].shape) if name in matrices else "missing"
            if found != tuple(error.shape):
                raise ValueError(
                    f"{name}: the error buffer has shape {tuple(error.shape)}, the gradient is {found}: error buffers "
                    f"fit the network and the shards that they were made with"
                )

    def _add_error(self, name: str, matrix: Tensor) -> Tensor:
        """Gradient plus error, float32 (rows, columns), in the memory of a float32 gradient."""
        if self.error_feedback and name not in self._errors and compresses(matrix.shape, self.rank):
            self._errors[name] = torch.zeros(matrix.shape, dtype=self.error_dtype, device=matrix.device)
        total = matrix.float()
        if name in self._errors:
            self._errors[name] = self._errors[name].to(matrix.device)  # loaded buffers start on the CPU
            total.add_(self._errors[name])
        return total

    def _gaussian(self, name: str, total: Tensor) -> Tensor:
        """Q of a matrix (s, l): (l, r)."""
        if name not in self._gaussians:
            gaussian = torch.empty(total.shape[1], self.rank)
            fill(gaussian, 0.0, 1.0, self.seed, name)
            self._gaussians[name] = gaussian.to(total.device)
        return self._gaussians[name]

    def _mean(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        """Computes means over the group with one all-reduce in ``dtype``.

        Returns:
            Float32 means in the shapes of the tensors, and whether all tensors are finite on this process.
        """
        if not tensors:
            return [], None
        flat = (
            torch.cat([tensor.reshape(-1).float() for tensor in tensors]) / self.size
        )  # before the sum, which then stays in range
        finite = flat.isfinite().all()
        wire = flat.to(dtype).nan_to_num_()
        dist.all_reduce(wire, group=self.group)
        mean = wire.nan_to_num_().float()  # a sum of values that were rounded up may be infinite again
        parts = torch.split(mean, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)], finite

    def _everywhere(self, flags: Sequence[Tensor]) -> bool:
        """Whether all flags are true in all processes of the world."""
        flag = torch.stack([flag.reshape(()) for flag in flags]).all().to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.world)
        return bool(flag.item())


def shorter_side_first(matrix: Tensor) -> Tensor:
    """Returns the matrix or its transpose, a view (s, l)."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()


def orthonormal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Computes orthonormal bases of the columns of matrices (s, r), by Householder QR, batched by shape.

    A small multiple of the identity is added, so matrices without full rank, even zero, have a basis too.
    """
    bases: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        numbers = [number for number, matrix in enumerate(matrices) if matrix.shape == shape]
        stack = torch.stack([matrices[number] for number in numbers])
        largest = stack.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(stack.dtype).tiny)
        stack = stack / largest + IDENTITY * torch.eye(*shape, device=stack.device)
        bases.update(zip(numbers, torch.linalg.qr(stack).Q, strict=True))
    return [bases[number] for number in range(len(matrices))]
