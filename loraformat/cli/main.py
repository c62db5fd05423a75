"""The entry point: finds the verb's module only when it is called, and turns faults into words and exit codes."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import click

from loraformat.errors import LoraFormatError, Problem

__all__ = ["cli", "main"]

_VERBS = {
    "init": "create",
    "validate": "inspect",
    "info": "inspect",
    "layouts": "inspect",
    "convert": "create",
    "bind": "create",
    "resolve": "check",
    "merge": "deploy",
    "attach": "deploy",
    "verify": "check",
}


class _Verbs(click.Group):
    """Verbs in the order of a person's work, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"loraformat.cli.{_VERBS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name if cmd_name != "init" else "init_")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from loraformat.names import nearest

        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            hint = nearest(args[0], _VERBS)
            mean = f" Did you mean {hint[0]!r}?" if hint else ""
            ctx.fail(f"no such command {args[0]!r}.{mean}  Commands: {', '.join(_VERBS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="loraformat")
def cli() -> None:
    """One LoRA adapter file for every runtime: check it, convert it, merge it, attach it to ONNX models."""


def main() -> None:
    """Run, and exit with 0, 1 (the input is at fault) or 2 (usage); a user's mistake never shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name in a file may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(
            prog_name="loraformat", standalone_mode=False
        )  # click gives ctx.exit's code back, and raises everything else
    except LoraFormatError as error:
        _fail(error)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # the disk, the permissions, the name: whatever it is, it is not in our hands
        what = f"cannot use {error.filename or 'a file'}: {error.strerror or error}"
        _fail(LoraFormatError(Problem("LF-701", what)))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: LoraFormatError) -> None:
    from loraformat.cli.options import echo_json, shown

    if "--json" in sys.argv:
        echo_json({"schema": 1, "problems": [p.as_json() for p in error.problems]})
    else:
        first = error.problems[:20]
        click.echo("\n".join(map(shown, first)), err=True)
        if len(error.problems) > len(first):
            click.echo(f"… and {len(error.problems) - len(first)} more (--json lists all)", err=True)
    sys.exit(2 if all(p.rule == "LF-705" for p in error.problems) else 1)
