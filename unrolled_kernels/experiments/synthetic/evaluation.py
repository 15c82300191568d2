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


def result_columns(*, epochs, best_epoch, losses, on_train, on_test, init, step_size, seconds, weights):
    """The columns of a result, in order.

    Args:
        epochs, best_epoch: of the training, and the one that was kept, counted from 1.
        losses: mean training loss, mean test loss, mean squared test loss (Lemma 4.2's P ℓ²).
        on_train, on_test: means over the training samples and over all: the loss of the same layer on Q* (what of the
            gap is which samples were drawn), the spectral and the squared Frobenius norm of Q_θ - Q*.
        init: training and test loss before training.
        step_size: φ as it was set or learned.
        seconds: of training and evaluation.
        weights: the kept parameters, a float32 vector: W1, b1, W2, b2 row by row, then the logit of a learned φ.
    """
    train, test, test_squared = losses
    return {
        "epochs": epochs,
        "best_epoch": best_epoch,
        "train": train,
        "test": test,
        "gap": test - train,
        "test_squared": test_squared,
        "true_train": on_train[0],
        "true_test": on_test[0],
        "qspec_train": on_train[1],
        "qspec_test": on_test[1],
        "qfro2_train": on_train[2],
        "qfro2_test": on_test[2],
        "init_train": init[0],
        "init_test": init[1],
        "step_size": step_size,
        "seconds": seconds,
        "weights": weights,
    }
