"""What is reported of a trained model: its losses, its gap, and how far its Q_θ is from Q*."""

import torch


def distance(y, y_star):
    """‖y - y*‖₂ of each sample: the loss of the paper (Eq. 10), not squared."""
    return torch.linalg.vector_norm(y - y_star, dim=-1)


def spectrum_errors(eigenvalues, true_eigenvalues, dim):
    """Norms of Q_θ - Q* = R diag(λ - e) Rᵀ, from the eigenvalues alone since R is shared.

    Returns:
        The spectral norm and the squared Frobenius norm, each with ``dim`` reduced.
    """
    difference = eigenvalues - true_eigenvalues
    return difference.abs().amax(dim), difference.square().sum(dim)


def result_columns(*, epochs, best_epoch, train, test, q_train, q_test, init, step_size, seconds):
    """The columns of a result, in order; ``q_train`` and ``q_test`` are pairs (spectral, squared Frobenius)."""
    return {
        "epochs": epochs,
        "best_epoch": best_epoch,
        "train": train,
        "test": test,
        "gap": test - train,
        "qspec_train": q_train[0],
        "qspec_test": q_test[0],
        "qfro2_train": q_train[1],
        "qfro2_test": q_test[1],
        "init_train": init[0],
        "init_test": init[1],
        "step_size": step_size,
        "seconds": seconds,
    }
