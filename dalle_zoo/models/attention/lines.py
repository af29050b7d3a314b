"""Attention in lines: fused calls over all text and over the image keys of each line of the grid.

```
            text keys     image keys
text        causal        –                  1 call
image       all           of the line        1 call each, merged: one softmax over both
```
For the paper's masks at 1,280 positions this computes 22 to 34 % of all scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_zoo.masks import Mask
from dalle_zoo.models.attention import fused
from dalle_zoo.models.attention.backends import BACKENDS, cached, sdpa
from dalle_zoo.models.attention.fused import Passed, Reads

# B batch, H heads, L positions, T text positions, N image positions, D head size, G lines of Q queries and U keys


class Lines(NamedTuple):
    """A mask's line plan as tensors on a device."""

    text: int
    """Text positions T."""
    text_bias: Tensor | None
    """Additive mask among text, (1, 1, T, T); None if text is causal."""
    queries: Tensor | None
    """Image queries of each line, int64 (G, Q); None if they are in raster order."""
    order: Tensor
    """Index of each image position among the queries ordered by number in their line, then by line, int64 (N,)."""
    keys: Tensor
    """Image keys of each line, int64 (G, U)."""
    line_bias: Tensor | None
    """Additive mask inside each line, (1, G, Q, U); None if lines are causal."""

    @classmethod
    def of(cls, mask: Mask, device: torch.device) -> Lines:
        """Builds the tensors of a mask on a device."""
        text, plan = mask.layout.text, mask.line_plan()
        among_text = mask.dense()[:text, :text]
        in_order = torch.equal(plan.queries.flatten(), torch.arange(mask.layout.image, device="cpu"))
        causal_text = torch.equal(among_text, torch.ones_like(among_text).tril())
        return cls(
            text,
            None if causal_text else fused.additive(among_text[None, None], device),
            # Copies, because the plan itself may have been created in inference mode.
            None if in_order else plan.queries.to(device, copy=True),
            plan.queries.t().flatten().argsort().to(device),
            plan.keys.to(device, copy=True),
            None if plan.causal else fused.additive(plan.allowed[None], device),
        )

    @property
    def among_text(self) -> Reads:
        """Text keys that text attends to."""
        return Reads(causal=True) if self.text_bias is None else Reads(bias=self.text_bias)

    @property
    def in_line(self) -> Reads:
        """Keys of a line that its queries attend to."""
        return Reads(causal=True) if self.line_bias is None else Reads(bias=self.line_bias)


