"""Probes: they agree with trying the thing, with the kernel's release and configuration, and change nothing."""

from __future__ import annotations

import ctypes
import errno as errnos
import json
import os
import socket
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hookline import bpf
from hookline.bpf import _syscall, features
from hookline.bpf._syscall import AttachType, Command
from hookline.bpf.features import Answer, Finding
from hookline.bpf.features._finding import version
from hookline.bpf.features._helpers import NAMES, minimum_kernel, number_of
from hookline.bpf.features._loading import function_id
from tests.kernel.bpf.conftest import Wire, descriptors, elsewhere
from tests.kernel.bpf.hooks import supported
from tests.requirements import missing_program, need

RELEASE = version(os.uname().release)
# Debian's kernels in the virtual machines have no file with their configuration; these are off there.
DEBIAN = "deb" in os.uname().version.lower() or "-amd64" in os.uname().release
DEBIAN_OFF = {"CONFIG_BPF_LIRC_MODE2", *({"CONFIG_FPROBE"} if RELEASE < (6, 12) else set())}
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}[os.uname().machine]


def all_findings() -> list[Finding]:
    return [
        *(features.attach(name) for name in features.hooks()),
        *(features.program_type(name) for name in features.program_types()),
        *(features.map_type(name) for name in features.map_types()),
    ]


def test_a_kernel_that_should_have_it_has_it() -> None:
    """By release and configuration; what policy refuses is named so, and is refused when it is tried too."""
    missing = []
    for found in all_findings():
        options = {option: features.config(option) for option in found.config}
        known = DEBIAN and features.config_source() == ""
        configured = (
            not DEBIAN_OFF & set(options) if known else all(v in ("y", "m") for v in options.values())
        )
        if version(found.minimum_kernel) <= RELEASE and configured and not found.policy:
            if found.feature == "lsm" and "bpf" not in (features.security_modules() or ()):
                continue
            if not found:
                missing.append(f"{found.feature}: {found.answer.value}, {found.why}")
    assert missing == []


def test_a_kernel_that_is_too_old_has_it_not() -> None:
    early = [f.feature for f in all_findings() if version(f.minimum_kernel) > RELEASE and f]
    assert early == []
    if RELEASE < (6, 6):
        assert features.attach("tcx").answer is Answer.NO
        assert "it came with Linux 6.6" in features.attach("tcx").why


def test_nothing_is_unknown_to_root() -> None:
    assert [(f.feature, f.why) for f in all_findings() if f.answer is Answer.UNKNOWN] == []


def test_program_and_map_types_agree_with_bpftool() -> None:
    need("kernel", missing_program("bpftool"))
    probed = json.loads(subprocess.check_output(["bpftool", "-j", "feature", "probe", "kernel"]))
    compared = 0
    for name in features.program_types():
        theirs = probed["program_types"].get(f"have_{name}_prog_type")
        # bpftool takes the policy's EPERM on its wrong function for a no; tp_btf is of type tracing, and works.
        if theirs is not None and not (name == "tracing" and features.attach("fentry").policy):
            assert bool(features.program_type(name)) == theirs, name
            compared += 1
    for name in features.map_types():
        theirs = probed["map_types"].get(f"have_{name}_map_type")
        if theirs is not None:
            assert bool(features.map_type(name)) == theirs, name
            compared += 1
    assert compared > 50


def test_helpers_agree_with_bpftool() -> None:
    need("kernel", missing_program("bpftool"))
    probed = json.loads(subprocess.check_output(["bpftool", "-j", "feature", "probe", "kernel", "full"]))
    listed = set(probed["helpers"]["xdp_available_helpers"])
    if len(listed) > 150:
        pytest.skip("this bpftool does not understand this kernel's refusals, and lists every helper")
    ours = {f"bpf_{name}" for name in NAMES[:209] if features.helper("xdp", name)}
    assert ours == listed


HELPERS = [
    ("xdp", "bpf_redirect_map", True),
    ("xdp", "bpf_skb_store_bytes", False),
    ("sched_cls", "bpf_skb_store_bytes", True),
    ("sched_cls", "bpf_xdp_adjust_head", False),
    ("socket_filter", "bpf_redirect", False),
    ("cgroup_sock_addr", "bpf_bind", True),
    ("syscall", "bpf_sys_bpf", True),
    ("tracing", "bpf_get_current_task_btf", True),
    ("xdp", 9999, False),
]


