"""The trace pipe: real lines of a real program, and who else reads it."""

from __future__ import annotations

import os
import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hookline import bpf
from hookline.bpf._introspection import _trace_pipe

TALKING = """
#include "types.h"
SEC("syscall") int talk(__u32 *number)
{
	bpf_printk("hookline test %u of {word}", *number);
	return 0;
}
char _license[] SEC("license") = "GPL";
"""


@pytest.mark.feature("other", "the trace pipe")
def test_lines_come_as_they_are_written(
    compiled: Callable[..., Path], unique_name: Callable[[], str]
) -> None:
    word = unique_name()
    with bpf.Object.open(compiled(TALKING.replace("{word}", word))) as obj:
        talk = obj.load().programs["talk"]

        def write() -> None:
            for number in range(3):
                time.sleep(0.05)
                talk.test_run(context=number.to_bytes(4, "little"))

        with bpf.trace_pipe(seconds=20) as pipe:
            writer = threading.Thread(target=write)
            writer.start()
            mine: list[bpf.TraceLine] = []
            for line in pipe:
                if word in line.text:
                    mine.append(line)
                if len(mine) == 3:
                    break
            writer.join()
    assert [line.text for line in mine] == [f"hookline test {number} of {word}" for number in range(3)]
    assert {line.event for line in mine} == {"bpf_trace_printk"}
    assert all(line.cpu < bpf.possible_cpus() and line.process > 0 and line.task for line in mine)
    assert mine[0].time_s < mine[1].time_s < mine[2].time_s
    assert abs(mine[0].time_s - time.clock_gettime(time.CLOCK_MONOTONIC)) < 3600


def test_it_ends_when_its_time_is_over() -> None:
    started = time.monotonic()
    with bpf.trace_pipe(seconds=0.3) as pipe:
        for _ in pipe:
            pass
    assert 0.3 <= time.monotonic() - started < 5


def test_it_is_read_beside_a_thousand_descriptors() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2048, before[0]), before[1]))
    held = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while held[-1] < 1024:
            held.append(os.dup(held[0]))
        with bpf.trace_pipe(seconds=0.2) as pipe:
            assert all(line.cpu >= 0 for line in pipe)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_second_reader_is_told() -> None:
    release = [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]]
    if release < [6, 7]:
        pytest.skip("this kernel lets several read the trace pipe, each getting some lines (until Linux 6.7)")
    with (
        bpf.trace_pipe(seconds=1),
        pytest.raises(bpf.BpfError, match="somebody else is reading it"),
        bpf.trace_pipe(),
    ):
        pass


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "           <...>-1234    [001] d..31  1234.567890: bpf_trace_printk: hello",
            bpf.TraceLine("hello", "<...>", 1234, 1, 1234.56789, "bpf_trace_printk"),
        ),
        (
            " my task-with-dash-77 (     77) [000] ...21 5.000001: bpf_trace_printk: a: b [c]",
            bpf.TraceLine("a: b [c]", "my task-with-dash", 77, 0, 5.000001, "bpf_trace_printk"),
        ),
        ("CPU:3 [LOST 120 EVENTS]", bpf.TraceLine("", cpu=3, lost=120)),
        ("laid out in another way ", bpf.TraceLine("laid out in another way")),
    ],
)
def test_layouts_of_lines(line: str, expected: bpf.TraceLine) -> None:
    assert _trace_pipe.parse(line) == expected
