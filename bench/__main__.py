"""Run the benchmark, print a table, and write bench/results.json and the plots. There are no pass criteria."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import cases, load, systems
from bench.report import table

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run the benchmark and report the results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run one short round of most cases, about two minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of rounds of the main cases")
    parser.add_argument("--plots-only", action="store_true", help="report and plot the existing results")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR", help="folder for results and plots")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the scratch folder is removed
    console = Console(width=None if os.isatty(1) else 150)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results_path = arguments.output / "results.json"
    if arguments.plots_only:
        summary = json.loads(results_path.read_text())
    else:
        plan = cases.QUICK if arguments.quick else cases.Plan()
        if arguments.rounds:
            plan = plan._replace(rounds=arguments.rounds)
        summary = measure(plan, console)
        results_path.write_text(json.dumps(rounded(summary), indent=1) + "\n")
    console.print(table(summary))
    for line in summary["trouble"]:
        console.print(f"[red]{line}")
    try:
        from bench import plots
    except ImportError:
        console.print("no plots: matplotlib is not installed (pip install -e '.\\[bench]')")
    else:
        plots.draw(summary, arguments.output)


def measure(plan: cases.Plan, console: Console) -> dict[str, Any]:
    """Run all cases and return the content of `results.json`."""
    results = cases.Results()
    began = time.monotonic()
    facts = machine()  # before the benchmark causes load itself

    def tell(what: str) -> None:
        console.print(f"{time.monotonic() - began:5.0f} s  {what}", highlight=False)

    @contextlib.contextmanager
    def part(what: str) -> Iterator[None]:
        """Run one part; if it fails, report that and continue with the next part."""
        tell(what)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other cases can still be measured
            results.trouble.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
            console.print(traceback.format_exc(), markup=False)

    if not systems.peer_installed():
        results.trouble.append("The published agent is not installed and was not measured. Run: make bench")
    with tempfile.TemporaryDirectory(prefix="socs-monitor-bench-") as scratch:
        folder = Path(scratch)
        tell("writing files")
        files = load.small_files(folder / "small", max(plan.files, int(10_000 * plan.sustained_s)))
        large = {
            size: load.large_files(folder / "large" / str(size), count, size) for size, count in plan.sizes.items()
        }
        for number in range(plan.rounds):
            place = folder / f"round{number}"
            with (
                part(f"round {number + 1} of {plan.rounds}"),
                systems.everything(place) as measured,
                systems.floor(place / "prompt", 0.0) as prompt,
            ):
                turn = cases.Round(results, plan, measured, prompt, files, number)
                turn.small()
                if number < plan.large_rounds:
                    tell("  large files")
                    turn.large(large, place / "links")
        with part("sustained, with metadata and status calls"):
            cases.sustained(results, plan, folder, files)
        with part(f"{plan.agents} agents at once"):
            cases.several(results, plan, folder, files)
        with part("grown database"):
            cases.grown(results, plan, folder, files)
        tell("done")
    return {"machine": facts, "rounds": plan.rounds, **results.summary()}


def machine() -> dict[str, Any]:
    """Return the properties of this machine on which the figures depend."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
    }


def rounded(value: Any) -> Any:
    """Round all numbers to four significant digits, which is more than their accuracy."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


if __name__ == "__main__":
    main()
