"""Bytes per number: by precision and format of the moments, or as in the paper."""

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
"""Precisions of the trainer, with the dtype of their matrix products."""

MOMENTS = {"float32": 4.0, "8bit": 1 + 4 / 256, "fp8": 1 + 4 / 256}
"""Bytes of an AdamW moment: formats of 8 bits have one float32 scale per 256 numbers. "float32" is the dtype of the
weight, which is float32 except under ``bf16-true``."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes of one number. "Matrix" is a parameter of a residual branch, "other" any other parameter."""

    name: str
    matrix: float
    """Weight of a branch."""
    other: float
    """Weight of an embedding, a head or a norm."""
    matrix_gradient: float
    other_gradient: float
    matrix_moments: float
    """Sum of both moments of AdamW."""
    other_moments: float
    compute: float
    """Activation inside a branch, and gathered weight of a branch."""
    head: float
    """Input of a head, and logit."""
    residual: float
    """Activation of the identity path."""
    error: float
    """Number of an error buffer of PowerSGD."""
    factor: float
    """Number of a factor of PowerSGD in memory."""
    reserve: float
    """Bytes of a GPU assumed for the CUDA context, buffers of libraries, and fragmentation."""


def formats_of(precision: str, moments: str = "float32") -> Formats:
    """Returns the formats that this package uses.

    Mixed precisions have float32 weights, gradients, moments, error buffers and identity path, and compute branches
    in 16 bits; heads too, except under ``16-resblock``. ``bf16-true`` has 16 bits for all of these except the buffers
    of PowerSGD.

    Raises:
        UnknownNameError: The precision or the format of the moments is unknown.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError(suggest("precision", precision, PRECISIONS))
    if moments not in MOMENTS:
        raise UnknownNameError(suggest("format of AdamW's moments", moments, MOMENTS))
    stored = SIXTEEN if precision.endswith("-true") and PRECISIONS[precision] != "float32" else FLOAT32
    compute = FLOAT32 if PRECISIONS[precision] == "float32" else SIXTEEN
    both_moments = 2 * (stored if moments == "float32" else MOMENTS[moments])
    return Formats(
        name=precision if moments == "float32" else f"{precision}, {moments} moments",
        matrix=stored,
        other=stored,
        matrix_gradient=stored,
        other_gradient=stored,
        matrix_moments=both_moments,
        other_moments=both_moments,
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
"""The formats of the paper (section 2.4, appendices D and E.2): 16-bit weights and moments of matrices, gradients that
are added directly to 16-bit error buffers and need no memory, float32 for embeddings, gains, biases and the identity
path. This package does not implement them; they serve to compare the estimates with the paper."""
