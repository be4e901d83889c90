"""``hookline verify``: what the kernel's verifier says of each program of an object, in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hookline.cli._errors import explained
from hookline.cli._options import JsonOption, check_path

if TYPE_CHECKING:
    from hookline.bpf import Verdict


def verify(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", callback=check_path, help="A compiled object, such as count.bpf.o."),
    ],
    program: Annotated[
        str, typer.Option("--program", metavar="NAME", help="Only the program of this C function's name.")
    ] = "",
    log: Annotated[
        bool, typer.Option("--log", help="Show the verifier's whole log of each refusal.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Load each program of an object alone and say what the kernel's verifier says of it.

    Nothing is attached, and nothing stays loaded. Of a program that is refused: what the verifier means, the line of C, the
    usual mend. Exits with 1 where one is refused, with 3 where all that is missing is a capability or a kernel feature.

    \b
    Examples:
      hookline verify count.bpf.o
      hookline verify count.bpf.o --program count --log
      hookline verify count.bpf.o --json
    """
    from hookline import bpf
    from hookline.cli._output import print_json

    verdicts = bpf.verify(file, program)
    words = ["verify", file, *(["--program", program] if program else []), *["--log"] * log]
    if as_json:
        print_json({"file": file, "programs": [_document(verdict, log, words) for verdict in verdicts]})
    else:
        _print(verdicts, log, words)
    statuses = {verdict.error.exit_status for verdict in verdicts if verdict.error is not None}
    if statuses:
        raise typer.Exit(1 if 1 in statuses else max(statuses))


def _print(verdicts: list[Verdict], log: bool, words: list[str]) -> None:
    from hookline.cli._output import print_table

    accepted = [verdict for verdict in verdicts if verdict.accepted]
    if accepted:
        head = ("PROGRAM", "TYPE", "VERDICT", "INSTRUCTIONS", "VERIFIED", "STACK", "TIME")
        print_table(head, [_row(verdict) for verdict in accepted])
    for verdict in verdicts:
        if not verdict.accepted:
            if accepted:
                print()
            _print_refusal(verdict, log, words)
            accepted = [verdict]


def _row(verdict: Verdict) -> tuple[str | int, ...]:
    return (
        verdict.program,
        verdict.type,
        "accepted",
        verdict.instructions,
        verdict.verified_instructions,
        "+".join(map(str, verdict.stack_bytes)),
        f"{verdict.duration_ns / 1e6:.1f} ms",
    )


def _print_refusal(verdict: Verdict, log: bool, words: list[str]) -> None:
    from hookline import bpf

    error = verdict.error
    print(f"{verdict.program} ({verdict.type}): refused")
    if not isinstance(error, bpf.VerifierError):
        assert error is not None
        told = explained(error, words)
        print(f"  why:      {told['error']}: {told['why']}")
        print(f"  do:       {told['remedy']}")
        return
    if error.source is not None:
        print(f"  at:       {error.source}  {error.source.text}".rstrip())
    print(f"  meaning:  {error.advice or 'not known to Hookline; the words of the verifier stand below'}")
    print(f"  do:       {error.mend}")
    print(f"  verifier: {error.excerpt}")
    if log:
        print("  log:")
        for line in error.log.splitlines():
            print(f"    {line}")
    elif error.omitted:
        print(f"            {error.omitted} more lines: --log")


def _document(verdict: Verdict, log: bool, words: list[str]) -> dict[str, Any]:
    from hookline import bpf

    document: dict[str, Any] = {
        "program": verdict.program,
        "section": verdict.section,
        "type": verdict.type,
        "accepted": verdict.accepted,
        "instructions": verdict.instructions,
        "verified_instructions": verdict.verified_instructions,
        "stack_bytes": list(verdict.stack_bytes),
        "duration_ns": verdict.duration_ns,
        "refusal": None,
    }
    error = verdict.error
    if error is not None:
        refusal: dict[str, Any] = {**explained(error, words)}
        if isinstance(error, bpf.VerifierError):
            source = error.source
            refusal |= {
                "meaning": error.advice,
                "mend": error.mend,
                "verifier": error.excerpt,
                "instruction": error.instruction,
                "source": {"file": source.file, "line": source.line, "text": source.text} if source else None,
                "omitted_lines": error.omitted,
            }
            if log:
                refusal["log"] = error.log
        document["refusal"] = refusal
    return document
