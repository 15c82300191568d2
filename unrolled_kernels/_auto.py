"""What ``backend="auto"`` takes; written by ``python -m benchmarks.auto``, not by hand."""

# By device and by what a call is, its structure and size: the first that is available, else eager.
AUTO: dict[tuple[str, str], tuple[str, ...]] = {
    # of 292 cases the eager loop is ahead in none
    ("cpu", "dense"): ("cpu",),
    # of 30 cases the eager loop is ahead in none
    ("cpu", "products"): ("cpu",),
    # of 34 cases the eager loop is ahead in none
    ("cpu", "diagonal"): ("cpu",),
    # of 113 cases the eager loop is ahead in none
    ("cpu", "spectral"): ("cpu",),
    # of 12 cases the eager loop is ahead in none
    ("cpu", "rnn"): ("cpu",),
    # predicted, not measured: 41 to 55 slots for 32 FMAs and the next Q on its way, Triton's 43 to 67 without
    ("cuda", "dense"): ("cuda", "triton"),
    # predicted, not measured: as many products as the eager loop has, until a GPU has run what lies between them
    ("cuda", "products"): (),
    # predicted, not measured: backward 33 / 61 slots a step of 4 elements, Triton's 30 / 72
    ("cuda", "diagonal"): ("cuda", "triton"),
    # predicted, not measured: predicted to be bound by memory at k = 10; Triton's are not counted
    ("cuda", "spectral"): ("cuda", "triton"),
    # predicted, not measured: 38 slots for 32 FMAs; Triton's are not counted
    ("cuda", "rnn"): ("cuda", "triton"),
}
