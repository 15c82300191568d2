"""What ``backend="auto"`` takes; written by ``python -m benchmarks.auto``, not by hand."""

# By device and by whether the steps are products of one large matrix with many vectors: the first that is
# available, else eager.
AUTO: dict[tuple[str, bool], tuple[str, ...]] = {
    ("cpu", False): ("cpu",),  # of 202 cases none has the eager loop before it
    ("cpu", True): ("cpu",),  # of 14 cases none has the eager loop before it
    ("cuda", False): ("cuda", "triton"),  # predicted, not measured
    ("cuda", True): (),  # predicted, not measured
}
