"""Loads every kernel program, runs packets through it, and prints hook, size, verdicts and nanoseconds.

Nothing is attached or pinned, and the network is a namespace of this process. A run's cost is the kernel's own count of it
(BPF_ENABLE_STATS), the median of batches, beside that of an empty program of the same type.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from hookline import bpf
from hookline.errors import HooklineError
from tools.build_objects import ROOT
from tools.program_samples import Sample, fill_rows, fill_tables, firewall_samples, samples, set_the_scene

BATCHES, RUNS = 15, 40
NO_TRIAL = "cgroup_sock_addr"  # the kernel runs these on their hook only
VERDICTS = {
    "xdp": {0: "ABORTED", 1: "DROP", 2: "PASS", 3: "TX", 4: "REDIRECT"},
    "sched_cls": {-1: "UNSPEC", 0: "OK", 2: "SHOT", 7: "REDIRECT"},
}


@dataclass(frozen=True)
class Run:
    """One sample's outcome. ``rewritten``: the packet came out changed."""

    sample: str
    verdict: str
    rewritten: bool
    ns: float


@dataclass(frozen=True)
class Report:
    """One program: what it is, how large, and its runs."""

    program: str
    section: str
    type: str
    instructions: int
    verified_instructions: int
    jited_bytes: int
    empty_ns: float
    runs: tuple[Run, ...]


def measure(program: bpf.Program, sample: Sample) -> Run:
    """Runs the sample again and again; the median of batches counts."""
    batches, runs = (BATCHES, RUNS) if sample.prepare is None else (BATCHES * 4, 1)

    def once() -> bpf.TestRun:
        if sample.prepare is not None:
            sample.prepare()
        return program.test_run(
            sample.data, context=sample.context, ingress=sample.ingress, egress=sample.egress
        )

    first = once()
    costs = []
    for _ in range(batches):
        before = program.info
        for _ in range(runs):
            once()
        after = program.info
        costs.append((after.run_time_ns - before.run_time_ns) / max(after.run_count - before.run_count, 1))
    number = first.verdict - (1 << 32) if first.verdict >> 31 else first.verdict
    verdict = VERDICTS.get(program.type, {}).get(number, str(number))
    rewritten = bool(sample.data) and first.data != sample.data
    return Run(sample.label, verdict, rewritten, round(statistics.median(costs), 1))


def report_all() -> list[Report]:
    """Loads and runs everything.

    Raises:
        HooklineError: A program does not load or run.
        OSError: The network namespace cannot be made.
    """
    package = ROOT / "src" / "hookline"
    datapath = package / "datapath"
    ipv6 = set_the_scene()
    with (
        bpf.Object.open(datapath / "loadbalancer" / "loadbalancer.bpf.o") as balancer,
        bpf.Object.open(datapath / "firewall" / "firewall.bpf.o") as firewall,
        bpf.Object.open(package / "bench" / "empty.bpf.o") as empty,
        bpf.run_statistics(),
    ):
        for obj in (balancer, firewall, empty):
            obj.load()
        fill_tables(balancer)
        fill_rows(firewall)
        wanted = {**samples(balancer, ipv6=ipv6), **firewall_samples(firewall)}
        programs = {**balancer.programs, **firewall.programs}
        wanted.update((name, ()) for name, program in programs.items() if program.type == NO_TRIAL)
        unknown = set(programs) - set(wanted)
        if unknown:
            raise HooklineError(
                f"no samples for {', '.join(sorted(unknown))}",
                why="every program is run",
                remedy="add packets for it to tools/program_samples.py",
            )
        return [report(program, wanted[name], empty) for name, program in programs.items()]


def report(program: bpf.Program, wanted: Sequence[Sample], empty: bpf.Object) -> Report:
    """One program's report; its size alone where it has no samples."""
    info = program.info
    if not wanted:
        sizes = info.instructions, info.verified_instructions, info.jited_bytes
        return Report(program.name, program.section, program.type, *sizes, empty_ns=0.0, runs=())
    idle = empty.programs[f"empty_{program.type}"]
    first = wanted[0]
    nothing = Sample("empty", first.data, first.context, first.ingress, first.egress)
    return Report(
        program=program.name,
        section=program.section,
        type=program.type,
        instructions=info.instructions,
        verified_instructions=info.verified_instructions,
        jited_bytes=info.jited_bytes,
        empty_ns=measure(idle, nothing).ns,
        runs=tuple(measure(program, sample) for sample in wanted),
    )


def print_table(reports: Sequence[Report]) -> None:
    """For people."""
    table = Table(
        title="kernel programs: a run of each sample, beside an empty program's", title_justify="left"
    )
    for column in ("program", "sample", "verdict"):
        table.add_column(column)
    for column in ("ns", "empty ns", "instructions", "verified"):
        table.add_column(column, justify="right")
    for one in reports:
        section = one.section.partition("/")[0]
        head = (f"{one.program} ({section})", f"{one.empty_ns:.0f}", f"{one.instructions}")
        for place, run in enumerate(one.runs):
            name, empty, size = head if place == 0 else ("", "", "")
            verified = f"{one.verified_instructions}" if place == 0 else ""
            verdict = f"{run.verdict}, rewritten" if run.rewritten else run.verdict
            table.add_row(name, run.sample, verdict, f"{run.ns:.0f}", empty, size, verified)
        if not one.runs:
            sizes = f"{one.instructions}", f"{one.verified_instructions}"
            table.add_row(f"{one.program} ({section})", "no trial run of its type", "", "", "", *sizes)
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Load every kernel program and run packets through it.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    chosen = parser.parse_args(arguments)
    try:
        reports = report_all()
    except HooklineError as error:
        print(f"programs_report: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"programs_report: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps([asdict(one) for one in reports], indent=2))
    else:
        print_table(reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
