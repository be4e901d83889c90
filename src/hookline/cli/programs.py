"""``hookline programs``: what is loaded, ours and others', what it costs, its code; programs of one's own."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hookline.cli import _loaded
from hookline.cli._errors import UsageError
from hookline.cli._options import JsonOption, check_path, check_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hookline.bpf import Jited, Program, ProgramInfo, TraceLine, Xlated
    from hookline.cli._output import Cell
    from hookline.control.user_objects import UserObject

app = typer.Typer(
    name="programs",
    help="The eBPF programs of this machine: ours and everybody's.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ProgramArgument = Annotated[
    str,
    typer.Argument(
        metavar="ID|NAME|PIN", autocompletion=_loaded.complete_program, help="A program: its id, name or pin."
    ),
]


@app.command(name="list")
def list_command(
    kind: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Only this type: xdp, sched_cls, kprobe …")
    ] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only what Hookline keeps loaded.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List every loaded program: where it is attached, since when, what it takes.

    Attachments are looked for in all network namespaces and cgroups, with links and without. Runs and their time are
    counted while somebody wants them: hookline programs stats.

    \b
    Examples:
      hookline programs list
      hookline programs list --type xdp --json
      hookline programs list --mine
    """
    from hookline import bpf
    from hookline.cli._output import print_json, print_table
    from hookline.control import user_objects

    programs = list(bpf.programs())
    around = _loaded.Around.look(programs)
    documents = [
        document
        for info in programs
        if kind is None or info.type == kind
        for document in (_loaded.program_document(info, around),)
        if document["ours"] or not mine
    ]
    if as_json:
        print_json({"programs": documents})
        return
    for one in user_objects.listed():
        if not one.complete:
            print(
                f"note: {one.name} is being loaded or unloaded, or that was killed: hookline programs unload {one.name}",
                file=sys.stderr,
            )
    if not documents:
        print(
            "no program is loaded" if kind is None and not mine else "no such program is loaded",
            file=sys.stderr,
        )
        return
    counted = any(one["run_count"] for one in documents)
    head = (
        "ID",
        "TYPE",
        "NAME",
        "ATTACHED",
        "LOADED",
        "MEMORY",
        "MAPS",
        *(("RUNS", "NS/RUN") if counted else ()),
    )
    print_table(head, [_row(one, counted=counted) for one in documents])


@app.command()
def inspect(program: ProgramArgument, as_json: JsonOption = False) -> None:
    """Show everything about one program: its hooks, links, pins, maps, functions, and the processes that hold it.

    \b
    Examples:
      hookline programs inspect 42
      hookline programs inspect balance
      hookline programs inspect /sys/fs/bpf/hookline/host/programs/balance --json
    """
    from hookline import bpf
    from hookline.cli._output import print_json

    with _loaded.open_program(program) as opened:
        document = _loaded.program_details(opened, _loaded.Around.look(list(bpf.programs())))
    if as_json:
        print_json({"program": document})
    else:
        _print_details(document)


