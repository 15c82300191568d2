"""Speed comparisons: ``python -m benchmarks.momentum`` writes the CSV, ``pytest benchmarks`` runs pytest-benchmark."""
