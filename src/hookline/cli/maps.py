"""``hookline maps``: what is in the kernel's maps, ours and others'."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hookline.cli import _loaded
from hookline.cli._errors import UsageError
from hookline.cli._options import JsonOption, check_seconds

if TYPE_CHECKING:
    from hookline.bpf import Map

app = typer.Typer(
    name="maps",
    help="The eBPF maps of this machine: ours and everybody's.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MapArgument = Annotated[
    str,
    typer.Argument(
        metavar="ID|NAME|PIN", autocompletion=_loaded.complete_map, help="A map: its id, name or pin."
    ),
]
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help='JSON: 7, {"port": 80}, or a list of members.')
]


@app.command(name="list")
def list_command(
    kind: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Only this type: hash, ringbuf …")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List every map: its sizes, its memory, the programs that use it, its pins.

    \b
    Examples:
      hookline maps list
      hookline maps list --type lru_hash --json
    """
    from hookline import bpf
    from hookline.cli._output import print_json, print_table, size

    around = _loaded.Around(pins=dict(bpf.pinned()))
    for program in bpf.programs():
        for number in program.map_ids:
            around.users.setdefault(number, []).append(program.id)
    documents = [
        document
        for definition in bpf.maps()
        if kind is None or definition.type == kind
        for document in (_loaded.map_document(definition, around),)
        if document is not None
    ]
    if as_json:
        print_json({"maps": documents})
    elif documents:
        print_table(
            ("ID", "TYPE", "NAME", "KEY", "VALUE", "ENTRIES", "MEMORY", "PROGRAMS", "PINNED"),
            [
                (
                    one["id"],
                    one["type"],
                    one["name"],
                    one["key_bytes"],
                    one["value_bytes"],
                    one["max_entries"],
                    size(one["memory_bytes"]),
                    " ".join(map(str, one["programs"])),
                    " ".join(one["pins"]),
                )
                for one in documents
            ],
        )
    else:
        print("there is no map" if kind is None else "there is no such map", file=sys.stderr)


