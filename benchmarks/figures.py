"""Figures of the results of one device: ratios to the peers, the share of the roof, how time grows."""

from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.suite import FUSED
from unrolled_kernels.experiments.run_directory import atomic_path

_COLORS = {
    "cpu": "#0b6e4f", "cuda": "#0b6e4f", "triton": "#5aa469", "eager": "#c44536", "cudagraph": "#e08e45",
    "compile": "#7768ae", "compile-max": "#4b3f72", "jax": "#3a7ca5", "func": "#d4a5a5", "solve": "#8d99ae",
    "deepinv": "#f2cc8f",
}  # fmt: skip
_LABELS = {"eager": "eager loop", "compile": "torch.compile", "jax": "JAX"}
_MARKERS = {"dense": "o", "diagonal": "s", "spectral": "^", "tikhonov": "D"}


def ratios(rows, directory):
    """Bars of each peer's time over the best fused kernel's, forward + backward, one group a case."""
    rows = rows[rows["mode"] == "forward+backward"]
    labels, by_peer = [], {}
    for (op, structure, method, B, d, k), group in rows.groupby(
        ["op", "structure", "method", "B", "d", "k"], sort=False
    ):
        best = group[group.backend.isin(FUSED)].p50_us.min()
        labels.append(f"{method.upper() if op == 'momentum' else op} {structure}\n{B}, {d}, {k}")
        for row in group[~group.backend.isin(FUSED)].itertuples():
            by_peer.setdefault(row.backend, {})[len(labels) - 1] = row.p50_us / best
    figure, axes = plt.subplots(figsize=(0.62 * len(labels) + 2, 4.2), layout="constrained")
    width = 0.8 / max(1, len(by_peer))
    for i, (peer, values) in enumerate(by_peer.items()):
        axes.bar([x + (i + 0.5) * width - 0.4 for x in values], values.values(), width, label=peer, color=_COLORS[peer])
    axes.axhline(1, color=_COLORS["cpu"], linewidth=1.5, label="fused")
    axes.set(yscale="log", ylabel="time over the fused kernel's", xlim=(-0.6, len(labels) - 0.4))
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.legend(ncols=3, fontsize=8)
    return _save(figure, directory, rows, "ratios")


def summary(rows, directory):
    """A few cases: bars of the peers' times over the best fused kernel's, for the top of the README."""
    peers = [name for name in ("eager", "compile", "jax") if name in set(rows.backend)]
    groups = list(rows.groupby(["op", "structure", "method", "B", "d", "k"], sort=False))
    figure, axes = plt.subplots(figsize=(7.6, 0.62 * len(groups) + 0.9), layout="constrained")
    height = 0.8 / len(peers)
    for i, (_, group) in enumerate(groups):
        best = group[group.backend.isin(FUSED)].p50_us.min()
        for j, name in enumerate(peers):
            for time in group[group.backend == name].p50_us:
                y = i + (j + 0.5) * height - 0.4
                axes.barh(
                    y, time / best - 1, height, left=1, color=_COLORS[name], label=_LABELS[name] if i == 0 else None
                )
                axes.annotate(
                    f" {time / best:.1f}× ", (max(time / best, 1), y), va="center", fontsize=8, color="dimgray"
                )
    axes.axvline(1, color=_COLORS["cpu"], linewidth=2, label="fused kernel")
    names = [
        f"{m.upper() if op == 'momentum' else 'RNN'}, {s}\n{B:,} × {d:,}, {k} steps"
        for (op, s, m, B, d, k), _ in groups
    ]
    axes.set_yticks(range(len(groups)), [name.replace("1 × ", "") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time of forward + backward over the fused kernel's (below 1: the other is faster)")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(peers) + 1)
    return _save(figure, directory, rows, "summary")


def roofline(rows, directory):
    """Share of the roof that was measured beside each row, over the arithmetic intensity of its floor."""
    rows = rows[(rows["mode"] == "forward+backward") & rows.backend.isin((*FUSED, "eager"))]
    figure, axes = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
    for (backend, structure), group in rows.groupby(["backend", "structure"], sort=False):
        axes.scatter(
            group.flops / group.bytes, group.percent_of_roof, color=_COLORS[backend], marker=_MARKERS[structure], s=28,
            label=f"{backend}, {structure}",
        )  # fmt: skip
    axes.axhline(100, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte of the floor", ylabel="share of the roof, %")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, directory, rows, "roof")


def scaling(sweeps, directory):
    """Time over k, d, B and threads: a panel each, fused kernels solid, the eager loop dashed."""
    axes_names = list(dict.fromkeys(sweeps.sweep))
    figure, panels = plt.subplots(1, len(axes_names), figsize=(3.2 * len(axes_names), 3.4), layout="constrained")
    for axes, name in zip(np.atleast_1d(panels), axes_names, strict=True):
        part = sweeps[sweeps.sweep == name]
        shapes = [c for c in ("B", "d", "k") if c != name] if name == "threads" else []
        drawn = Counter()
        for (backend, structure, *sizes), group in part.groupby(["backend", "structure", *shapes], sort=False):
            style = "-" if backend in FUSED else "--"
            # curves of several shapes may coincide: a marker of its own each
            marker = list(_MARKERS.values())[drawn[backend]] if sizes else _MARKERS[structure]
            drawn[backend] += 1
            axes.plot(
                group[name], group.p50_us, style, marker=marker, markersize=4, color=_COLORS[backend],
                label=", ".join([backend, structure, *([f"B, d, k = {', '.join(map(str, sizes))}"] if sizes else [])]),
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="forward + backward, µs")
        if name == "threads":
            ticks = sorted(part[name].unique())
            axes.set_xticks(ticks, [f"{t:.0f}" for t in ticks], minor=False)
            axes.minorticks_off()
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            *zip(*dict(zip(labels, zip(handles, labels, strict=True), strict=True)).values(), strict=True), fontsize=6
        )
    return _save(figure, directory, sweeps, "scaling")


def _save(figure, directory, rows, name):
    file = directory / f"{rows.results.iloc[0]}-{name}.png"
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return file