@BACKENDS.register("lines")
def lines(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Exact attention over only the image keys of each line; a prefix of the stream uses `sdpa`.

    Example:
        >>> from dalle_zoo.masks import TextImageLayout
        >>> from dalle_zoo.models.attention import dense
        >>> mask = Mask.from_spec("column", TextImageLayout(text=4, height=3, width=3))
        >>> query, key, value = torch.randn(3, 1, 2, 13, 8)  # one sample, two heads, 13 positions
        >>> torch.allclose(lines(query, key, value, mask), dense(query, key, value, mask), atol=1e-5)
        True
    """
    complete = query.shape[-2] == mask.layout.length and query.numel()
    if not complete or not fused.supported(query.device, query.dtype):
        return sdpa(query, key, value, mask)
    apply: Any = LineAttention.apply  # typed in some versions of PyTorch only
    out: Tensor = apply(query, key, value, *cached(mask, "lines", query.device, Lines.of))
    return out


class LineAttention(torch.autograd.Function):
    """Computes and merges the parts; both passes consist of fused calls."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *plan: Any) -> Tensor:
        """Queries, keys and values (B, H, L, D) to mixed values (B, H, L, D)."""
        of = Lines(*plan)
        text_query, image_query = _split(query, of)
        text_key, image_key = _split(key, of)
        text_value, image_value = _split(value, of)
        text_out, text_sums = fused.forward(text_query, text_key, text_value, of.among_text)
        far, far_sums = fused.forward(image_query, text_key, text_value, Reads())
        near, near_sums = fused.forward(
            _queries(image_query, of), _keys(image_key, of), _keys(image_value, of), of.in_line
        )
        near, near_sums = (_raster(x, of.order, len(query)) for x in (near, near_sums))
        image_sums = torch.logaddexp(far_sums, near_sums)
        share = (near_sums - image_sums).exp()[..., None]  # of the softmax that falls on the keys of the line
        image_out = torch.lerp(far.to(share.dtype), near.to(share.dtype), share)
        out = _join(text_out, image_out.to(query.dtype))
        ctx.save_for_backward(query, key, value, out, torch.cat([text_sums, image_sums], 2))
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Sums the gradients of the parts, each computed with the softmax sums of the total."""
        of = Lines(*ctx.plan)
        parts = [_split(x, of) for x in (gradient, *ctx.saved_tensors)]
        text, image = Passed(*(part[0] for part in parts)), Passed(*(part[1] for part in parts))
        near_query, near_key, near_value = _in_lines(image, of)
        text_query, text_key, text_value = fused.backward(text, of.among_text)
        far_query, far_key, far_value = fused.backward(image._replace(key=text.key, value=text.value), Reads())
        return (
            _join(text_query, far_query + near_query),
            _join(text_key + far_key, near_key),
            _join(text_value + far_value, near_value),
            *(None for _ in ctx.plan),
        )


def _in_lines(image: Passed, of: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the image's queries, keys and values (B, H, N, D) from attention inside lines."""
    passed = Passed(
        gradient=_queries(image.gradient, of),
        query=_queries(image.query, of),
        key=_keys(image.key, of),
        value=_keys(image.value, of),
        out=_queries(image.out, of),
        sums=_queries(image.sums, of),
    )
    query, key, value = fused.backward(passed, of.in_line)
    batch = len(image.query)
    return _raster(query, of.order, batch), _sum_of_lines(key, of, batch), _sum_of_lines(value, of, batch)


def _split(x: Tensor, of: Lines) -> tuple[Tensor, Tensor]:
    """Splits (B, H, L, …) into text and image."""
    return x[:, :, : of.text], x[:, :, of.text :]


def _join(text: Tensor, image: Tensor) -> Tensor:
    """Joins text and image to (B, H, L, D), in memory (B, L, H, D), so that joining the heads copies nothing."""
    return torch.cat([text.transpose(1, 2), image.transpose(1, 2)], 1).transpose(1, 2)


# For the fused calls, images and heads together are the batch, and lines take the place of heads: so the additive mask
# of lines is broadcast over images and heads. Outputs of fused calls have heads inside positions in memory, and are
# read in that order.


def _queries(x: Tensor, of: Lines) -> Tensor:
    """Gathers the queries of lines: positions (B, H, N, …) to (B H, G, Q, …)."""
    x = x.flatten(0, 1)
    ordered = x if of.queries is None else x.index_select(1, of.queries.flatten())
    return ordered.reshape(len(x), len(of.keys), -1, *x.shape[2:])


def _keys(x: Tensor, of: Lines) -> Tensor:
    """Gathers the keys of lines: positions (B, H, N, D) to (B H, G, U, D)."""
    taken = x.flatten(0, 1).index_select(1, of.keys.flatten())
    return taken.view(len(taken), *of.keys.shape, -1)


def _raster(x: Tensor, order: Tensor, batch: int) -> Tensor:
    """Returns lines (B H, G, Q, …) to positions (B, H, N, …)."""
    ordered = x.transpose(1, 2).flatten(1, 2).index_select(1, order)
    return ordered.view(batch, -1, *ordered.shape[1:])


def _sum_of_lines(x: Tensor, of: Lines, batch: int) -> Tensor:
    """Sums gradients of the lines' keys (B H, G, U, D) over the lines that share a key: (B, H, N, D)."""
    summed = x.new_zeros(len(x), len(of.order), x.shape[-1])
    summed.index_add_(1, of.keys.t().flatten(), x.transpose(1, 2).flatten(1, 2))
    return summed.view(batch, -1, *summed.shape[1:])
