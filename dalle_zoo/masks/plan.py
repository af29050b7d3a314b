"""Derives from a mask its matrix, attention arguments, decode tables, cache plan and cost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dalle_zoo.masks.layout import MaskMod, TextImageLayout
from dalle_zoo.masks.lines import LinePlan, LineSizes, line_sizes, line_sizes_of, plan_lines
from dalle_zoo.masks.spec import MaskSpec
from dalle_zoo.values import check_type

if TYPE_CHECKING:  # functions that create tensors import torch: listing masks does not
    from collections.abc import Iterator

    import torch
    from torch import Tensor

# T text positions, N image positions, L = T + N, n most image keys of a step, H W rows and columns of the grid

PAIRS = 2**22
"""Number of position pairs for which a mask is evaluated at once."""


@dataclass(frozen=True, eq=False)
class DecodeTable:
    """Image keys that each image step attends to. Text is not listed: every step attends to all of it.

    Example:
        >>> table = Mask.from_spec("row", TextImageLayout(text=1, height=2, width=2)).decode_table()
        >>> [keys[valid].tolist() for keys, valid in zip(table.keys, table.valid)]  # two cells back and itself
        [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    """

    keys: Tensor
    """Raster indices, ascending, int64 (N, n). Padding repeats the step's own key."""
    valid: Tensor
    """False at padding, bool (N, n)."""


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Slots of a static key-value cache that holds only the keys that a later step still attends to.

    Step i writes the key of image position i to slot ``slot_of_key[i]``, then reads
    ``read_slots[i]`` where ``valid[i]``. No slot is overwritten before the last read of its key. A pass over a window
    of W positions i … i+W-1 writes all of their keys before it reads, so a key stays for W - 1 more steps: positions
    whose tokens were only guesses may be run again from i+1 on.

    Slots are numbered along the rows or columns of the grid that form the lines of the mask's line plan, so that keys
    that are read together are contiguous.

    Example:
        >>> plan = Mask.from_spec("row", TextImageLayout(text=2, height=4, width=4)).cache_plan()
        >>> plan.num_slots, len(plan.slot_of_key)  # 5 slots are enough for 16 keys
        (5, 16)
    """

    num_slots: int
    """Number of slots for image keys; text needs T more."""
    slot_of_key: Tensor
    """Slot of each image key while it is cached, int64 (N,)."""
    read_slots: Tensor
    """Slots that each step reads, in the order of `DecodeTable.keys`, int64 (N, n)."""
    valid: Tensor
    """False at padding, bool (N, n)."""


@dataclass(frozen=True, eq=False)
class Mask:
    """An attention mask on a layout, and everything derived from its declaration.

    Construction checks the contract of a mask: no position attends to a later one, each attends to itself, and every
    image position attends to all text. Tables and matrix are computed once, on first use. Masks compare by identity,
    because a spec does not determine what a custom ``mod`` does.

    Args:
        spec: Name and options, for messages and plots.
        layout: Positions of text and image.
        mod: Declaration of the mask, a function of positions.

    Raises:
        TypeError: ``mod`` does not return a bool tensor.
        ValueError: ``mod`` breaks the contract, or its result does not fit the layout.

    Example:
        >>> mask = Mask.from_spec("row", TextImageLayout(text=256, height=32, width=32))
        >>> mask.num_pairs, round(mask.density, 3), mask.cache_plan().num_slots
        (328304, 0.4, 33)
    """

    spec: str
    layout: TextImageLayout
    mod: MaskMod = field(repr=False)
    cached: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Tensors and choices that attention back-ends derive from the mask for a device, by name."""
    registered: bool = field(default=False, init=False, repr=False)
    """Whether `from_spec` built the mask, so that spec and layout determine it."""

    @classmethod
    def from_spec(cls, spec: str, layout: TextImageLayout) -> Mask:
        """Builds a registered mask.

        Args:
            spec: ``"row"``, ``"conv(kernel=3)"``: a name of `MASKS`, integer options by keyword.
            layout: Positions of text and image.

        Raises:
            UnknownNameError: There is no such mask or option; the message suggests the most similar name. It is also a
                `ValueError`.
            ValueError: The text is not a spec, or an option is out of range.

        Example:
            >>> Mask.from_spec(" conv( kernel = 3 )", TextImageLayout(text=2, height=4, width=4)).spec
            'conv(kernel=3)'
        """
        check_type("layout", layout, TextImageLayout, "a TextImageLayout")
        parsed = MaskSpec.parse(spec)
        mask = cls(str(parsed), layout, parsed.build(layout))
        object.__setattr__(mask, "registered", True)
        return mask

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickles a registered mask as its spec: its declaration is a local function, which cannot be pickled."""
        return (Mask.from_spec, (self.spec, self.layout)) if self.registered else super().__reduce__()

    def __post_init__(self) -> None:
        import torch

        if self._repeats_by_row:  # by `text_then_image`: only self-attention can be missing
            cells = torch.arange(self.layout.text, self.layout.length, device="cpu")
            self._require(self._evaluate(cells, cells), cells, cells, "does not attend to itself")
            return
        text = self.layout.text
        for query, key, allowed in self._row_blocks():
            self._require(~allowed | (key <= query), query, key, "attends to a later position, so it is not causal")
            self._require(allowed | (key != query), query, key, "does not attend to itself")
            sees_text = allowed | (query < text) | (key >= text)
            self._require(sees_text, query, key, "is an image position that does not attend to all text")

    def _require(self, right: Tensor, query: Tensor, key: Tensor, problem: str) -> None:
        """Raises `ValueError` at the first pair for which ``right`` is False."""
        if right.all():
            return
        wrong = ~right
        at_query, at_key = (int(x.expand(right.shape)[wrong][0]) for x in (query, key))
        raise ValueError(
            f"mask {self.spec!r} on {self.layout}: position {at_query} {problem} "
            f"(at key {at_key}). Correct its MaskMod, or build it with text_then_image, "
            f"which needs only the image-to-image rule"
        )

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """Returns the mask as a matrix, query by key, bool (L, L), True where attention is allowed.

        Every call returns a new tensor, so keep the result.

        Args:
            device: Device of the tensor. Defaults to the CPU.

        Example:
            >>> Mask.from_spec("row", TextImageLayout(text=1, height=1, width=2)).dense().int()
            tensor([[1, 0, 0],
                    [1, 1, 0],
                    [1, 1, 1]], dtype=torch.int32)
        """
        return self._dense.to(device or "cpu", copy=True)

    def sdpa_arguments(self, device: torch.device | str | None = None) -> dict[str, Any]:
        """Returns the mask arguments of `torch.nn.functional.scaled_dot_product_attention`.

        Plain causal attention is ``is_causal=True``, for which the fast kernels need no mask; any other mask is a bool
        ``attn_mask`` (L, L). The arguments are valid for complete sequences of L positions.

        Args:
            device: Device of the mask. Defaults to the CPU.

        Example:
            >>> Mask.from_spec("full", TextImageLayout(text=2, height=2, width=2)).sdpa_arguments()
            {'is_causal': True}
        """
        _ = self._dense  # raises for a rule whose pairs cannot be counted as `is_causal` does
        return {"is_causal": True} if self.is_causal else {"attn_mask": self.dense(device)}

    def decode_table(self) -> DecodeTable:
        """Returns the image keys that each image step attends to; shared tensors on the CPU, do not modify them."""
        return self._decode_table

    def cache_plan(self, window: int = 1) -> CachePlan:
        """Returns the cache slot of each image key; shared tensors on the CPU, do not modify them.

        Args:
            window: Largest number W of consecutive positions that one pass runs at once. Defaults to 1.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if window not in self._cache_plans:
            self._cache_plans[window] = self._plan_cache(window)
        return self._cache_plans[window]

    def line_plan(self) -> LinePlan:
        """Groups image queries into lines that share their keys; shared tensors on the CPU, do not modify them."""
        return self._line_plan

    @cached_property
    def line_sizes(self) -> LineSizes:
        """Sizes of the line plan, found without building it."""
        if self._repeats_by_row:
            return line_sizes(self.layout, self._rows_apart)
        text = self.layout.text
        return line_sizes_of(self.layout, lambda query, key: self._evaluate(query + text, key + text))

    @cached_property
    def num_pairs(self) -> int:
        """Number of pairs of query and key that may attend, of L * L, counted without an L x L matrix."""
        import torch

        if not self._repeats_by_row:
            return sum(int(allowed.sum()) for _, _, allowed in self._row_blocks())
        text, image, height = self.layout.text, self.layout.image, self.layout.height
        pairs_of_rows = height - torch.arange(height, device="cpu")
        among_image = int((self._rows_apart.sum((1, 2)) * pairs_of_rows).sum())
        return text * (text + 1) // 2 + image * text + among_image

    @property
    def num_causal_pairs(self) -> int:
        """Number of pairs of a query and a key that is not later, L (L + 1) / 2."""
        return self.layout.length * (self.layout.length + 1) // 2

    @property
    def density(self) -> float:
        """Share of the causal pairs that may attend."""
        return self.num_pairs / self.num_causal_pairs

    @property
    def is_causal(self) -> bool:
        """Whether every position attends to all that are not later."""
        return self.num_pairs == self.num_causal_pairs

    def flops(self, num_heads: int, head_dim: int) -> int:
        """Floating-point operations of the attention's forward pass on one sequence, for the allowed pairs only.

        They are those of the query-key scores and of the weighted sum of values; a multiply-add counts as 2, and the
        softmax is not counted.

        Args:
            num_heads: Number of attention heads.
            head_dim: Size of a head.

        Example:
            >>> layout = TextImageLayout(text=256, height=32, width=32)
            >>> [Mask.from_spec(spec, layout).flops(num_heads=1, head_dim=64) for spec in ("full", "row")]
            [209879040, 84045824]
        """
        multiply_adds = 2 * self.num_pairs * num_heads * head_dim  # scores, then values
        return 2 * multiply_adds

    @property
    def _repeats_by_row(self) -> bool:
        """Whether `text_then_image` built the mask: within the image, it depends on rows only by their distance."""
        return getattr(self.mod, "repeats_by_row", False)

    def _evaluate(self, query: Tensor, key: Tensor) -> Tensor:
        """Evaluates the mask for pairs, and checks that the result is a bool tensor of their broadcast shape."""
        import torch

        allowed = self.mod(query, key)
        if not isinstance(allowed, torch.Tensor) or allowed.dtype != torch.bool:
            came = getattr(allowed, "dtype", type(allowed).__name__)
            raise TypeError(
                f"mask {self.spec!r} must return a bool tensor, got {came}: "
                f"return a comparison of positions, such as key <= query"
            )
        # `torch.broadcast_shapes` would import sympy, for most of a second.
        shape = torch.broadcast_tensors(query, key)[0].shape  # type: ignore[no-untyped-call]
        if allowed.shape != shape:
            raise ValueError(
                f"mask {self.spec!r} must return a value for every pair: expected shape {tuple(shape)} for queries "
                f"{tuple(query.shape)} and keys {tuple(key.shape)}, got {tuple(allowed.shape)}; use both of its "
                "arguments"
            )
        return allowed

    def _row_blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries (Q, 1), all keys (1, L), and which pairs are allowed (Q, L), a few queries at a time."""
        import torch

        # The device is explicit: a model may be under construction on the meta device.
        positions = torch.arange(self.layout.length, device="cpu")
        for query in torch.split(positions[:, None], max(1, PAIRS // self.layout.length)):
            yield query, positions[None], self._evaluate(query, positions[None])

    @cached_property
    def _rows_apart(self) -> Tensor:
        """Image pairs of a mask that repeats by row: rows apart, query column, key column, bool (H, W, W)."""
        import torch

        height, width = self.layout.height, self.layout.width
        query = torch.arange(self.layout.text, self.layout.length, device="cpu").view(height, width, 1)
        key = query[:1].view(1, 1, width)
        blocks = [self._evaluate(rows, key) for rows in torch.split(query, max(1, PAIRS // width**2))]
        return torch.cat(blocks)

    @cached_property
    def _dense(self) -> Tensor:
        import torch

        dense = torch.cat([allowed for _, _, allowed in self._row_blocks()])
        if self._repeats_by_row:
            height, width = self.layout.height, self.layout.width
            rows = dense[self.layout.text :, self.layout.text :].view(height, width, height, width)
            for apart, expected in enumerate(self._rows_apart):
                if not (rows.diagonal(-apart, 0, 2) == expected[..., None]).all():
                    raise ValueError(
                        f"mask {self.spec!r} on {self.layout}: its rule for the image depends on the row of a cell, "
                        f"for cells {apart} rows apart. Write such a mask as a MaskMod, without text_then_image"
                    )
        return dense

    @cached_property
    def _decode_table(self) -> DecodeTable:
        import torch

        text, num_steps = self.layout.text, self.layout.image
        reads = self._dense[text:, text:]
        counts = reads.sum(dim=1)
        most = int(counts.max())
        steps = torch.arange(num_steps, device="cpu")
        keys = steps[:, None].repeat(1, most)
        step, key = reads.nonzero(as_tuple=True)
        rank = reads.cumsum(dim=1)[step, key] - 1
        keys[step, rank] = key
        return DecodeTable(keys, torch.arange(most, device="cpu") < counts[:, None])

    @cached_property
    def _line_plan(self) -> LinePlan:
        return plan_lines(self._dense[self.layout.text :, self.layout.text :], self.layout, self.line_sizes)

    @cached_property
    def _cache_plans(self) -> dict[int, CachePlan]:
        return {}

    def _plan_cache(self, window: int) -> CachePlan:
        import torch

        table, num_steps = self._decode_table, self.layout.image
        # A key is cached from its own step to the last step that reads it, and through the window that begins there.
        last_read = torch.zeros(num_steps, dtype=torch.int64, device="cpu")
        steps = torch.arange(num_steps, device="cpu")[:, None].expand_as(table.keys)
        last_read.scatter_reduce_(0, table.keys.flatten(), steps.flatten(), reduce="amax")
        expiring: list[list[int]] = [[] for _ in range(num_steps + window - 1)]
        for key, step in enumerate(last_read.tolist()):
            expiring[step + window - 1].append(key)

        slots: list[int] = []
        free: list[int] = []
        first_key: list[int] = []  # of each slot
        for step in range(num_steps):
            if free:
                slots.append(heapq.heappop(free))
            else:
                slots.append(len(first_key))
                first_key.append(step)
            for key in expiring[step]:  # another key may take the slot only after the reads of this step
                heapq.heappush(free, slots[key])
        rank = self._line_plan.queries.flatten().argsort()  # of each position in the order of lines
        renumbered = rank[torch.tensor(first_key, device="cpu")].argsort().argsort()
        slot_of_key = renumbered[torch.tensor(slots, device="cpu")]
        return CachePlan(len(first_key), slot_of_key, slot_of_key[table.keys], table.valid)