@app.command()
def dump(
    program: ProgramArgument,
    xlated: Annotated[bool, typer.Option("--xlated", help="The verified instructions (default).")] = False,
    jited: Annotated[bool, typer.Option("--jited", help="The processor's instructions.")] = False,
    opcodes: Annotated[bool, typer.Option("--opcodes", help="With the bytes of each instruction.")] = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="With the file, line and column of source lines.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a program's instructions, between them the source lines that they were made from.

    The text is the kernel's own, as in the verifier's log. The processor's instructions need the package's extra
    "disassembly"; without it their bytes are shown.

    \b
    Examples:
      hookline programs dump balance
      hookline programs dump 42 --jited --opcodes
      hookline programs dump 42 --xlated --lines --json
    """
    if xlated and jited:
        raise UsageError(
            "--xlated and --jited exclude each other",
            why="they are two different dumps",
            remedy="say one of them",
        )
    with _loaded.open_program(program) as opened:
        if jited:
            _dump_machine(opened, opened.jited(), opcodes=opcodes, places=lines, as_json=as_json)
        else:
            _dump_verified(opened, opened.xlated(), opcodes=opcodes, places=lines, as_json=as_json)


@app.command()
def log(
    follow: Annotated[bool, typer.Option("--follow", help="Until interrupted (default).")] = False,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.0, metavar="N", callback=check_seconds, help="End after this time."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON document on each line.")] = False,
) -> None:
    """Show what programs write by bpf_printk (the kernel's trace pipe), as it comes.

    Reading takes the lines out: there is one reader.

    \b
    Examples:
      hookline programs log
      hookline programs log --seconds 10 --json
    """
    from hookline import bpf

    if follow and seconds is not None:
        raise UsageError(
            "--follow and --seconds exclude each other",
            why="the one has no end, and the other says one",
            remedy="say one of them",
        )
    if bpf.ensure_tracefs():
        print(f"note: tracefs is mounted at {bpf.pin.TRACEFS} now", file=sys.stderr)
    with bpf.trace_pipe(seconds) as pipe:
        for line in pipe:
            _print_trace(line, as_json=as_json)


@app.command()
def stats(
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.01, metavar="N", callback=check_seconds, help="How long to measure."),
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure what each program costs: runs in a second, nanoseconds of a run, share of a CPU.

    The kernel counts while this runs, which makes each run some 20 ns dearer. Only programs that ran are shown.

    \b
    Examples:
      hookline programs stats
      hookline programs stats --seconds 10 --json
    """
    from hookline.cli._output import print_json, print_table

    elapsed, rows = _measure(seconds)
    if as_json:
        print_json({"seconds": elapsed, "programs": rows})
    elif rows:
        print_table(
            ("ID", "TYPE", "NAME", "RUNS/S", "NS/RUN", "OF A CPU"),
            [
                (
                    one["id"],
                    one["type"],
                    one["name"],
                    round(one["runs_per_second"]),
                    round(one["ns_per_run"]),
                    one["cpu_share"],
                )
                for one in rows
            ],
        )
    else:
        print(f"no program ran in {elapsed:.1f} s", file=sys.stderr)


@app.command()
def build(
    files: Annotated[list[str], typer.Argument(metavar="FILE.bpf.c…", help="Programs in C.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="The object; beside its source by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile programs of your own with clang, Hookline's headers (packet.h, ring.h) and libbpf's.

    Only this needs a compiler. The objects run on every kernel from 6.1 on.

    \b
    Examples:
      hookline programs build count.bpf.c
      hookline programs build examples/programs/*.bpf.c
      hookline programs build count.bpf.c -o /tmp/count.bpf.o
    """
    from pathlib import Path

    from hookline.cli._output import print_json
    from hookline.datapath.compiler import compile_program

    if output is not None and len(files) > 1:
        raise UsageError(
            "--output is for one program", remedy="leave it out: each object goes beside its source"
        )
    made = []
    for file in files:
        source = Path(file)
        place = Path(output) if output else source.with_suffix(".o")
        made.append(str(compile_program(source, place, warn=lambda text: print(text, file=sys.stderr))))
        if not as_json:
            print(made[-1])
    if as_json:
        print_json({"objects": made})


@app.command()
def load(
    file: Annotated[
        str, typer.Argument(metavar="FILE.bpf.o", callback=check_path, help="A compiled eBPF object.")
    ],
    attach: Annotated[
        list[str] | None,
        typer.Option(
            "--attach",
            metavar="[PROGRAM=]KIND:WHERE",
            help="Where to attach: xdp:eth0, tc:eth0:ingress …; repeatable.",
        ),
    ] = None,
    program: Annotated[
        list[str] | None, typer.Option("--program", metavar="NAME", help="Only this program; repeatable.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call it; the file's name.")
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option("--pin", metavar="DIR", callback=check_path, help="Pin it there, and not by its name."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Load an object of your own, attach its programs, and keep them: programs, maps and links are pinned.

    They stay until hookline programs unload NAME. A place is given to the program whose type fits it; where several
    do, say which. If anything fails, nothing stays.

    \b
    Examples:
      hookline programs load count.bpf.o --attach xdp:eth0
      hookline programs load two.bpf.o --attach in=tc:eth0:ingress --attach out=tc:eth0:egress --name meter
      hookline programs load probe.bpf.o --attach tracepoint:sched/sched_switch --pin /sys/fs/bpf/mine
    """
    from pathlib import Path

    from hookline.cli._output import count, print_json
    from hookline.control import user_objects
    from hookline.model.names import check_loaded_name

    if name is not None and pin is not None:
        raise UsageError(
            "--name and --pin exclude each other", why="both say where it is pinned", remedy="say one of them"
        )
    if name is not None:
        check_loaded_name(name)
    loaded = user_objects.load(
        file,
        attach or (),
        programs=program or (),
        name=name or (Path(pin).name if pin else ""),
        folder=Path(pin).absolute() if pin else None,
    )
    with _undone_unless_told(loaded):
        if as_json:
            print_json({"object": _object_document(loaded)})
        else:
            print(
                f"{loaded.name} is loaded: {count(len(loaded.programs), 'program')}, {count(len(loaded.maps), 'map')}, "
                f"{count(len(loaded.links), 'attachment')}; pinned at {loaded.folder}"
            )
        if sys.stdout is not None:
            sys.stdout.flush()
    if not as_json and not loaded.links:
        print("note: it is attached nowhere; --attach KIND:WHERE does", file=sys.stderr)


@app.command()
def unload(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|DIR",
            autocompletion=_loaded.complete_user_object,
            help="Its name, or where it is pinned.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Detach and remove an object that hookline programs load has loaded.

    \b
    Examples:
      hookline programs unload count
      hookline programs unload /sys/fs/bpf/mine
    """
    from hookline.cli._output import print_json
    from hookline.control import user_objects

    gone = user_objects.unload(name)
    if as_json:
        print_json({"object": _object_document(gone)})
    else:
        print(f"{gone.name} is unloaded")


@contextlib.contextmanager
def _undone_unless_told(loaded: UserObject) -> Iterator[None]:
    """Unload an object whose loading cannot be told: the exit status says that it failed, so it must not stay."""
    from hookline.control import user_objects
    from hookline.errors import HooklineError

    try:
        yield
    except OSError as error:
        user_objects.unload(str(loaded.folder))
        if isinstance(error, BrokenPipeError):
            raise
        raise HooklineError(
            f"{loaded.name} was unloaded again",
            why=f"that it was loaded cannot be written to standard output: {error.strerror}",
            remedy="send standard output elsewhere",
        ) from error


# -- lists and descriptions


def _row(document: _loaded.Document, *, counted: bool) -> tuple[Cell, ...]:
    from hookline.cli._output import size

    cells: list[Cell] = [
        document["id"],
        document["type"],
        document["name"],
        _loaded.places(document),
        _when(document["loaded_at"]),
        size(document["memory_bytes"]),
        " ".join(map(str, document["map_ids"])),
    ]
    if counted:
        runs = document["run_count"]
        cells += [runs, round(document["run_time_ns"] / runs) if runs else 0]
    return tuple(cells)


def _when(seconds: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_details(document: _loaded.Document) -> None:
    from hookline.cli._output import print_table, size

    print(f"program {document['id']} {document['name'] or '(without a name)'}")
    fields = {
        "type": document["type"],
        "target": document["attach_target"],
        "tag": document["tag"],
        "loaded": f"{_when(document['loaded_at'])} by user {document['uid']}",
        "licence": "compatible with the GPL" if document["gpl_compatible"] else "not compatible with the GPL",
        "code": f"{document['instructions']} instructions, {document['jited_bytes']} bytes of machine code; "
        f"the verifier walked through {document['verified_instructions']}",
        "memory": size(document["memory_bytes"]),
        "types": f"BTF {document['btf_id']}" if document["btf_id"] else "",
        "runs": f"{document['run_count']} counted, {document['run_time_ns']} ns"
        if document["run_count"]
        else "",
        "misses": f"{document['recursion_misses']} runs left out, for it ran already"
        if document["recursion_misses"]
        else "",
        "attached": _loaded.places(document) or "nowhere that can be seen",
        "pinned": " ".join(document["pins"]),
    }
    for name, value in fields.items():
        if value:
            print(f"  {name:<10} {value}")
    _print_part(
        "functions",
        ("NAME", "INSTRUCTIONS", "PROTOTYPE"),
        document["functions"],
        ("name", "instructions", "prototype"),
    )
    _print_part("maps", ("ID", "TYPE", "NAME"), document["maps"], ("id", "type", "name"))
    if document["links"]:
        print("\nlinks")
        rows = [
            (one["id"], one["type"], " ".join(one["pins"]), _processes(one["holders"]))
            for one in document["links"]
        ]
        print_table(("ID", "TYPE", "PINNED", "HELD BY"), rows, indent=2)
    if document["holders"]:
        print(f"\nheld by {_processes(document['holders'])}")


def _print_part(title: str, head: Sequence[str], rows: list[_loaded.Document], names: Sequence[str]) -> None:
    from hookline.cli._output import print_table

    if rows:
        print(f"\n{title}")
        print_table(head, [[row[name] for name in names] for row in rows], indent=2)


def _processes(holders: list[_loaded.Document]) -> str:
    return ", ".join(f"{one['command']} ({one['process']})" for one in holders)


# -- code


def _dump_verified(program: Program, code: Xlated, *, opcodes: bool, places: bool, as_json: bool) -> None:
    if not as_json:
        for line in code.listing(opcodes=opcodes, places=places):
            print(line)
        return
    from hookline.cli._output import print_json

    sources = {line.place: line for line in code.lines}
    rows = []
    for one in code.instructions():
        row: dict[str, Any] = {"index": one.index, "text": one.text, "bytes": one.raw.hex()}
        if one.index in sources:
            row["source"] = _source(sources[one.index])
        rows.append(row)
    functions = [
        {"name": one.name, "prototype": one.prototype, "first": one.first, "count": one.count}
        for one in code.functions
    ]
    print_json({"id": program.id, "name": program.name, "functions": functions, "instructions": rows})


def _dump_machine(program: Program, code: Jited, *, opcodes: bool, places: bool, as_json: bool) -> None:
    from hookline import bpf

    try:
        shown = {function.name: list(code.disassemble(function)) for function in code.functions}
    except bpf.BpfError as error:
        print(f"note: {error.why}; {error.remedy}", file=sys.stderr)
        shown = {}
    if as_json:
        from hookline.cli._output import print_json

        functions = [
            {
                "name": function.name,
                "address": function.address,
                "bytes": function.code.hex(),
                "instructions": [
                    {"address": one.address, "text": one.text, "bytes": one.raw.hex()}
                    for one in shown.get(function.name, [])
                ],
                "lines": [{"address": line.place, **_source(line)} for line in function.lines],
            }
            for function in code.functions
        ]
        print_json({"id": program.id, "name": program.name, "machine": code.machine, "functions": functions})
        return
    for line in code.listing(opcodes=opcodes, places=places) if shown else code.dump():
        print(line)


def _source(line: Any) -> _loaded.Document:
    return {"file": line.file, "line": line.line, "column": line.column, "text": line.text}


# -- live


def _print_trace(line: TraceLine, *, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(line)), flush=True)
    elif line.lost:
        print(f"note: {line.lost} lines of CPU {line.cpu} were lost", file=sys.stderr)
    elif line.event:
        print(f"{line.time_s:14.6f} {line.cpu:3} {line.task}-{line.process}: {line.text}", flush=True)
    else:
        print(line.text, flush=True)


def _measure(seconds: float) -> tuple[float, list[_loaded.Document]]:
    """Let the kernel count for a while; what each program that ran has taken, the dearest first."""
    import time

    from hookline import bpf

    with bpf.run_statistics():
        started = time.monotonic()
        before = {info.id: info for info in bpf.programs()}
        time.sleep(seconds)
        after = list(bpf.programs())
        elapsed = time.monotonic() - started
    rows = [row for info in after for row in _cost(before.get(info.id), info, elapsed)]
    return elapsed, sorted(rows, key=lambda row: -row["cpu_share"])


def _cost(before: ProgramInfo | None, after: ProgramInfo, elapsed: float) -> list[_loaded.Document]:
    runs = after.run_count - (before.run_count if before else 0)
    taken = after.run_time_ns - (before.run_time_ns if before else 0)
    if not runs:
        return []
    return [
        {
            "id": after.id,
            "type": after.type,
            "name": after.name,
            "runs": runs,
            "run_time_ns": taken,
            "runs_per_second": runs / elapsed,
            "ns_per_run": taken / runs,
            "cpu_share": taken / 1e9 / elapsed,
        }
    ]


def _object_document(loaded: Any) -> _loaded.Document:
    return {
        "name": loaded.name,
        "pins": str(loaded.folder),
        "programs": list(loaded.programs),
        "maps": list(loaded.maps),
        "attachments": list(loaded.links),
    }
