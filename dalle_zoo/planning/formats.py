"""Bytes of a number of each kind, from the precision, the form of the moments, or as the paper had them."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_zoo.registry import UnknownNameError, suggest

FLOAT32, SIXTEEN = 4, 2
GIB = 2**30

PRECISIONS = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-resblock": "float16",
}
"""Precision of the trainer to the type that its matrix products are computed in."""

MOMENTS = {"float32": 4.0, "8bit": 1 + 4 / 256, "fp8": 1 + 4 / 256}
"""Bytes of an AdamW moment: 8 bits carry one float32 scale for every 256 of them. "float32" stands for the type of the
weight, which is float32 but under ``bf16-true``."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes of one number. "Matrix" means a parameter of a residual branch, "other" all else."""

    name: str
    matrix: float
    """Stored weight of a branch."""
    other: float
    """Stored embedding, head, norm."""
    matrix_gradient: float
    other_gradient: float
    matrix_moments: float
    """Both moments of AdamW together."""
    other_moments: float
    compute: float
    """Activation inside a branch, and gathered weight of a branch."""
    head: float
    """Activation outside the branches that a head reads, and logit."""
    residual: float
    """Activation of the identity path."""
    error: float
    """Error buffer of PowerSGD."""
    factor: float
    """Element of a factor of PowerSGD in memory."""
    reserve: float
    """Bytes of a GPU assumed for the CUDA context, the buffers of libraries, and what the allocator cannot use."""


def formats_of(precision: str, moments: str = "float32") -> Formats:
    """What the code of this package keeps.

    A mixed precision keeps float32 weights, gradients, moments, error buffers and identity path, and computes
    branches in 16 bits; heads too, but under ``16-resblock``. ``bf16-true`` keeps all of them in 16 bits but what
    PowerSGD adds.

    Raises:
        UnknownNameError: No such precision, or no such form of the moments.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError(suggest("precision", precision, PRECISIONS))
    if moments not in MOMENTS:
        raise UnknownNameError(suggest("form of AdamW's moments", moments, MOMENTS))
    stored = SIXTEEN if precision.endswith("-true") and PRECISIONS[precision] != "float32" else FLOAT32
    compute = FLOAT32 if PRECISIONS[precision] == "float32" else SIXTEEN
    retained = 2 * (stored if moments == "float32" else MOMENTS[moments])
    return Formats(
        name=precision if moments == "float32" else f"{precision}, {moments} moments",
        matrix=stored,
        other=stored,
        matrix_gradient=stored,
        other_gradient=stored,
        matrix_moments=retained,
        other_moments=retained,
        compute=compute,
        head=FLOAT32 if precision == "16-resblock" else compute,
        residual=stored,
        error=FLOAT32,
        factor=FLOAT32,
        reserve=1.0 * GIB,
    )


PAPER = Formats(
    name="paper",
    matrix=SIXTEEN,
    other=FLOAT32,
    matrix_gradient=0,
    other_gradient=FLOAT32,
    matrix_moments=2 * SIXTEEN,
    other_moments=2 * FLOAT32,
    compute=SIXTEEN,
    head=FLOAT32,
    residual=FLOAT32,
    error=SIXTEEN,
    factor=SIXTEEN,
    reserve=0.5 * GIB,
)
"""The paper's own (section 2.4, appendices D and E.2): 16-bit weights and moments of matrices, gradients that are
added straight to 16-bit error buffers and have no memory of their own, float32 for embeddings, gains, biases and
identity path. This package has no such formats: the set holds the arithmetic against the paper's statements."""
