"""Optimisation algorithms as fast layers: k fused steps of GD, NAG, momentum or an RNN on energies 1/2 yᵀQy + bᵀy."""

from typing import TYPE_CHECKING

from unrolled_kernels import _command

if TYPE_CHECKING or not _command.is_running():
    from unrolled_kernels import functional, prox, schedules
    from unrolled_kernels._backend import SlowBackendWarning, available_backends, use_backend
    from unrolled_kernels.layers import UnrolledGD, UnrolledMomentum, UnrolledNAG
    from unrolled_kernels.layers_rnn import UnrolledRNN
    from unrolled_kernels.quadratics import Diagonal, Spectral, Tikhonov
else:
    __getattr__ = _command.import_late

__version__ = "0.1.0"

__all__ = [
    "Diagonal",
    "SlowBackendWarning",
    "Spectral",
    "Tikhonov",
    "UnrolledGD",
    "UnrolledMomentum",
    "UnrolledNAG",
    "UnrolledRNN",
    "available_backends",
    "functional",
    "prox",
    "schedules",
    "use_backend",
]
