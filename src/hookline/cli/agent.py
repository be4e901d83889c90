"""``hookline agent``: the process that keeps a node."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from hookline.cli._options import NodeOption, check_path, check_seconds

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]


def agent(
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="A file or folder to watch and keep applied; repeatable."
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            metavar="ADDRESS:PORT",
            help="Serve metrics there too; they are on the socket anyway.",
        ),
    ] = "",
    check_every_s: Annotated[
        float,
        typer.Option(
            "--check-every",
            metavar="SECONDS",
            min=0.1,
            callback=check_seconds,
            help="Between two looks at the kernel, if nothing happens.",
        ),
    ] = 5.0,
    log_format: Annotated[Format, typer.Option("--log-format", help="How the log is written.")] = "text",
    log_level: Annotated[Level, typer.Option("--log-level", help="What is logged.")] = "info",
    print_unit: Annotated[
        bool, typer.Option("--print-unit", help="Print the systemd unit for these options, and end.")
    ] = False,
    node: NodeOption = "host",
    as_json: Annotated[
        bool, typer.Option("--json", help="The log as JSON, and so the error that ends the agent.")
    ] = False,
) -> None:
    """Keep a node: watch files, repair what others change in the kernel, answer other commands.

    What the files describe is applied when they change, and removed when they go; a broken one changes nothing. Other
    commands find the agent by its socket, /run/hookline/NODE/agent.sock. Ending the agent, in whatever way, leaves the
    kernel as it is. SIGHUP has it read everything again.

    \b
    Examples:
      hookline agent -f /etc/hookline
      hookline agent -f services.yaml --node lab/demo --metrics 127.0.0.1:9469
      hookline agent -f /etc/hookline --print-unit > /etc/systemd/system/hookline-agent.service
    """
    from hookline import agent as package

    if metrics:
        _check_metrics(metrics)
    paths = [path for path in files or [] if check_path(path)]
    if print_unit:
        options = [word for path in paths for word in ("--file", path)]
        options += ["--metrics", metrics] if metrics else []
        options += ["--node", node] if node != "host" else []
        print(package.unit_text([*options, "--log-format", "json"] if options else ()), end="")
        return
    from hookline import api, bpf
    from hookline.cli.objects import CAPABILITIES

    if bpf.lacking(*CAPABILITIES):
        raise bpf.NotPermitted(f"cannot keep node {node}", capability=" ".join(CAPABILITIES))
    with api.Node(node) as opened:
        name = opened.name
    settings = package.Settings(
        tuple(paths), metrics, check_every_s, "json" if as_json else log_format, log_level
    )
    package.run(name, lambda: api.Node(name), settings)


def _check_metrics(text: str) -> None:
    """Refuses what is no ADDRESS:PORT, before anything is started."""
    from ipaddress import ip_address

    from hookline.cli._errors import UsageError

    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    why = ""
    try:
        version = ip_address(host[1:-1] if bracketed else host).version
        if bracketed != (version == 6):
            why = "an IPv6 address stands in brackets, and no other"
    except ValueError:
        why = f"{host!r} is no address" if host else "it has no address and port, with a colon between them"
    if not why and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        why = f"{port!r} is no port: those end at 65535"
    if why:
        raise UsageError(
            f"{text!r} is not an address to listen at",
            why=why,
            remedy="say --metrics 127.0.0.1:9469 or [::1]:9469",
        )
