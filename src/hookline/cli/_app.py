"""The typer application: a group that imports a command when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hookline.cli import COMMANDS, help_text


class _Commands(TyperGroup):
    """`COMMANDS`, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"hookline.cli.{COMMANDS[cmd_name].module}")
        if hasattr(module, "app"):
            return typer.main.get_group(module.app)
        one = _application()
        one.command(name=cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(one)

    def get_help(self, ctx: Any) -> str:
        return help_text()


def command() -> Any:
    """The whole command line, to be invoked."""
    whole = _application(cls=_Commands, add_completion=True)
    whole.callback()(_start)
    return typer.main.get_command(whole)


def _application(*, add_completion: bool = False, **settings: Any) -> typer.Typer:
    return typer.Typer(
        name="hookline",
        add_completion=add_completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        from hookline.cli.version import version

        version()
        raise typer.Exit


def _start(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """The options that stand before a command."""