@pytest.mark.parametrize(("program", "wanted", "there"), HELPERS)
def test_helpers(program: str, wanted: str | int, there: bool) -> None:
    found = features.helper(program, wanted)
    assert found.answer is (Answer.YES if there else Answer.NO), found.why


def test_helper_numbers_are_the_kernels() -> None:
    """The list against the kernel's own enum, read by bpftool from its BTF."""
    need("kernel", missing_program("bpftool"))
    text = subprocess.check_output(["bpftool", "btf", "dump", "file", "/sys/kernel/btf/vmlinux"], text=True)
    block = text[text.index("ENUM 'bpf_func_id'") :]
    kernel = {}
    for line in block.splitlines()[1:]:
        if not line.startswith("\t"):
            break
        name, value = line.split()
        kernel[name.strip("'").removeprefix("BPF_FUNC_")] = int(value.removeprefix("val="))
    del kernel["unspec"], kernel["__BPF_FUNC_MAX_ID"]
    assert len(kernel) >= 209
    assert {name: number_of(name) for name in kernel} == kernel
    newest = max(map(version, map(minimum_kernel, kernel.values())))
    assert newest <= RELEASE


# Trying the thing


def perf_event(kind: int, config1: bytes = b"", config2: int = 0, config: int = 0) -> int:
    """perf_event_open(2) of this process; a descriptor or the negative errno."""
    name = ctypes.create_string_buffer(config1)
    attr = struct.pack(
        "=IIQQQQQIIQQ", kind, 128, config, 0, 0, 0, 1, 0, 0, ctypes.addressof(name) if config1 else 0, config2
    )
    buffer = ctypes.create_string_buffer(attr.ljust(128, b"\0"), 128)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_PERF_EVENT_OPEN, buffer, os.getpid(), -1, -1, 8)
    return fd if fd >= 0 else -ctypes.get_errno()


def source_type(name: str) -> int:
    path = Path("/sys/bus/event_source/devices") / name / "type"
    return int(path.read_text()) if path.exists() else 0


def program(kind: str, attach_type: int = 0, function: int = 0) -> int:
    from hookline.bpf.features import _loading

    number = _syscall.PROGRAM_TYPES.index(kind)
    return _loading._load(number, _loading._RETURN_0, attach_type, function, 0)[0]


def link(fd: int, target: int, attach_type: int, more: str = "", *values: int) -> int:
    return _syscall.call(
        Command.LINK_CREATE, _syscall.attributes("IIII" + more, fd, target, attach_type, 0, *values)
    )


@contextmanager
def closing() -> Iterator[Callable[[int], int]]:
    """Collect descriptors to be closed; hands each through, and the negative errno of none."""
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            if fd >= 0:
                stack.callback(os.close, fd)
            return fd

        yield keep


def try_kprobe() -> int:
    with closing() as keep:
        kind = source_type("kprobe")
        if not kind:
            return -errnos.ENOENT
        event = keep(perf_event(kind, b"do_nanosleep\0"))
        return event if event < 0 else keep(link(keep(program("kprobe")), event, AttachType.PERF_EVENT))


def try_kprobe_multi() -> int:
    with closing() as keep:
        symbol = ctypes.create_string_buffer(b"do_nanosleep")
        symbols = (ctypes.c_void_p * 1)(ctypes.addressof(symbol))
        fd = keep(program("kprobe", AttachType.TRACE_KPROBE_MULTI))
        place = ctypes.addressof(symbols)
        return keep(link(fd, 0, AttachType.TRACE_KPROBE_MULTI, "IIQQQ", 0, 1, place, 0, 0)) if fd >= 0 else fd


def python_binary() -> bytes:
    return os.path.realpath(sys.executable).encode() + b"\0"


def try_uprobe() -> int:
    with closing() as keep:
        kind = source_type("uprobe")
        if not kind:
            return -errnos.ENOENT
        event = keep(perf_event(kind, python_binary(), config2=entry_offset()))
        return event if event < 0 else keep(link(keep(program("kprobe")), event, AttachType.PERF_EVENT))