@app.command()
def dump(
    name: MapArgument,
    per_cpu: Annotated[
        bool, typer.Option("--per-cpu", help="Each CPU's value, not the sum (in JSON both are).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a map's entries, typed by its BTF; of a per-CPU map the sums over the CPUs, which the column says.

    What came without types, or has bitfields, is shown as bytes in hexadecimal.

    \b
    Examples:
      hookline maps dump services
      hookline maps dump 17 --per-cpu
      hookline maps dump /sys/fs/bpf/hookline/host/maps/services --json
    """
    from hookline.cli import _entries
    from hookline.cli._output import print_json, print_table

    with _loaded.open_map(name) as opened:
        _entries.refuse_without_entries(opened)
        with _entries.readable(opened) as shown:
            found = list(_entries.entries(shown))
            cpus = shown.per_cpu
        brief = {"id": opened.id, "name": opened.name, "type": opened.type}
    if as_json:
        print_json({"map": brief, "entries": found})
        return
    if not found:
        print(f"map {brief['name']} is empty", file=sys.stderr)
        return
    if cpus and per_cpu:
        rows = [
            (_entries.text(one["key"]), cpu, _entries.text(value))
            for one in found
            for cpu, value in enumerate(one["cpus"])
        ]
        print_table(("KEY", "CPU", "VALUE"), rows)
    else:
        head = f"SUM OF {len(found[0]['cpus'])} CPUS" if cpus else "VALUE"
        print_table(
            ("KEY", head), [(_entries.text(one["key"]), _entries.text(one["value"])) for one in found]
        )


@app.command()
def watch(
    name: MapArgument,
    interval: Annotated[
        float,
        typer.Option(
            "--interval", min=0.05, metavar="SECONDS", callback=check_seconds, help="How often to look."
        ),
    ] = 1.0,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.0, metavar="N", callback=check_seconds, help="End after this time."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON document on each line.")] = False,
) -> None:
    """Show what changes in a map, each second: entries that come and go, and numbers with their rate a second.

    Of a per-CPU map it is the sum over the CPUs. A number that was set anew, rather than counted, has no rate.

    \b
    Examples:
      hookline maps watch services
      hookline maps watch packets --interval 0.5 --json
    """
    import time

    from hookline.cli import _entries

    with _loaded.open_map(name) as opened, _entries.readable(opened) as shown:
        _entries.refuse_without_entries(shown)
        end = None if seconds is None else time.monotonic() + seconds
        before, looked = _snapshot(shown), time.monotonic()
        while end is None or time.monotonic() < end:
            time.sleep(interval if end is None else max(0.0, min(interval, end - time.monotonic())))
            now, then = _snapshot(shown), looked
            looked = time.monotonic()
            _print_changes(_changes(shown, before, now, looked - then), as_json=as_json)
            before = now


@app.command()
def update(
    name: MapArgument,
    key: KeyArgument,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="JSON, as the key.")],
    as_json: JsonOption = False,
) -> None:
    """Set an entry; keys and values are JSON. Members that are left out are zero.

    \b
    Examples:
      hookline maps update limits 7 1000
      hookline maps update services '{"address": 1, "port": 80}' '{"backends": 3}'
    """
    from hookline.cli import _entries
    from hookline.cli._output import print_json

    with _loaded.open_map(name) as opened:
        wanted = _entries.given(opened, "key", _parsed(key, "key"))
        opened[wanted] = _entries.given(opened, "value", _parsed(value, "value"))
        names = _entries.names_of(opened, "value")
        entry = {"key": _parsed(key, "key"), **_entries.value_document(opened, opened[wanted], names)}
    if as_json:
        print_json(entry)
    else:
        each = "cpus" in entry
        print(f"{key} is {_entries.text(entry['cpus' if each else 'value'])}" + ", by CPU" * each)


@app.command()
def delete(name: MapArgument, key: KeyArgument, as_json: JsonOption = False) -> None:
    """Remove an entry.

    \b
    Examples:
      hookline maps delete limits 7
    """
    from hookline.cli import _entries
    from hookline.cli._output import print_json
    from hookline.errors import HooklineError

    with _loaded.open_map(name) as opened:
        try:
            del opened[_entries.given(opened, "key", _parsed(key, "key"))]
        except KeyError:
            raise HooklineError(
                f"map {opened.name!r} has no entry {key}",
                why="no such key is in it now",
                remedy=f"hookline maps dump {opened.id} shows the entries",
            ) from None
    if as_json:
        print_json({"deleted": _parsed(key, "key")})
    else:
        print(f"{key} is removed")


def _parsed(text: str, what: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"the {what} is no JSON: {text}", why=str(error), remedy='write 7, "text", [1, 2] or {"port": 80}'
        ) from None


def _snapshot(opened: Map) -> dict[str, _loaded.Document]:
    import json

    from hookline.cli import _entries

    return {json.dumps(entry["key"]): entry for entry in _entries.entries(opened)}


def _changes(
    opened: Map, before: dict[str, _loaded.Document], now: dict[str, _loaded.Document], elapsed: float
) -> list[_loaded.Document]:
    """What is different; ``rate`` has a second's growth of the numbers that changed."""
    from hookline.cli import _entries

    found: list[_loaded.Document] = []
    for key, entry in now.items():
        if key not in before:
            found.append({"change": "added", **entry, "rate": None})
        elif entry != before[key]:
            grown = _entries.growth(opened, before[key], entry)
            found.append({"change": "changed", **entry, "rate": _scaled(grown, elapsed)})
    found += [{"change": "removed", **entry, "rate": None} for key, entry in before.items() if key not in now]
    return found


def _scaled(grown: Any, elapsed: float) -> Any:
    if isinstance(grown, dict):
        return {name: _scaled(one, elapsed) for name, one in grown.items()}
    if isinstance(grown, list):
        return [_scaled(one, elapsed) for one in grown]
    return None if grown is None else round(grown / elapsed, 3)


def _print_changes(changes: list[_loaded.Document], *, as_json: bool) -> None:
    import json
    import time

    from hookline.cli import _entries

    moment = time.time()
    for one in changes:
        if as_json:
            print(json.dumps({"time": round(moment, 3), **one}), flush=True)
            continue
        mark = {"added": "+", "changed": "~", "removed": "-"}[one["change"]]
        rate = f"  ({_entries.text(one['rate'])} a second)" if one["rate"] is not None else ""
        clock = time.strftime("%H:%M:%S", time.localtime(moment))
        sum_of = f"sum of {len(one['cpus'])} CPUs " if "cpus" in one else ""
        value = _entries.text(one["value"])
        print(f"{clock} {mark} {_entries.text(one['key'])}: {sum_of}{value}{rate}", flush=True)
