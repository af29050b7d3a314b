"""CPU shortcuts: faster equivalents of plain modules for inference, used only if they give the same values.

| shortcut | plain twin | used by |
|---|---|---|
| `linears.packed_linears(net, rows)` | the layers of ``net``, which call `F.linear` | `dalle_zoo.sampling` |
| `convolutions.Network`, `Convolution`, `Cells` | the encoder's and decoder's own modules | `dalle_zoo.models.dvae` |

Both shortcuts follow the same rules. The weights are the parameters of the plain modules before and after a call; a
shortcut holds them in another memory layout for the length of the call. It is used only if `onednn` finds that the
private operators of PyTorch behind it exist and agree with their public counterparts on this machine. Otherwise the
plain modules run.
"""