def entry_offset() -> int:
    """The place in the interpreter's file of its first instruction."""
    from elftools.elf.elffile import ELFFile

    with open(os.path.realpath(sys.executable), "rb") as file:
        elf = ELFFile(file)
        entry = elf.header["e_entry"]
        for segment in elf.iter_segments("PT_LOAD"):
            start, size, offset = (segment[name] for name in ("p_vaddr", "p_filesz", "p_offset"))
            if start <= entry < start + size:
                return int(entry - start + offset)
    raise AssertionError("the entry is in no segment")


def try_uprobe_multi() -> int:
    with closing() as keep:
        path = ctypes.create_string_buffer(python_binary())
        offsets = (ctypes.c_uint64 * 1)(entry_offset())
        fd = keep(program("kprobe", AttachType.TRACE_UPROBE_MULTI))
        places = ctypes.addressof(path), ctypes.addressof(offsets)
        if fd < 0:
            return fd
        return keep(link(fd, 0, AttachType.TRACE_UPROBE_MULTI, "QQQQIII4x", *places, 0, 0, 1, 0, 0))


def try_tracing(kind: str, attach_type: int, name: str) -> Callable[[], int]:
    def attempt() -> int:
        with closing() as keep:
            function = function_id(name, attach_type)
            fd = keep(program(kind, attach_type, function))
            return fd if fd < 0 else keep(link(fd, 0, attach_type))

    return attempt


def try_iterator() -> int:
    with closing() as keep:
        fd = keep(program("tracing", AttachType.TRACE_ITER, function_id("task", AttachType.TRACE_ITER)))
        return fd if fd < 0 else keep(link(fd, 0, AttachType.TRACE_ITER))


def try_netfilter() -> int:
    with closing() as keep:
        fd = keep(program("netfilter", AttachType.NETFILTER))
        # The family IPv4, its first hook, a priority.
        return fd if fd < 0 else keep(link(fd, 0, AttachType.NETFILTER, "IIiI", 2, 0, -128, 0))


def try_sockmap_link() -> int:
    with closing() as keep:
        table = keep(_syscall.call(Command.MAP_CREATE, _syscall.attributes("IIII", 15, 4, 4, 1)))
        fd = keep(program("sk_msg", AttachType.SK_MSG_VERDICT))
        return keep(link(fd, table, AttachType.SK_MSG_VERDICT))


def try_perf_link() -> int:
    with closing() as keep:
        event = keep(perf_event(1))
        return keep(link(keep(program("perf_event")), event, AttachType.PERF_EVENT))


def try_raw_tracepoint() -> int:
    with closing() as keep:
        name = ctypes.create_string_buffer(b"sched_process_exit")
        fd = keep(program("raw_tracepoint"))
        attr = _syscall.attributes("QI4x", ctypes.addressof(name), fd)
        return keep(_syscall.call(Command.RAW_TRACEPOINT_OPEN, attr))


def try_tcx() -> int:
    with closing() as keep:
        fd = keep(program("sched_cls"))
        return keep(link(fd, socket.if_nametoindex("lo"), AttachType.TCX_INGRESS, "IIQ", 0, 0, 0))


