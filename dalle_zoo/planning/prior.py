"""The prior's parameters, activations and operations, read off `dalle_zoo.models.prior`."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from dalle_zoo.masks import Mask, layer_masks
from dalle_zoo.models.attention.choice import in_lines
from dalle_zoo.models.losses import LOGITS
from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.planning.formats import FLOAT32, Formats
from dalle_zoo.planning.parameters import Parameter
from dalle_zoo.planning.work import Bytes, Flops, Work

# B batch, T text positions, N image positions, L = T + N, d width, H heads, V text vocabulary, K codebook size,
# m MLP ratio; bytes of an activation: c in a branch, h at a head, i on the identity path


class PriorWork(Work):
    """Training step of the prior with the attention back-end ``auto``."""

    stage = "prior"
    recomputes = True

    def __init__(self, config: PriorConfig) -> None:
        self.config = config
        self.tokens = config.layout.length
        self.parameters = _parameters(config)

    @cached_property
    def _masks(self) -> list[tuple[Mask, int]]:
        """Masks, and in how many layers they stand."""
        layers = Counter(layer_masks(self.config.masks, self.config.num_layers))
        return [(Mask.from_spec(spec, self.config.layout), count) for spec, count in layers.items()]

    @cached_property
    def _masked_layers(self) -> int:
        """Layers whose mask is a matrix; plain causal attention needs none, and lines share one of the original."""
        masks = ((mask, count) for mask, count in self._masks if not in_lines(mask))
        return sum(count for mask, count in masks if "attn_mask" in mask.sdpa_arguments())

    def retained(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Of every block its input; of a branch, unless recomputed, the input of each of its operations."""
        c, k = formats.compute, self.config
        rows = batch * self.tokens
        text, image = batch * k.text_length, batch * k.image_length
        retained = {"activations: identity path": (2 * k.num_layers + 1) * rows * k.width * formats.residual}
        if not recompute:
            retained["activations: branches"] = k.num_layers * (
                self._attention(rows, formats) + self._mlp(rows, formats)
            )
            # A mask of booleans becomes one of numbers, anew in every layer.
            retained["activations: attention masks"] = self._masked_layers * self.tokens**2 * c
        retained["gradients of the heads' inputs"] = (text + image) * k.width * formats.residual
        return retained

    def at_step(self, batch: int, formats: Formats) -> Bytes:
        """Last of all the text head is at work, on a copy of its positions."""
        h, k = formats.head, self.config
        logits = min(batch * k.text_length * k.text_vocab, LOGITS)
        found = {
            "outputs of the last norm": batch * (self.tokens + k.text_length) * k.width * formats.residual,
            "logits, and a float32 copy": logits * (h + FLOAT32),
        }
        if h < FLOAT32:  # of the weight, and of what is added to its gradient
            found["16-bit copies of the text head"] = 2 * k.text_vocab * k.width * h
        return found

    def in_backward(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Gradients inside a block, and what it keeps if it is recomputed."""
        c, i, k = formats.compute, formats.residual, self.config
        rows = batch * self.tokens
        attention, mlp = self._attention_gradients(batch) * c, (1 + k.mlp_ratio) * rows * k.width * c
        if recompute:
            attention += self._attention(rows, formats) + (self.tokens**2 * c if self._masked_layers else 0)
            mlp += self._mlp(rows, formats)
        block = 2 * rows * k.width * i + max(attention, mlp)
        return {"gradients inside a block" + (", and its activations" if recompute else ""): block}

    def _attention_gradients(self, batch: int) -> int:
        """Gradients of the result, of queries, keys and values; in lines also what is brought to them and back."""
        plans = (mask.line_plan() for mask, _ in self._masks if in_lines(mask))
        gathered = (plan.queries.numel() + plan.keys.numel() for plan in plans)
        return batch * self.config.width * max(4 * self.tokens, self.tokens + 4 * max(gathered, default=0))

    def _attention(self, rows: int, formats: Formats) -> float:
        """Normed input, queries, keys, values, result; per head the logarithm of the softmax's sum; two statistics."""
        k = self.config
        return rows * (5 * k.width * formats.compute + k.num_heads * FLOAT32 + 2 * formats.residual)

    def _mlp(self, rows: int, formats: Formats) -> float:
        """Normed input, input and output of the GELU; two statistics."""
        k = self.config
        return rows * ((1 + 2 * k.mlp_ratio) * k.width * formats.compute + 2 * formats.residual)

    def flops(self) -> Flops:
        """Products of matrices, attention over exactly the allowed pairs, heads at all positions of their kind."""
        k = self.config
        matrices = 2.0 * self.tokens * k.count_parameters()["matrices"]
        attention = float(sum(n * mask.flops(k.num_heads, k.width // k.num_heads) for mask, n in self._masks))
        heads = 2.0 * k.width * (k.text_length * k.text_vocab + k.image_length * k.codebook_size)
        # Recomputation stops before the last matrix of a branch, whose result the backward pass does not need.
        last = 2.0 * self.tokens * k.num_layers * (1 + k.mlp_ratio) * k.width**2
        forward = {"matrices": matrices, "attention": attention, "heads": heads}
        return Flops(forward, matrices - last + attention, early=2 * heads)


def _parameters(k: PriorConfig) -> tuple[Parameter, ...]:
    """All parameters by shape; kinds are those of `PriorConfig.count_parameters`."""
    d, layers, hidden = k.width, k.num_layers, k.mlp_ratio * k.width

    def matrix(unit: str, rows: int, columns: int, *, axis: int = 0, parts: int = 1) -> list[Parameter]:
        return [
            Parameter(
                kind="matrices", shape=(rows, columns), count=layers, unit=unit, axis=axis, compressed=parts,
                autocast=True,
            ),
            Parameter(kind="biases of the matrices", shape=(rows,), count=layers, unit=unit, autocast=True),
        ]  # fmt: skip

    def head(kind: str, vocabulary: int) -> list[Parameter]:
        shapes: tuple[tuple[int, ...], ...] = (vocabulary, d), (vocabulary,)
        return [Parameter(kind=kind, shape=shape, early=True) for shape in shapes]

    return (
        *matrix("attention", 3 * d, d, parts=3),
        *matrix("attention", d, d),
        *matrix("mlp", hidden, d),
        *matrix("mlp", d, hidden, axis=1),
        Parameter(kind="layer norms", shape=(d,), count=2 * (2 * layers + 1)),
        # One table holds the text tokens and, behind them, the padding tokens.
        Parameter(kind="text and padding tokens", shape=(k.text_vocab + k.text_length, d)),
        Parameter(kind="text positions", shape=(k.text_length, d)),
        Parameter(kind="image tokens", shape=(k.codebook_size, d)),
        Parameter(kind="rows and columns", shape=(k.image_height, d)),
        Parameter(kind="rows and columns", shape=(k.image_width, d)),
        Parameter(kind="start of text, start of image", shape=(d,), count=2),
        *head("text head", k.text_vocab),
        *head("image head", k.codebook_size),
    )
