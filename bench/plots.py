"""Plots of the benchmark results, shown in the README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.cases import LIMIT
from bench.report import Summary, median
from bench.systems import FLOOR, OURS, PEER

# Colours that colour-blind readers can distinguish (Okabe and Ito), and markers for black-and-white prints.
_STYLE = {FLOOR: ("#7f7f7f", "s"), OURS: ("#0072b2", "o"), PEER: ("#d55e00", "^"), LIMIT: ("#000000", "")}
_RATES = (200, 1000, 5000, 10_000)


def draw(summary: Summary, folder: Path) -> None:
    """Draw all plots and save them in a folder."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    for name, make in (("loss", _loss), ("latency", _latency), ("cpu", _cpu), ("throughput", _throughput)):
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        make(summary, axes)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)


def _loss(summary: Summary, axes: Axes) -> None:
    called = {f"{rate} a second": f"{rate:,}/s" for rate in _RATES}
    called |= {"burst of 3000": "3,000\nat once", "burst of 20000": "20,000\nin 0.2 s"}
    cases = [case for case in called if case in summary["cases"]]
    labels = [called[case] for case in cases]
    _bars(summary, axes, cases, lambda case, name: _share_lost(summary, case, name), "{:.3g}")
    axes.set_xticks(range(len(labels)), labels)
    axes.set(
        ylabel="registrations lost, %",
        ylim=(0, 125),
        yticks=range(0, 101, 20),
        title="Loss by rate (files of 4 KiB)",
    )


def _share_lost(summary: Summary, case: str, name: str) -> float | None:
    lost, sent = median(summary, case, name, "lost"), median(summary, case, name, "sent")
    return None if lost is None or not sent else 100 * lost / sent


def _cpu(summary: Summary, axes: Axes) -> None:
    rates = (1000, 5000, 10_000)
    cases = [f"{rate} a second" for rate in rates]
    _bars(summary, axes, cases, lambda case, name: median(summary, case, name, "cpu_us"), "{:.0f}")
    axes.set_xticks(range(len(rates)), [f"{rate:,}/s" for rate in rates])
    axes.set(ylabel="µs", title="CPU per registered file (4 KiB)")


def _bars(
    summary: Summary, axes: Axes, cases: list[str], value: Callable[[str, str], float | None], pattern: str
) -> None:
    width = 0.27
    for number, name in enumerate((FLOOR, OURS, PEER)):
        places = [(place, found) for place, case in enumerate(cases) if (found := value(case, name)) is not None]
        if places:
            bars = axes.bar(
                [place + (number - 1) * width for place, _ in places],
                [found for _, found in places],
                width * 0.95,
                label=name,
                color=_STYLE[name][0],
            )
            axes.bar_label(bars, [pattern.format(found) for _, found in places], padding=2, fontsize=8)
    axes.margins(y=0.25)  # room for the legend
    axes.legend(frameon=False, loc="upper left", ncols=3)


def _latency(summary: Summary, axes: Axes) -> None:
    for case, line in (("alone", "-"), ("1000 a second", "--")):
        for name in (FLOOR, OURS, PEER):
            quantiles = summary["latency_s"].get(case, {}).get(name, {})
            if not quantiles:
                continue
            seconds = [1000 * value for value in quantiles.values()]
            percents = [float(percent) for percent in quantiles]
            called = "alone" if case == "alone" else "at 1,000/s"
            axes.plot(seconds, percents, line, color=_STYLE[name][0], label=f"{name}, {called}")
    axes.set_xscale("log")
    axes.set(xlabel="from send to committed row, ms", ylabel="% of registrations", title="Latency distribution")
    _legend_below(axes)


def _throughput(summary: Summary, axes: Axes) -> None:
    sizes = sorted(int(case.split()[2]) for case in summary["cases"] if case.startswith("files of"))
    for name in (LIMIT, FLOOR, OURS, PEER):
        points = [(size, median(summary, f"files of {size} bytes", name, "mb_per_s")) for size in sizes]
        points = [(size / 2**20, value) for size, value in points if value is not None]
        if points:
            colour, marker = _STYLE[name]
            label = "MD5 limit, two processes" if name == LIMIT else name
            line = ":" if name == LIMIT else "-"
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker or None, label=label)
    axes.set_xscale("log", base=2)
    marks = [size / 2**20 for size in sizes]
    axes.set_xticks(marks, [f"{mark:g}" if mark >= 1 else f"1/{1 / mark:g}" for mark in marks])
    axes.set(xlabel="file size, MiB", ylabel="MB/s", title="Throughput by file size")
    axes.set_ylim(bottom=0)
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
