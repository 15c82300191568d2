"""``python -m benchmarks.freshness``: results whose kernels are no longer the tree's; silent if all are fresh."""

import csv

from benchmarks.harness import ROOT, kernel_sources_sha256


def main():
    current = kernel_sources_sha256()
    for file in sorted((ROOT / "benchmarks/results").glob("*/*.csv")):
        with file.open() as lines:
            recorded = {row["kernel_sources_sha256"] for row in csv.DictReader(lines)}
        if recorded != {current}:
            print(
                f"{file.relative_to(ROOT)}: measured with kernel sources {', '.join(sorted(recorded))}, now {current}"
            )


if __name__ == "__main__":
    main()
