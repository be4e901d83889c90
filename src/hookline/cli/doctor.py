"""``hookline doctor``: what this kernel and user can do, what is missing, how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hookline.cli._options import JsonOption

if TYPE_CHECKING:
    from hookline.control.doctor import Report

_MARKS = {"ok": "ok", "note": "note", "missing": "MISSING", "unknown": "?"}


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mount bpffs and tracefs where they are not.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what this kernel and user can do, what is missing, and how to mend it.

    The machine, the hook that each function of the data path uses here and why, the capabilities that it takes, and others'
    programs on the network's hooks. Nothing is changed without --fix. Exits with 3 where something needed is missing.

    \b
    Examples:
      hookline doctor
      sudo hookline doctor --fix
      hookline doctor --json
    """
    from hookline.cli._output import print_json
    from hookline.control.doctor import examine

    report = examine(fix=fix)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    if not report.healthy:
        raise typer.Exit(3)


def _print(report: Report) -> None:
    from hookline.cli._output import print_table

    for done in report.fixed:
        print(f"fixed: {done}")
    for told in report.unfixed:
        print(f"not fixed: {told}")
    print_table(
        ("MACHINE", "", "FOUND"), [(one.name, _MARKS[one.status], one.value) for one in report.checks]
    )
    print()
    rows = [
        (one.name, one.hook or "none", one.why, " ".join(one.capabilities), " ".join(one.lacking))
        for one in report.functions
    ]
    print_table(("FUNCTION", "HOOK", "WHY", "NEEDS", "LACKS"), rows)
    _print_passed(report)
    _print_foreign(report)
    _print_remedies(report)


def _print_passed(report: Report) -> None:
    from hookline.cli._output import print_table

    rows = [
        (one.name, passed["hook"], f"{passed['missing']}: {passed['why']}")
        for one in report.functions
        for passed in one.passed_over
    ]
    if rows:
        print()
        print_table(("FUNCTION", "BETTER HOOK", "NOT HERE BECAUSE"), rows)


def _print_foreign(report: Report) -> None:
    from hookline.cli._output import print_table

    print()
    if report.foreign is None:
        print("others' programs: may not be seen (CAP_SYS_ADMIN)")
    elif not report.foreign:
        print("others' programs: none on the network's hooks")
    else:
        rows = [
            (one.program_id, one.name, one.place, ", ".join((*one.processes, *one.pins)) or "nobody")
            for one in report.foreign
        ]
        print_table(("OTHERS' PROGRAM", "NAME", "ON", "HELD BY"), rows)


def _print_remedies(report: Report) -> None:
    told = [(one.name, one.remedy) for one in report.checks if one.remedy]
    lacking = sorted({name for one in report.functions for name in one.lacking})
    if lacking:
        told.append(("capabilities", f"{' '.join(lacking)} missing: run it as root, for example with sudo"))
    told += [
        (one.name, "no hook: run a kernel with one of those above")
        for one in report.functions
        if not one.hook
    ]
    print()
    for name, remedy in told:
        print(f"{name}: {remedy}")
    print("everything needed is there" if report.healthy else "something needed is missing")
