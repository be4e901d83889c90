"""What is said of objects that this kernel cannot take, and what to do about each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hookline import bpf
from hookline.bpf import features

HEAD = '#include "types.h"\n'
LICENCE = '\nchar _license[] SEC("license") = "GPL";\n'

NO_MEMBER = """
struct task_struct { int nothing_like_it; } __attribute__((preserve_access_index));
SEC("raw_tp/sched_switch") int f(__u64 *ctx) {
	struct task_struct *task = (void *)ctx[1];
	int found;
	bpf_probe_read_kernel(&found, 4, &task->nothing_like_it);
	return found;
}"""
NO_STRUCT = NO_MEMBER.replace("task_struct", "no_such_struct")
KFUNC = """
extern int bpf_no_such_kfunc(int a) __ksym;
SEC("xdp") int f(void *ctx) { return bpf_no_such_kfunc(1); }"""
KCONFIG = """
extern int CONFIG_NO_SUCH_OPTION __kconfig;
SEC("xdp") int f(void *ctx) { return CONFIG_NO_SUCH_OPTION; }"""
FUNCTION = """
extern int missing_function(int a);
SEC("xdp") int f(void *ctx) { return missing_function(1); }"""
VARIABLE = """
extern int missing_variable;
SEC("xdp") int f(void *ctx) { return missing_variable; }"""
HELPER = """
static long (*bpf_future)(void) = (void *)NUMBER;
SEC("xdp") int f(void *ctx) { return bpf_future(); }"""
MAP = """
struct { __uint(type, TYPE); __uint(max_entries, ENTRIES); __type(key, __u32); __type(value, __u64[64]); } t SEC(".maps");
SEC("xdp") int f(void *ctx) { __u32 k = 0; return bpf_map_lookup_elem(&t, &k) ? 1 : 2; }"""


def the_map(kind: int, entries: int) -> str:
    return MAP.replace("TYPE", str(kind)).replace("ENTRIES", str(entries))


REFUSALS: list[tuple[str, str, type[bpf.BpfError], str, str]] = [
    ("member", NO_MEMBER, bpf.ObjectError, "struct task_struct has no member nothing_like_it", "field_exists"),
    ("struct", NO_STRUCT, bpf.ObjectError, "there is no struct no_such_struct", "type_exists"),
    ("kfunc", KFUNC, bpf.FeatureMissing, r"bpf_no_such_kfunc\(\)", "__weak"),
    ("kconfig", KCONFIG, bpf.ObjectError, "configuration", "__weak"),
    ("function", FUNCTION, bpf.ObjectError, "missing_function, which it does not have", "link the object"),
    ("variable", VARIABLE, bpf.ObjectError, "missing_variable, which it does not have", "__kconfig"),
    ("helper", HELPER.replace("NUMBER", "999"), bpf.FeatureMissing, "helper 999", "newer kernel"),
    ("map type", the_map(77, 1), bpf.FeatureMissing, "map type 77", "newer kernel"),
    ("no entries", the_map(2, 0), bpf.ObjectError, "has no max_entries", "__uint"),
    ("too large", the_map(2, 0x3FFFFFFF), bpf.ObjectError, "not enough memory", "resize"),
    ("section", 'SEC("xpd") int f(void *c) { return 1; }', bpf.ObjectError, "'xpd'", r'mean SEC\("xdp"\)'),
    ("place", 'SEC("kprob/foo") int f(void *c) { return 1; }', bpf.ObjectError, "no type", r'SEC\("kprobe/foo"\)'),
    ("strange", 'SEC("zzzz") int f(void *c) { return 1; }', bpf.ObjectError, "no type", "a section names the hook"),
    ("target", 'SEC("fentry/no_such_thing") int f(void *c) { return 0; }', bpf.ObjectError,
     "have no no_such_thing", "inlined or named otherwise"),
    ("ops", """
struct no_such_ops { int (*a)(void); };
SEC("struct_ops/a") int a(void *c) { return 0; }
SEC(".struct_ops") struct no_such_ops ops = {.a = (void *)a};""", bpf.FeatureMissing, "no_such_ops", "kernel that has"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "kind", "said", "remedy"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
def test_what_is_said(
    compiled: Callable[..., Path], source: str, kind: type[bpf.BpfError], said: str, remedy: str
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind, match=said) as caught, bpf.Object.open(compiled(HEAD + source + LICENCE)) as obj:
        obj.load()
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert re.search(remedy, caught.value.remedy), caught.value.remedy
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_line_of_what_does_not_fit(compiled: Callable[..., Path]) -> None:
    path = compiled(HEAD + NO_MEMBER + LICENCE)
    with (
        pytest.raises(bpf.ObjectError, match=r"text\d+\.bpf\.c:[4-7]\b") as caught,
        bpf.Object.open(path) as obj,
    ):
        obj.load()
    assert os.uname().release in str(caught.value)


def test_a_helper_of_a_later_kernel(compiled: Callable[..., Path]) -> None:
    """bpf_cgrp_storage_delete came with Linux 6.2; a kernel that has it minds the arguments instead."""
    path = compiled(HEAD + HELPER.replace("NUMBER", "211") + LICENCE)
    with pytest.raises(bpf.BpfError) as caught, bpf.Object.open(path) as obj:
        obj.load()
    if isinstance(caught.value, bpf.FeatureMissing):
        assert caught.value.minimum_kernel == "6.2"
        assert not features.map_type("cgrp_storage")
    else:
        assert isinstance(caught.value, bpf.VerifierError)
        assert "is wanted" in caught.value.advice


def test_what_policy_refuses_is_not_a_missing_capability(compiled: Callable[..., Path]) -> None:
    source = 'SEC("fentry/do_nanosleep") int f(void *c) { return 0; }'
    with bpf.Object.open(compiled(HEAD + source + LICENCE)) as obj:
        if features.attach("fentry"):
            obj.load()
            return
        assert features.attach("fentry").policy
        with pytest.raises(bpf.NotPermitted, match="policy"):
            obj.load()
