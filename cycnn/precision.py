"""The precision in which matrix products run on the GPU."""

from __future__ import annotations

_MODES = ("fp32", "tf32", "bf16")
_current = "fp32"


def set_precision(mode: str) -> None:
    """Choose how convolutions and linear layers multiply on the GPU.

    Parameters
    ----------
    mode : {"fp32", "tf32", "bf16"}
        ``"fp32"`` multiplies in IEEE single precision, but for the fused kernels: these
        take each operand as the sum of two tf32 numbers and leave out of a product less
        than 2^-21 of it. ``"tf32"`` and ``"bf16"`` round the operands of each matrix
        product to 10 and 7 explicit mantissa bits and use the tensor cores.
        docs/reliability.md has the errors of each. Sums are float32 in every mode, and
        so are parameters, gradients and optimizer state. GPUs without the matching
        tensor cores (before compute capability 8.0) and the CPU compute in float32
        whatever the mode.

    Raises
    ------
    ValueError
        For any other mode.
    """
    global _current
    if mode not in _MODES:
        raise ValueError(
            f"precision must be one of {', '.join(map(repr, _MODES))}, got {mode!r}"
        )
    _current = mode


def get_precision() -> str:
    """The mode set by :func:`set_precision`; ``"fp32"`` at the start."""
    return _current