def try_cgroup(hook: str) -> Callable[[], int]:
    """On a cgroup of its own, which nobody is in."""

    def attempt() -> int:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        root = Path(next(words[4] for words in mounts if words[words.index("-") + 1] == "cgroup2"))
        folder = root / f"hookline-test-{os.environ['HOOKLINE_TEST_RUN']}"
        folder.mkdir()
        try:
            with closing() as keep:
                kind, attach_type = {
                    "cgroup_skb/egress": ("cgroup_skb", AttachType.CGROUP_INET_EGRESS),
                    "cgroup/connect4": ("cgroup_sock_addr", AttachType.CGROUP_INET4_CONNECT),
                    "cgroup/connect_unix": ("cgroup_sock_addr", AttachType.CGROUP_UNIX_CONNECT),
                    "cgroup/getsockopt": ("cgroup_sockopt", AttachType.CGROUP_GETSOCKOPT),
                    "sockops": ("sock_ops", AttachType.CGROUP_SOCK_OPS),
                }[hook]
                fd = keep(program(kind, attach_type))
                target = keep(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
                return fd if fd < 0 else keep(link(fd, target, attach_type))
        finally:
            folder.rmdir()

    return attempt


ATTEMPTS: dict[str, Callable[[], int]] = {
    "kprobe": try_kprobe,
    "kprobe.multi": try_kprobe_multi,
    "uprobe": try_uprobe,
    "uprobe.multi": try_uprobe_multi,
    "fentry": try_tracing("tracing", AttachType.TRACE_FENTRY, "do_nanosleep"),
    "fexit": try_tracing("tracing", AttachType.TRACE_FEXIT, "do_nanosleep"),
    "fmod_ret": try_tracing("tracing", AttachType.MODIFY_RETURN, "security_file_open"),
    "tp_btf": try_tracing("tracing", AttachType.TRACE_RAW_TP, "sched_switch"),
    "iter": try_iterator,
    "netfilter": try_netfilter,
    "sockmap links": try_sockmap_link,
    "perf links": try_perf_link,
    "raw_tracepoint": try_raw_tracepoint,
    "tcx": try_tcx,
    **{
        hook: try_cgroup(hook)
        for hook in ("cgroup_skb/egress", "cgroup/connect4", "cgroup/connect_unix", "cgroup/getsockopt", "sockops")
    },
}  # fmt: skip


@pytest.mark.parametrize("hook", ATTEMPTS)
def test_the_answer_is_what_an_attempt_says(hook: str) -> None:
    before = descriptors()
    found = features.attach(hook)
    with elsewhere():
        result = ATTEMPTS[hook]()
    assert bool(found) == (result >= 0), f"{found.why}; tried: {os.strerror(max(0, -result))}"
    if found.policy:
        assert result == -errnos.EPERM
    assert descriptors() == before


def test_lsm_is_what_an_attempt_says() -> None:
    """A program that loads and attaches never runs unless bpf is among the active security modules."""
    found = features.attach("lsm")
    with closing() as keep:
        fd = keep(program("lsm", AttachType.LSM_MAC, function_id("file_open", AttachType.LSM_MAC)))
    active = features.security_modules()
    assert active is not None
    assert "capability" in active
    assert bool(found) == (fd >= 0 and "bpf" in active), found.why


def test_live_frames_are_what_an_attempt_says(loaded: bpf.Object, wire: Wire) -> None:
    try:
        loaded.programs["xdp_drop"].test_run(bytes(64), repeat=4, live_frames=True, ingress=wire.near)
        works = True
    except bpf.BpfError:
        works = False
    assert bool(features.attach("live frames")) == works


def test_native_xdp_is_what_an_attempt_says(loaded: bpf.Object, wire: Wire) -> None:
    features.forget()
    for interface in (wire.near, "lo"):
        found = features.native_xdp(interface)
        try:
            loaded.programs["xdp_pass"].attach_xdp(interface, mode="native").close()
            works = True
        except bpf.BpfError:
            works = False
        if RELEASE < (6, 3):
            assert found.answer is Answer.UNKNOWN
            assert "only an attempt tells" in found.why
        else:
            assert bool(found) == works, found.why
    features.forget()
    with pytest.raises(bpf.BpfError, match="no interface"):
        features.native_xdp("nowhere")


LOOP = """
#include "types.h"
static long step(__u32 index, void *context) { return 0; }
SEC("xdp") int loops(struct xdp_md *ctx) { bpf_loop(4, step, 0, 0); return 2; }
char _license[] SEC("license") = "GPL";
"""
ITERATOR = """
#include "types.h"
struct bpf_iter_num { __u64 opaque[1]; } __attribute__((aligned(8)));
extern int bpf_iter_num_new(struct bpf_iter_num *it, int start, int end) __ksym;
extern int *bpf_iter_num_next(struct bpf_iter_num *it) __ksym;
extern void bpf_iter_num_destroy(struct bpf_iter_num *it) __ksym;
SEC("xdp") int counts(struct xdp_md *ctx) {
	struct bpf_iter_num it;
	int sum = 0, *n;
	bpf_iter_num_new(&it, 0, 10);
	while ((n = bpf_iter_num_next(&it))) sum += *n;
	bpf_iter_num_destroy(&it);
	return sum & 3;
}
char _license[] SEC("license") = "GPL";
"""


@pytest.mark.parametrize(("hook", "source"), [("bpf_loop", LOOP), ("open-coded iterators", ITERATOR)])
def test_what_programs_may_use(compiled: Callable[..., Path], hook: str, source: str) -> None:
    with bpf.Object.open(compiled(source)) as obj:
        try:
            obj.load()
            works = True
        except bpf.BpfError:
            works = False
    assert bool(features.attach(hook)) == works


def test_clsact_and_htb_are_what_an_attempt_says() -> None:
    """Where a discipline is said to be there it can be made, which may load its module."""
    with elsewhere():
        for kind in ("clsact", "fq", "htb", "tbf", "netem"):
            words = {
                "clsact": "clsact",
                "fq": "root fq",
                "htb": "root htb",
                "tbf": "root tbf rate 1mbit burst 10kb latency 1s",
                "netem": "root netem delay 1ms",
            }
            made = subprocess.run(
                ["tc", "qdisc", "add", "dev", "lo", *words[kind].split()], capture_output=True, check=False
            )
            found = features.qdisc(kind)
            if made.returncode == 0:
                assert found.answer is not Answer.NO, found.why
                subprocess.run(["tc", "qdisc", "del", "dev", "lo", *words[kind].split()[:1]], check=False)
            else:
                assert found.answer is not Answer.YES, (found.why, made.stderr)


# Manners


def test_probes_change_nothing() -> None:
    def listed() -> dict[int, str]:
        programs = {found.id: found.name for found in bpf.programs()}
        return programs | {-found.id: found.name for found in bpf.maps()}

    def modules() -> list[str]:
        path = Path("/proc/modules")
        return sorted(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else []

    features.forget()
    before, old = (descriptors(), modules()), listed()
    all_findings()
    for kind in ("fq", "htb", "clsact", "police"):
        features.qdisc(kind)
    assert (descriptors(), modules()) == before
    # Others may load programs meanwhile, with names; a probe's have none.
    assert [number for number, name in listed().items() if number not in old and not name] == []


def test_answers_are_kept() -> None:
    assert features.attach("tcx") is features.attach("tcx")
    first = features.map_type("ringbuf")
    features.forget()
    assert features.map_type("ringbuf") is not first
    assert features.map_type("ringbuf") == first


def test_unknown_names_are_refused() -> None:
    with pytest.raises(bpf.BpfError, match=r"did you mean 'kprobe\.multi'"):
        features.attach("kprobe_multi")
    with pytest.raises(bpf.BpfError, match="did you mean 'ringbuf'"):
        features.map_type("ringbuff")
    with pytest.raises(bpf.BpfError, match="did you mean 'xdp'"):
        features.program_type("xpd")
    with pytest.raises(bpf.BpfError, match="did you mean 'bpf_redirect_map'"):
        features.helper("xdp", "bpf_redirectmap")
    with pytest.raises(bpf.BpfError, match="there is no helper 'bpf_zzzz'"):
        features.helper("xdp", "zzzz")


def test_a_finding_is_an_error_when_it_is_needed() -> None:
    missing = Finding("netkit", Answer.NO, "the kernel does not know the hook", "6.7")
    error = missing.error()
    assert isinstance(error, bpf.FeatureMissing)
    assert error.minimum_kernel == "6.7"
    assert not missing
    policy = Finding("fentry", Answer.NO, "policy", "5.5", policy=True)
    assert isinstance(policy.error(), bpf.NotPermitted)


def test_lockdown_is_read_without_a_mount() -> None:
    assert features.lockdown() in ("none", "integrity", "confidentiality")
    path = Path("/sys/kernel/security/lockdown")
    if path.exists():
        assert f"[{features.lockdown()}]" in path.read_text()


def test_a_hook_that_should_be_there_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that wrongly says no fails on the kernels that this is developed on."""
    wrong = features.Finding("tcx", features.Answer.NO, "played")
    monkeypatch.setattr(features, "attach", lambda _: wrong)
    for release, hook, outcome in (
        ("6.12.30+deb13-amd64", "tcx", pytest.fail.Exception),
        ("6.18.44-fc-v657", "sk_lookup", pytest.fail.Exception),
        ("6.18.44-fc-v657", "kprobe", pytest.skip.Exception),
        ("6.1.0-30-amd64", "netkit", pytest.skip.Exception),
        ("6.5.0-of-somebody", "tcx", pytest.skip.Exception),
    ):
        monkeypatch.setattr(os, "uname", lambda release=release: types.SimpleNamespace(release=release))
        with pytest.raises(outcome):
            supported(hook)
