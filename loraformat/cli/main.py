"""The entry point: finds the verb's module only when it is called, and turns faults into words and exit codes."""

from __future__ import annotations

import importlib
import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from loraformat.errors import LoraFormatError, Problem
from loraformat.stopping import ended_by_exception

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["cli", "main"]

_VERBS = {
    "init": ("create", "make a fresh adapter for a base: ΔW = 0"),
    "validate": ("validate", "check adapters: every shape, scale and value"),
    "info": ("info", "say what a file is: adapter, checkpoint or ONNX model"),
    "layouts": ("layouts", "list the layouts that can be read and written"),
    "convert": ("create", "write an adapter in another layout"),
    "retarget": ("retarget", "write an adapter under the names of another framework or version"),
    "bind": ("create", "write into an adapter what its base says"),
    "combine": ("combine", "make one adapter of several, by a method that is defined on ΔW"),
    "resize": ("resize", "write an adapter with fewer ranks, and what that loses"),
    "resolve": ("check", "say where every target lies in a base, and by which evidence"),
    "merge": ("deploy", "write a base with adapters added to its weights"),
    "attach": ("deploy", "write an ONNX model that runs adapters beside its weights"),
    "detach": ("graph", "write an attached model as it was before"),
    "extract": ("extract", "write the adapter in a model, or between two"),
    "diff": ("diff", "say how two adapters, or two models, differ"),
    "verify": ("check", "check that a merged base is base + adapter"),
    "report": ("report", "write a page about an adapter: heat map, spectra, problems"),
    "completion": ("completion", "print the completion script of a shell"),
}
"""Verb → (module, what the overview says of it): no module is imported for one line of text."""

_SHOWN = 20
"""Lines of problems; --json has them all."""


class _Verbs(click.Group):
    """Verbs in the order of a person's work, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"loraformat.cli.{_VERBS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name if cmd_name != "init" else "init_")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            from loraformat.names import nearest

            close = nearest(args[0], _VERBS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            if not close and os.path.exists(args[0]):
                hint = f" It is a file: loraformat info {args[0]}"
            ctx.fail(f"no such command {args[0]!r}.{hint}  Commands: {', '.join(_VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, says) for name, (_, says) in _VERBS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=says) for name, (_, says) in _VERBS.items() if name.startswith(incomplete)]
        return verbs if not incomplete.startswith("-") else super().shell_complete(ctx, incomplete)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="loraformat", message="%(package)s %(version)s")
def cli() -> None:
    """One LoRA adapter file for every runtime: check it, convert it, merge it, attach it to ONNX models.

    \b
    loraformat info     ADAPTER                            what it holds: targets, ranks, scales
    loraformat convert  ADAPTER my.lora.safetensors        one checked, self-describing file
    loraformat merge    ADAPTER --into BASE -o OUT         W + ΔW in the place of W
    loraformat attach   ADAPTER --to MODEL.onnx -o OUT     a branch beside W, which stays as it is

    Data goes to stdout, words and progress to stderr; --json gives data for programs. Exit code 0: done;
    1: the input is at fault; 2: the command line is.
    """


def main() -> None:
    """Run, and exit with 0, 1 (the input is at fault) or 2 (usage); a user's mistake never shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name in a file may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    colour = False if os.environ.get("NO_COLOR") else None  # None: as the stream is a terminal or not
    with ended_by_exception() as came:
        try:
            # click gives ctx.exit's code back, and raises everything else
            code = cli.main(prog_name="loraformat", standalone_mode=False, color=colour)
        except LoraFormatError as error:
            _fail(error, colour)
        except click.Abort:  # what click makes of Ctrl-C, and so of every signal that asks to end
            click.echo("\ninterrupted", err=True)
            sys.exit(128 + came[0] if came else 130)
        except click.ClickException as error:
            if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option):
                error = click.MissingParameter(error.param.help, error.ctx, error.param)
            error.show()
            sys.exit(error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # the disk, the permissions, the name: whatever it is, it is not in our hands
            what = f"cannot use {error.filename or 'a file'}: {error.strerror or error}"
            _fail(LoraFormatError(Problem("LF-701", what)), colour)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: LoraFormatError, colour: bool | None) -> None:
    from loraformat.cli.printing import echo_json, echo_line, lines_of

    told = False
    if "--json" in sys.argv or "--jsonl" in sys.argv:
        echo = echo_json if "--json" in sys.argv else echo_line
        with suppress(OSError):  # where stdout itself is what fails, stderr says so
            echo({"schema": 1, "problems": [p.as_json() for p in error.problems]})
            told = True
    if not told:
        lines = lines_of(error.problems)
        click.echo("\n".join(lines[:_SHOWN]), err=True, color=colour)
        if (more := len(lines) - _SHOWN) > 0:
            click.echo(f"… and {more} more (--json lists all)", err=True)
    sys.exit(2 if all(p.rule == "LF-705" for p in error.problems) else 1)
