"""Table of the benchmark results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from bench.cases import LIMIT
from bench.systems import FLOOR, OURS, PEER

Summary = Mapping[str, Any]


def median(summary: Summary, case: str, system: str, quantity: str) -> float | None:
    """Return the median of a quantity, or None if it was not measured."""
    found = summary["cases"].get(case, {}).get(system, {}).get(quantity)
    return None if found is None else found["median"]


def latency(summary: Summary, case: str, system: str, percent: str) -> float | None:
    """Return a quantile of the latencies in seconds, or None if it was not measured."""
    return summary["latency_s"].get(case, {}).get(system, {}).get(percent)


def table(summary: Summary) -> Table:
    """Return a table with one quantity per line, and the ratios of this agent to the others."""
    machine = summary["machine"]
    rounds = f"{summary['rounds']} round{'s' if summary['rounds'] > 1 else ''}"
    title = f"{machine['cores']} cores, Python {machine['python']}, {machine['date']}; medians of {rounds}"
    made = Table(title=title, title_justify="left")
    made.add_column("case", no_wrap=True)
    for column in (FLOOR, OURS, PEER, "ratio to floor", "ratio to published"):
        made.add_column(column, justify="right")

    def line(what: str, values: Callable[[str], float | None], unit: str, scale: float = 1.0) -> None:
        floor, ours, peer = (values(system) for system in (FLOOR, OURS, PEER))
        cells = [f"{value * scale:,.4g} {unit}" if value is not None else "" for value in (floor, ours, peer)]
        ratios = [f"{ours / other:.2f}" if ours is not None and other else "" for other in (floor, peer)]
        if any(cells):
            made.add_row(what, *cells, *ratios)

    for case, systems in summary["cases"].items():
        if any("cpu_us" in quantities for quantities in systems.values()):
            line(f"CPU per file, {case}", lambda name, case=case: median(summary, case, name, "cpu_us"), "µs")
    made.add_section()
    for case, systems in summary["cases"].items():
        if any("lost" in quantities for quantities in systems.values()):
            sent = median(summary, case, OURS, "sent")
            line(f"lost, of {sent:,.0f}, {case}", lambda name, case=case: median(summary, case, name, "lost"), "")
            line("  last row after last message", lambda name, case=case: median(summary, case, name, "tail_s"), "s")
    made.add_section()
    for case in summary["latency_s"]:
        for percent, called in (("50", "median"), ("99", "99 %"), ("100", "worst")):
            line(
                f"latency {case}, {called}",
                lambda name, case=case, percent=percent: latency(summary, case, name, percent),
                "ms",
                1e3,
            )
    made.add_section()
    for case, systems in summary["cases"].items():
        if LIMIT in systems:
            limit = systems[LIMIT]["mb_per_s"]["median"]
            line(f"{case} (md5: {limit:,.0f})", lambda name, case=case: median(summary, case, name, "mb_per_s"), "MB/s")
    behind = "behind large files"
    line("latency of a small file behind large ones", lambda name: median(summary, behind, name, "small_behind_s"), "s")
    line("slowest status call meanwhile", lambda name: median(summary, behind, name, "worst_status_s"), "s")
    made.add_section()
    line("idle", lambda name: median(summary, "idle", name, "cpu_share"), "% of a core", 100)
    line("memory before the load", lambda name: median(summary, "memory", name, "idle_mb"), "MB")
    line("memory after all small files", lambda name: median(summary, "memory", name, "now_mb"), "MB")
    line("peak memory", lambda name: median(summary, "memory", name, "peak_mb"), "MB")
    return made
