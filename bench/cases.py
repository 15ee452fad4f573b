"""The benchmark cases. Each runs on one system after the other and adds its measurements to `Results`."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sqlite3
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import load, systems
from bench.systems import FLOOR, OURS, PEER, System, agent
from tests.testbed.processes import Agent
from tests.testbed.smurf_server import Message, SmurfServer

LIMIT = "md5 limit"
_STATUS_PAUSE_S = 0.05


class Plan(NamedTuple):
    """Extent of the benchmark. Times in seconds, sizes in bytes, rates in messages per second."""

    rounds: int = 3
    large_rounds: int = 2
    alone: int = 60
    alone_peer: int = 12  # each takes most of a second
    idle_s: float = 10.0
    rates: Mapping[int, float] = {200: 2.0, 1000: 4.0, 5000: 3.0, 10_000: 4.0}  # rate to duration
    bursts: Mapping[int, float | None] = {3000: None, 20_000: 100_000.0}  # count to rate
    sizes: Mapping[int, int] = {64 << 10: 4000, 1 << 20: 1000, 16 << 20: 64, 256 << 20: 8}  # size to count
    sustained_s: float = 10.0
    agents: int = 6
    grown_rows: int = 5_000_000  # 0 skips this case
    grown_rounds: int = 2

    @property
    def files(self) -> int:
        """Number of small files that a round needs."""
        rated = sum(int(rate * seconds) for rate, seconds in self.rates.items())
        return self.alone + rated + sum(self.bursts) + int(1000 * self.rates[1000]) + 100


QUICK = Plan(
    rounds=1,
    large_rounds=1,
    alone=30,
    alone_peer=5,
    idle_s=2.0,
    rates={1000: 1.5, 5000: 1.0, 10_000: 1.0},
    sizes={1 << 20: 512, 256 << 20: 4},
    sustained_s=1.5,
    grown_rows=0,
)


class Results:
    """All measured values, by case, system and quantity."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        self._latencies: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.trouble: list[str] = []

    def add(self, case: str, system: str, **values: float) -> None:
        """Add values of one round."""
        for quantity, value in values.items():
            self._values[case][system][quantity].append(value)

    def add_latencies(self, case: str, system: str, seconds: Iterable[float]) -> None:
        """Add latencies of registrations, in seconds."""
        self._latencies[case][system] += seconds

    def summary(self) -> dict[str, Any]:
        """Return medians and extremes over the rounds, and quantiles of the latencies over all rounds."""
        cases: dict[str, Any] = {
            case: {
                system: {
                    quantity: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                    for quantity, values in quantities.items()
                }
                for system, quantities in systems.items()
            }
            for case, systems in self._values.items()
        }
        latency = {
            case: {system: quantiles(values) for system, values in systems.items() if len(values) > 1}
            for case, systems in self._latencies.items()
        }
        return {"cases": cases, "latency_s": latency, "trouble": self.trouble}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return quantiles, keyed by percentage."""
    ordered = sorted(values)
    marks = [0, *range(1, 100), 99.9, 100]
    return {f"{mark:g}": ordered[min(len(ordered) - 1, int(mark / 100 * len(ordered)))] for mark in marks}


class Round:
    """One round of the main cases on newly started systems.

    Args:
        results: Receives the values.
        plan: Extent of the benchmark.
        systems: The systems by name.
        prompt: A second instance of the bare work that commits at once, to measure latency.
        files: Announcements of files that no system has registered yet.
        number: Number of the round; each round starts with a different system.
    """

    def __init__(
        self,
        results: Results,
        plan: Plan,
        systems: Mapping[str, System],
        prompt: System,
        files: Sequence[Message],
        number: int,
    ) -> None:
        self._results = results
        self._plan = plan
        self._systems = systems
        self._prompt = prompt
        self._files = iter(files)
        self._number = number
        self._idle_cpu: dict[str, float] = {}

    def small(self) -> None:
        """Run all cases with small files."""
        self._warm()
        self._alone()
        time.sleep(max(system.settle_s for system in self._turns()))
        self._idle()
        for rate, seconds in self._plan.rates.items():
            self._rate(rate, self._take(int(rate * seconds)))
        self._prompt_latency(self._take(int(1000 * self._plan.rates[1000])))
        for count, rate in self._plan.bursts.items():
            self._burst(count, rate, self._take(count))
        for system in self._turns():
            self._results.add("memory", system.name, now_mb=system.memory_mb(), peak_mb=system.memory_mb("VmHWM"))

    def large(self, files: Mapping[int, Sequence[Path]], links: Path) -> None:
        """Measure throughput by file size, and latencies while the largest files are being read."""
        for size, paths in files.items():
            case, total_mb = f"files of {size} bytes", len(paths) * size / 1e6
            workers = min(2, os.cpu_count() or 1)
            load.fill_cache(paths)  # they may have left the page cache since they were written
            self._results.add(case, LIMIT, mb_per_s=total_mb / load.md5_limit_s(paths, workers))
            for system in self._turns():
                messages = load.announce_links(paths, links / f"{size}-{system.place}")
                sample = load.run(system, messages, None, settle=False)
                done_mb = sample.registered * size / 1e6
                self._results.add(case, system.name, mb_per_s=done_mb / sample.total_s, sent=sample.sent)
        largest = files[max(files)]
        for system in self._turns():
            small = self._take(1)
            messages = [*load.announce_links(largest, links / f"behind-{system.place}"), *small]
            with Caller(system) as caller:
                sample = load.run(system, messages, 2000.0, settle=False)
            values = {"worst_status_s": caller.worst_s} if caller.worst_s else {}
            if small[0].file in sample.by_path:
                values["small_behind_s"] = sample.by_path[small[0].file]
            self._results.add("behind large files", system.name, **values)

    def _take(self, count: int) -> list[Message]:
        return list(itertools.islice(self._files, count))

    def _turns(self) -> Iterator[System]:
        names = list(self._systems)
        first = self._number % len(names)
        return (self._systems[name] for name in [*names[first:], *names[:first]])

    def _warm(self) -> None:
        """Send some messages, so that imports, caches and tables are not measured."""
        files = self._take(50)
        for system in [*self._turns(), self._prompt]:
            load.run(system, files, 500.0, settle=False)

    def _idle(self) -> None:
        before = {name: (system.cpu_s(), time.monotonic()) for name, system in self._systems.items()}
        time.sleep(self._plan.idle_s)
        for name, (cpu, began) in before.items():
            share = (self._systems[name].cpu_s() - cpu) / (time.monotonic() - began)
            self._idle_cpu[name] = share
            self._results.add("idle", name, cpu_share=share)
            self._results.add("memory", name, idle_mb=self._systems[name].memory_mb())

    def _alone(self) -> None:
        files = self._take(self._plan.alone)
        for system in self._turns():
            some = files[: self._plan.alone_peer] if system.name == PEER else files
            if system.name == FLOOR:
                system = self._prompt
            self._results.add_latencies("alone", system.name, load.alone(system, some))

    def _rate(self, rate: int, files: Sequence[Message]) -> None:
        case = f"{rate} a second"
        for system in self._turns():
            sample = load.run(system, files, float(rate), self._idle_cpu[system.name])
            self._note(case, system, sample, cpu=True)
            if rate == 1000 and system.name != FLOOR:
                self._results.add_latencies(case, system.name, sample.latencies)

    def _prompt_latency(self, files: Sequence[Message]) -> None:
        sample = load.run(self._prompt, files, 1000.0, settle=False)
        self._results.add_latencies("1000 a second", FLOOR, sample.latencies)

    def _burst(self, count: int, rate: float | None, files: Sequence[Message]) -> None:
        for system in self._turns():
            self._note(f"burst of {count}", system, load.run(system, files, rate, settle=False), cpu=False)

    def _note(self, case: str, system: System, sample: load.Sample, cpu: bool) -> None:
        note(self._results, case, system.name, sample, cpu)


def note(results: Results, case: str, name: str, sample: load.Sample, cpu: bool) -> None:
    """Add the measurements of a load. The cost is per registered file, because lost files cause no work."""
    lost = sample.sent - sample.registered
    values: dict[str, float] = {"sent": sample.sent, "lost": lost, "tail_s": sample.tail_s}
    values["sending_s"] = sample.sending_s
    if cpu and sample.registered:
        values["cpu_us"] = sample.cpu_s / sample.registered * 1e6
    results.add(case, name, **values)


class Caller(threading.Thread):
    """Polls the status of an agent. If its reactor answers late, its heartbeat is late, too."""

    def __init__(self, system: System) -> None:
        super().__init__(daemon=True)
        self._agent = system.process if isinstance(system.process, Agent) else None
        self._ended = threading.Event()
        self.worst_s = 0.0  # stays 0 if the system has no status call

    def __enter__(self) -> Caller:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Poll until the block ends."""
        if self._agent is None:
            return
        client = self._agent.client()
        while not self._ended.wait(_STATUS_PAUSE_S):
            asked = time.monotonic()
            client.run.status()
            self.worst_s = max(self.worst_s, time.monotonic() - asked)


