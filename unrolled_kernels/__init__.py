"""Optimisation algorithms as fast layers: fused k-step GD, NAG and momentum on quadratic energies 1/2 yᵀQy + bᵀy."""

from unrolled_kernels import functional, schedules
from unrolled_kernels._backend import available_backends, use_backend
from unrolled_kernels.layers import UnrolledGD, UnrolledMomentum, UnrolledNAG
from unrolled_kernels.quadratics import Diagonal, Spectral

__version__ = "0.1.0"

__all__ = [
    "Diagonal",
    "Spectral",
    "UnrolledGD",
    "UnrolledMomentum",
    "UnrolledNAG",
    "available_backends",
    "functional",
    "schedules",
    "use_backend",
]
