"""``hookline version``."""

from __future__ import annotations

from hookline.cli._options import JsonOption


def version(as_json: JsonOption = False) -> None:
    """Show the versions of Hookline, Python and the kernel.

    \b
    Examples:
      hookline version --json
    """
    import platform

    from hookline import __version__
    from hookline.cli._output import print_json

    if as_json:
        print_json(
            {
                "hookline": __version__,
                "python": platform.python_version(),
                "kernel": platform.release(),
                "machine": platform.machine(),
            }
        )
    else:
        machine = f"Linux {platform.release()} {platform.machine()}"
        print(f"hookline {__version__} (Python {platform.python_version()}, {machine})")