def sustained(results: Results, plan: Plan, folder: Path, files: Sequence[Message]) -> None:
    """Send 10,000 files per second while 500 metadata messages per second arrive and a client polls the status."""
    files = files[: int(10_000 * plan.sustained_s)]
    server = SmurfServer(folder / "metadata", streams=1)
    metadata = list(server.messages(len(files) // 20, ("metadata",)))
    with agent(folder / "sustained") as system, Caller(system) as caller:
        load.run(system, files[:50], 500.0, settle=False)
        sample = load.run(system, files[50:], 10_000.0, extra=metadata)
        note(results, "10000 a second with metadata", OURS, sample, cpu=True)
        results.add("10000 a second with metadata", OURS, worst_status_s=caller.worst_s)


def several(results: Results, plan: Plan, folder: Path, files: Sequence[Message]) -> None:
    """Share the load of `sustained` among several agents on one router."""
    case = f"{plan.agents} agents, 10000 a second in all"
    files = files[: int(10_000 * plan.sustained_s)]
    server = SmurfServer(folder / "metadata of several", streams=1)
    metadata = list(server.messages(len(files) // 20, ("metadata",)))
    fork = multiprocessing.get_context("fork")
    with systems.several(folder / "several", plan.agents) as agents:
        samples = fork.SimpleQueue()

        def one(number: int, system: System) -> None:
            share = files[number :: plan.agents]
            with Caller(system) as caller:
                load.run(system, share[:50], 500.0, settle=False)
                ready.wait()
                more = metadata[number :: plan.agents]
                sample = load.run(system, share[50:], 10_000.0 / plan.agents, extra=more)
            samples.put((sample, caller.worst_s))

        ready = fork.Barrier(plan.agents)
        children = [fork.Process(target=one, args=pair) for pair in enumerate(agents)]
        for child in children:
            child.start()
        for _ in children:
            sample, worst_s = samples.get()
            note(results, case, OURS, sample, cpu=True)
            results.add(case, OURS, worst_status_s=worst_s)
            results.add_latencies(case, OURS, sample.latencies)
        for child in children:
            child.join()
        for system in agents:
            results.add(case, OURS, memory_mb=system.memory_mb())


def grown(results: Results, plan: Plan, folder: Path, files: Sequence[Message]) -> None:
    """Compare the cost of a registration in a database with many rows and in an empty one."""
    count = int(5000 * plan.rates[5000])
    if not plan.grown_rows:
        return
    with agent(folder / "empty") as empty, agent(folder / "grown") as full:
        load.run(full, files[-1:], None)  # creates the table with its indexes
        with sqlite3.connect(full.db_path, timeout=30) as database:
            database.execute(_FILL, {"rows": plan.grown_rows})
        database.close()
        for number in range(plan.grown_rounds):
            some = files[number * count : (number + 1) * count]
            for name, system in (("empty", empty), ("grown", full)):
                load.run(system, _first(files, number), 500.0, settle=False)
                case = f"5000 a second, {name} database"
                note(results, case, OURS, load.run(system, some, 5000.0), cpu=True)


def _first(files: Sequence[Message], number: int) -> Sequence[Message]:
    return files[-51 - 50 * number :][:50]


# Rows of files that were archived long ago, as after years of use.
_FILL = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
INSERT INTO supersync_v0 (local_path, local_md5sum, archive_name, remote_path, timestamp, remote_md5sum, copied,
    removed, failed_copy_attempts, deletable, "ignore")
SELECT printf('/data/smurf_data/20240101/crate1slot%d/%d/outputs/%d_data.npy', i % 6, 1600000000 + i / 50, i),
    printf('%032x', i), 'smurf', printf('16%03d/crate1slot%d/%d_data.npy', i % 1000, i % 6, i),
    1600000000.0 + i, printf('%032x', i), 1600000100.0 + i, 1600000200.0 + i, 0, 1, 0
FROM n
"""
