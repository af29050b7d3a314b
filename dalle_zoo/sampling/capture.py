"""One step of sampling that a GPU repeats by itself, as a CUDA graph.

Launching the hundreds of kernels of a step from the host takes longer than they run. A graph launches them all at
once, with the addresses that they had when they were recorded: so the step's inputs, the token before and the step's
own number, stand in fixed places on the device, and nothing in it waits for the host.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from dalle_zoo.models.image_prior import Decoding

# P prompts, n candidates of each

logger = logging.getLogger(__name__)


class SampleFunction(Protocol):
    """Samples one token of every candidate."""

    def __call__(self, index: int | Tensor, previous: Tensor | None) -> Tensor:
        """Number of the token, and the tokens before it (P, n), None at 0, to tokens (P, n)."""


class RepeatedStep:
    """A sampling step with its inputs in place.

    Args:
        sample: The step; takes its number as int64 (1,).
        index: A number that may be sampled in trial: what it writes is written again when its turn comes.
        previous: Tokens before it, (P, n).
        capture: Whether to record a CUDA graph. Without, each call runs the step again, which any device can do.

    Raises:
        RuntimeError: The step cannot be recorded.
    """

    def __init__(self, sample: SampleFunction, index: int, previous: Tensor, capture: bool = True) -> None:
        self.sample = sample
        self.index = torch.full((1,), index, device=previous.device)
        self.previous = previous.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            with torch.cuda.device(previous.device):  # streams and graphs are those of the current device
                self._record()

    def _record(self) -> None:
        # Libraries set themselves up at the first calls, which must not be part of the graph.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.sample(self.index, self.previous)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.sampled = self.sample(self.index, self.previous)

    def __call__(self, index: int | Tensor, previous: Tensor | None) -> Tensor:
        """Tokens (P, n), which the next call overwrites."""
        assert previous is not None
        assert isinstance(index, int)
        self.index.fill_(index)
        self.previous.copy_(previous)
        if self.graph is None:
            return self.sample(self.index, self.previous)
        self.graph.replay()
        return self.sampled


def repeated(sample: SampleFunction, decoder: Decoding, index: int, previous: Tensor) -> SampleFunction:
    """The step as a CUDA graph, or as it is where the decoder takes its number from the host or recording fails."""
    if not getattr(decoder, "on_device", False):
        return sample
    try:
        return RepeatedStep(sample, index, previous)
    except RuntimeError as error:
        logger.warning("sampling goes on without a CUDA graph, which is slower: %s", error)
        return sample
