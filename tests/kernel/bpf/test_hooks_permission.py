"""Who was handed a loaded program may link it to most hooks; perf events and other people's sockets ask for more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.bpf.hooks import supported

_CHILD = """
import os, sys
from hookline import bpf
# What is imported on first use, while the files can still be read.
import elftools.elf.elffile, numpy.ctypeslib, pyroute2
from hookline.bpf import features
from hookline.bpf._links import _attach_cgroup, _attach_netfilter, _attach_socket, _attach_trace, _attach_user, _query
from hookline.bpf._objects import _elf
features.attach("uprobe.multi")
obj = bpf.Object.open(sys.argv[1])
obj.only("on_" + sys.argv[2])
program = obj.load().programs["on_" + sys.argv[2]]
folder = bpf.cgroup_folder()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
features.forget()
try:
    if sys.argv[3] == "query":
        bpf.query(sys.argv[4])
    elif sys.argv[2] == "socket_filter":
        program.attach_socket_of(int(sys.argv[3]), 0).close()
    elif sys.argv[2] == "connect4":
        program.attach_cgroup(folder).close()
    else:
        program.attach(sys.argv[3]).close()
    print("attached")
except bpf.NotPermitted as error:
    print(error.capability, "|", error)
    sys.exit(error.exit_status)
"""


def unprivileged(hooks_file: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, hooks_file, *words],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "container": "docker"},
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", ["connect4", "raw_tracepoint", "tp_btf", "sk_lookup"])
def test_a_loaded_program_is_permission_enough(hooks_file: Path, name: str) -> None:
    assert unprivileged(hooks_file, name, "") == (0, "attached\n")


@pytest.mark.parametrize(
    ("name", "target", "capability"),
    [
        ("perf_event", "perf", "CAP_PERFMON"),
        ("uprobe", "", "CAP_PERFMON"),
        ("kprobe", "", "CAP_PERFMON"),
        ("tracepoint", "", "CAP_PERFMON"),
    ],
)
def test_perf_events_ask_for_more(hooks_file: Path, name: str, target: str, capability: str) -> None:
    if name == "kprobe":
        supported("kprobe")
    status, text = unprivileged(hooks_file, name, target)
    assert (status, text.split(" | ")[0]) == (3, capability)


def test_another_user_s_process_is_not_looked_into(hooks_file: Path) -> None:
    status, text = unprivileged(hooks_file, "socket_filter", str(os.getpid()))
    assert status == 3
    assert "lacks CAP_SYS_PTRACE" in text
    assert "--cap-add SYS_PTRACE" in text


@pytest.mark.parametrize("hook", ["cgroup:/:connect4", "netns:sk_lookup"])
def test_what_a_hook_holds_is_not_for_everyone(hooks_file: Path, hook: str) -> None:
    status, text = unprivileged(hooks_file, "connect4", "query", hook)
    assert status == 3
    assert "lacks CAP_NET_ADMIN and CAP_BPF" in text
