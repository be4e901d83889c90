"""What the verifier's messages mean in plain words, and the usual mend: one table.

The first rule whose pattern is found in the log's last lines is the answer. Wordings of Linux 6.1, 6.12 and 6.18 are
side by side. Groups of a pattern may be named in the words by ``{name}``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Advice", "advise"]


class Advice(NamedTuple):
    """What a refusal means, and the usual mend; both are sentences."""

    meaning: str
    mend: str


class _Rule(NamedTuple):
    pattern: str
    meaning: str
    mend: str


_RULES = [
    # Loops, size, calls
    _Rule(
        r"back-edge from insn",
        "the program goes back to where it was and no end is seen: a loop without a bound, or a function that calls itself",
        "give the loop a fixed bound, such as for (i = 0; i < 100; i++); turn a recursion into such a loop",
    ),
    _Rule(
        r"infinite loop detected",
        "a loop may run for ever: the verifier came back to the same place with nothing changed",
        "give the loop an end that the verifier sees, such as for (i = 0; i < 100; i++), or use bpf_loop() or bpf_for()",
    ),
    _Rule(
        r"BPF program is too large|too many (?:insns|states)|The sequence of \d+ jumps is too complex|"
        r"BPF program has \d+ instructions",
        "the verifier would have to walk more than its limit of one million instructions",
        "make loops shorter, or let bpf_loop() or bpf_for() run them; move parts into __noinline global functions or tail calls",
    ),
    _Rule(
        r"recursive call|the call stack of \d+ frames is too deep",
        "functions call each other more than 8 deep, or a function calls itself",
        "turn the recursion into a loop with a fixed bound",
    ),
    _Rule(
        r"combined stack size of (?P<calls>\d+) calls is (?P<bytes>\d+)",
        "the functions of one chain of {calls} calls need {bytes} bytes of stack together, and 512 is all there is",
        "keep large buffers in a per-CPU array of one entry, and look them up",
    ),
    _Rule(
        r"invalid (?:write|read)? ?(?:to|from)? ?(?:indirect access to )?stack R\d+ off=(?P<offset>-5[2-9]\d|-[6-9]\d\d|-\d{4,})|"
        r"invalid stack off=(?P<offset2>-\d{3,}) size",
        "the access is beyond the 512 bytes of stack that a function has",
        "keep large buffers in a per-CPU array of one entry, and look them up",
    ),
    _Rule(
        r"invalid (?:unbounded )?variable-offset (?:write to|read from|indirect access to) stack R\d+|"
        r"R\d+ (?:unbounded )?variable-offset (?:write|read|indirect access) .*stack",
        "an array on the stack is used at an index of which the verifier does not know that it is within the array",
        "limit the index just before: if (index >= COUNT) return …; or, for powers of two, index &= COUNT - 1",
    ),
    _Rule(
        r"invalid size of register (?:spill|fill)",
        "a pointer is kept on the stack, or fetched from there, by less than its 64 bits: so is ctx->data in an int, or in a "
        "volatile variable",
        "keep pointers in pointers (void *data = (void *)(long)ctx->data); subtract pointers to get a length, in 64 bits",
    ),
    # Things that are taken and given back
    _Rule(
        r"Unreleased reference id=\d+ alloc_insn=(?P<alloc>\d+)",
        "what was taken here (a reserved record of a ring, a socket, a kptr) is not given back on every way out",
        "submit or discard the record, release the socket, before every return",
    ),
    _Rule(
        r"inside bpf_spin_lock-ed region|bpf_spin_lock is missing unlock|bpf_spin_unlock is missing|"
        r"cannot be used inside bpf_(?:spin|res_spin)_lock|inside bpf_spin_lock|"
        r"(?:BPF_EXIT|tail_call|bpf_tail_call).* (?:would lead to|inside) .*lock",
        "a spin lock that is held is not given back on every way out, or something is called meanwhile that may not be",
        "call bpf_spin_unlock() before every return, and do nothing but simple work while the lock is held",
    ),
    # Packets
    _Rule(
        r"invalid access to packet, off=(?P<offset>-?\d+) size=(?P<size>\d+)",
        "the packet is used at offset {offset} (size {size}), and it was not checked that the packet is so long",
        "compare with data_end first: if (data + {offset} + {size} > data_end) return …; and check again after any helper "
        "that may move the packet",
    ),
    _Rule(
        r"R\d+ offset is outside of the packet",
        "the packet is used beyond what was compared with data_end",
        "compare with data_end first: if (pointer + size > data_end) return …;",
    ),
    _Rule(
        r"pkt pointer.*unbounded|pointer arithmetic .*pkt_end|math between pkt pointer and register with unbounded",
        "a number without a known limit is added to a packet pointer",
        "limit the number first (offset &= 0xffff, or if (offset > MAX) return …;), then compare with data_end",
    ),
    # Map values
    _Rule(
        r"invalid mem access '(?:map_value_or_null|[a-z_]*_or_null)'|"
        r"(?:possibly|may be) NULL|Possibly NULL pointer passed",
        "a pointer that may be NULL is used: a map lookup, a reservation or a socket lookup finds nothing at times",
        "test it before its first use: if (!value) return …;",
    ),
    _Rule(
        r"invalid access to map value, value_size=(?P<room>\d+) off=(?P<offset>-?\d+) size=(?P<size>\d+)",
        "a map's value may be used at offset {offset} (size {size}), and the value has {room} bytes",
        "limit the index before it is used: if (index >= COUNT) return …; or, for powers of two, index &= COUNT - 1",
    ),
    _Rule(
        r"R\d+ (?:max|min) value is (?:outside of the allowed memory range|negative)|unbounded memory access|"
        r"R\d+ unbounded memory access|R\d+ invalid (?:zero-sized|negative) (?:read|access)|invalid access to memory",
        "an offset or a length may be negative, or larger than the memory that it is used on",
        "use an unsigned number and limit it just before its use: if (length > sizeof(buffer)) return …; or length &= MASK",
    ),
    _Rule(
        r"math between (?P<kind>\w+) pointer and register with unbounded",
        "a number without a known limit is added to a {kind} pointer",
        "limit the number first: if (offset >= SIZE) return …; or, for powers of two, offset &= SIZE - 1",
    ),
    _Rule(
        r"value (?P<value>-?\d+) makes (?P<kind>\w+) pointer be out of bounds|pointer offset .* is not allowed",
        "the arithmetic takes the pointer out of what it may point to",
        "limit the number before it is added",
    ),
    # Pointers and registers
    _Rule(
        r"(?:R\d+ )?(?:32-bit |bitwise operator .* on )?pointer arithmetic (?:with .* operator )?prohibited|"
        r"R\d+ (?:pointer|bitwise operator) .*prohibited|pointer arithmetic on \S+ prohibited|"
        r"dereference of modified \S+ ptr|cannot subtract pointer|R\d+ partial copy of pointer",
        "this arithmetic is not allowed on a pointer: only adding and subtracting limited numbers is, on some kinds of pointers",
        "calculate with numbers, and add the result to the pointer last; keep 64-bit types for pointers",
    ),
    _Rule(
        r"R(?P<register>\d+) !read_ok|invalid read from stack|invalid indirect read from stack|"
        r"invalid read from stack R\d+ off",
        "a variable or register is read that may not have been written",
        "give it a value where it is declared; clear structs with padding as a whole (= {{}} or __builtin_memset)",
    ),
    _Rule(
        r"R\d+ invalid mem access '(?P<kind>scalar|inv)'",
        "a number is used as a pointer: the verifier does not know what it points to",
        "read kernel memory with bpf_probe_read_kernel() or BPF_CORE_READ(), user memory with bpf_probe_read_user()",
    ),
    _Rule(
        r"R\d+ invalid mem access '(?P<kind>[^']+)'",
        "a {kind} pointer is used in a way that it does not allow",
        "check where the pointer comes from, and that its type fits the access",
    ),
    _Rule(
        r"misaligned (?:packet|stack|value|context|\w+) access",
        "the access is not aligned to its size",
        "read the bytes one by one, or by __builtin_memcpy() into an aligned variable",
    ),
    _Rule(
        r"leaks addr|R\d+ pointer comparison prohibited|attempt to corrupt spilled pointer",
        "an address of the kernel could be read from what the program leaves behind, which takes CAP_PERFMON",
        "do not store, return or compare pointers as numbers, or run with CAP_PERFMON",
    ),
    # Context and results
    _Rule(
        r"invalid bpf_context access off=(?P<offset>\d+) size=(?P<size>\d+)|dereference of modified ctx ptr",
        "this member of the context (offset {offset}, {size} bytes) may not be read or written by this type of program, "
        "or not in this size",
        "use the members that the program type allows, each as a whole; copy the context's address nowhere else",
    ),
    _Rule(
        r"At program exit the register R0|R0 !read_ok|At (?:subprogram exit|(?:async )?callback return) the register",
        "the program may return a number that its hook does not know",
        "return only the hook's own verdicts, such as 0 or 1 on a cgroup hook",
    ),
    # Helpers and kfuncs
    _Rule(
        r"cannot call GPL-restricted function from non-GPL compatible program|"
        r"cannot call GPL only function|from non-GPL compatible",
        "the helper is for programs under the GPL, and this one does not say that it is",
        'declare it: char _license[] SEC("license") = "GPL"; or do without the helper',
    ),
    _Rule(
        r"helper call might sleep in a non-sleepable prog|sleepable .*non-sleepable|"
        r"(?:unknown func|program of this type cannot use helper) (?P<helper>bpf_copy_from_user\w*|bpf_ima_\w+)",
        "the helper may sleep, and this program runs where the kernel cannot wait",
        'use a sleepable program (SEC("fentry.s/…"), SEC("lsm.s/…"), SEC("syscall")), or a helper that does not sleep, such as '
        "bpf_probe_read_user()",
    ),
    _Rule(
        r"(?:program of this type cannot use helper|unknown func) (?P<helper>\w+)",
        "programs of this type have no {helper}()",
        "hookline.bpf.features.helper(TYPE, '{helper}') says which types have it; man 7 bpf-helpers what it is for",
    ),
    _Rule(
        r"invalid func unknown#(?P<number>\d+)",
        "this kernel does not know helper {number}",
        "run a newer kernel, or test bpf_core_enum_value_exists() before the call",
    ),
    _Rule(
        r"calling kernel function (?P<kfunc>\w+) is not allowed",
        "programs of this type may not call the kernel's function {kfunc}()",
        "use a program type for which the kernel registers it",
    ),
    _Rule(
        r"R(?P<register>\d) type=(?P<given>\w+) expected=(?P<wanted>[\w, ]+)",
        "argument {register} of the call is {given}, and {wanted} is wanted",
        "compare the call with the helper's description: man 7 bpf-helpers",
    ),
    _Rule(
        r"R\d+ must be a known constant|R\d+ is not a known constant|R\d+ doesn't have constant",
        "the helper wants a number here that is known when the program is loaded",
        "pass a literal or a const volatile variable",
    ),
    _Rule(
        r"unreachable insn",
        "some instructions cannot be reached",
        "compile again with -O2; look for code after a return or an endless loop",
    ),
    _Rule(
        r"last insn is not an exit or jmp|jump out of range|invalid BPF_LD_IMM insn|unknown opcode",
        "the instructions are no whole program: the object is damaged, or hand-written assembly is wrong",
        "compile again with clang -O2 -g -target bpf",
    ),
    _Rule(
        r"func#\d+ .*(?:not a supported|invalid) .*args?|arg#\d+ .*",
        "a global function's arguments cannot be verified",
        "make it static, or give pointers a size that BTF knows",
    ),
]  # fmt: skip

_UNKNOWN = Advice("", "read the last lines of the log from the bottom; its .log has all of it")
_LAST_LINES = 12


def advise(log: str) -> tuple[Advice, dict[str, str]]:
    """What a log means, and the named parts of the message that said so, such as ``alloc``.

    Only the log's end is looked at: what stands before are the states that led there.
    """
    lines = [line for line in log.splitlines() if line.strip()][-_LAST_LINES:]
    text = "\n".join(line for line in lines if not line.startswith(("; ", "processed ")))
    found: list[tuple[int, _Rule, re.Match[str]]] = []
    for order, rule in enumerate(_RULES):
        match = re.search(rule.pattern, text)
        if match:
            found.append((order, rule, match))
    if not found:
        return _UNKNOWN, {}
    _, rule, match = found[0]
    parts = {name: value for name, value in match.groupdict().items() if value is not None}
    known = {name: parts.get(name, "?") for name in re.findall(r"(?<!\{)\{(\w+)\}", rule.meaning + rule.mend)}
    return Advice(rule.meaning.format(**known), rule.mend.format(**known)), parts
