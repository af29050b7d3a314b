"""gMLP blocks of DALLE-pytorch's prior, which replace attention by a learned matrix over positions.

```
x ─► matrix ─► GELU ─┬─ value_i ──────────────────────────────► × ─► matrix ─► out
                     └─ gate_i ─► LayerNorm ─► b_i + Σ W_ij gate_j ─┘     over j ≤ i
```
Reference: https://arxiv.org/abs/2105.08050, section 2; https://github.com/lucidrains/g-mlp-pytorch, ``gMLPBlock``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# B batch, P prompts, n candidates of each, T text positions of the layout, N image positions, M input positions,
# L positions of the matrix, d width


class GatedMixing(nn.Module):
    """A causal gMLP block: a position depends on itself and on earlier positions.

    Args:
        width: Model width d.
        length: Positions L.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.weight = nn.Parameter(torch.empty(length, length).uniform_(-1e-3 / length, 1e-3 / length))
        self.bias = nn.Parameter(torch.ones(length))
        self.output = nn.Linear(2 * width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates: (…, d) to twice (…, 2 d)."""
        value, gate = F.gelu(self.hidden(x)).chunk(2, -1)
        return value, self.norm(gate)

    def mix(self, gate: Tensor) -> Tensor:
        """Mixes gates over the first M positions: (B, M, 2 d) to (B, M, 2 d)."""
        length = gate.shape[1]
        return self.weight[:length, :length].tril() @ gate + self.bias[:length, None]

    def merge(self, value: Tensor, mixed: Tensor) -> Tensor:
        """Outputs: twice (…, 2 d) to (…, d)."""
        out: Tensor = self.output(value * mixed)
        return out


class GateCache:
    """Cache of the gates of one layer: those of the text once per prompt, those of the image once per candidate.

    Args:
        block: gMLP block of the layer.
        text_gate: Gates of the text positions, (P, T, 2 d).
        num_candidates: Candidates n of each prompt.
    """

    def __init__(self, block: GatedMixing, text_gate: Tensor, num_candidates: int) -> None:
        self.block, self.text_gate = block, text_gate
        prompts, self.text_length, size = text_gate.shape
        self.gate = text_gate.new_zeros(prompts, num_candidates, len(block.bias) - self.text_length, size)

    def mix(self, position: int, gate: Tensor) -> Tensor:
        """Caches the gates of an image position and returns its mixed gates: (P, n, 2 d) to (P, n, 2 d)."""
        self.gate[:, :, position] = gate
        row = self.text_length + position
        of_text, of_image = self.block.weight[row, : row + 1].tensor_split([self.text_length])
        mixed = of_image @ self.gate[:, :, : position + 1] + (of_text @ self.text_gate)[:, None]
        return mixed + self.block.bias[row]
