"""Progress of sampling, for callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# P prompts, n candidates of each, h w code grid

SAMPLE = -1
"""Value of a cell that is to be sampled, or is not sampled yet, among codes."""


@dataclass(frozen=True)
class Progress:
    """State of a generation after a pass of the prior.

    Example:
        >>> import torch
        >>> codes = torch.tensor([[[[5, 3], [7, SAMPLE]]]])  # one prompt, one candidate, 2 x 2 cells
        >>> progress = Progress(done=3, total=4, read_codes=codes.clone)
        >>> progress.done / progress.total, (progress.codes == SAMPLE).sum().item()
        (0.75, 1)
    """

    done: int
    """Number of tokens of an image that are final, summed over the batches of a call."""
    total: int
    """Number of tokens of an image, summed likewise."""
    read_codes: Callable[[], Tensor] = field(repr=False)
    """Computes `codes`."""

    @property
    def codes(self) -> Tensor:
        """Codes so far, int64 (P, n, h, w), with `SAMPLE` at the cells that are not final; a new tensor."""
        return self.read_codes()


Callback = Callable[[Progress], None]
"""Called after every pass of the prior. An exception that it raises ends the generation."""
