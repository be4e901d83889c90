"""Signals that come while the kernel is busy for this process: a load, a trial run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hookline import bpf
from hookline.bpf import _syscall

# The verifier walks through each turn: some hundred thousand instructions, many times the timer's period.
LONG = """
#include "types.h"
__u64 runs;
SEC("xdp") int walks(struct xdp_md *ctx)
{
	volatile __u32 sum = 0;
	for (__u32 i = 0; i < 60000; i++)
		sum += i;
	return sum & 1;
}
SEC("xdp") int counts(struct xdp_md *ctx)
{
	runs++;
	return 2;
}
char _license[] SEC("license") = "GPL";
"""
PERIOD_S = 0.005
REPEAT = 4_000_000


@contextmanager
def alarms() -> Iterator[list[int]]:
    """A timer's signals; the list gets one for each that was handled."""
    handled: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, PERIOD_S, PERIOD_S)
    try:
        yield handled
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_timer_does_not_stop_a_load(compiled: Callable[..., Path]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with bpf.Object.open(compiled(LONG)) as obj:
        obj.only("walks")
        begun = time.monotonic()
        with alarms() as handled:
            obj.load()
        # Without signals held back, each of libbpf's five attempts would have met some.
        assert time.monotonic() - begun > 2 * PERIOD_S
        assert handled
        assert obj.programs["walks"].info.verified_instructions > 100_000
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


@pytest.fixture
def counting(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled(LONG)) as obj:
        obj.only("counts")
        yield obj.load()


def test_a_timer_does_not_start_a_trial_run_again(counting: bpf.Object) -> None:
    with alarms() as handled:
        assert counting.programs["counts"].test_run(bytes(64), repeat=REPEAT).verdict == 2
    assert handled
    assert counting.maps[".bss"][0]["runs"] == REPEAT


def test_whoever_asks_to_stop_stops_a_trial_run(counting: bpf.Object) -> None:
    def interrupted(*_: object) -> None:
        raise InterruptedError("asked to stop")

    for handler, raised in ((interrupted, InterruptedError), (lambda *_: None, bpf.BpfError)):
        before = signal.signal(signal.SIGINT, handler)
        child = os.fork()
        if not child:
            time.sleep(0.1)
            os.kill(os.getppid(), signal.SIGINT)
            os._exit(0)
        try:
            with pytest.raises(raised) as caught:
                counting.programs["counts"].test_run(bytes(64), repeat=(1 << 32) - 1)
            if raised is bpf.BpfError:
                assert "a signal ended it" in str(caught.value)
        finally:
            signal.signal(signal.SIGINT, before)
            os.waitpid(child, 0)


def test_a_handler_that_raises_leaves_the_mask_as_it_was() -> None:
    def interrupted(*_: object) -> None:
        raise InterruptedError("later")

    before = signal.signal(signal.SIGUSR1, interrupted)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    reached = False
    try:
        with contextlib.suppress(InterruptedError), _syscall.signals_held():
            signal.raise_signal(signal.SIGUSR1)  # for this thread: a test runner may have others
            reached = signal.SIGUSR1 in signal.sigpending()
        assert reached
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        signal.signal(signal.SIGUSR1, before)
