"""completion: the script that teaches a shell the verbs and their options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from loraformat.cli.options import Choice

__all__ = ["completion"]

_VARIABLE = "_LORAFORMAT_COMPLETE"  # what click's scripts set, by the program's name
_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL: bash, zsh or fish.

    \b
    bash   echo 'eval "$(loraformat completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(loraformat completion zsh)"' >> ~/.zshrc
    fish   loraformat completion fish > ~/.config/fish/completions/loraformat.fish
    """
    root = ctx.find_root()
    kind = get_completion_class(shell)
    assert kind is not None  # click brings these three
    click.echo(kind(root.command, {}, "loraformat", _VARIABLE).source())
