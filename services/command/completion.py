"""``microserve completion``: what a shell has to be told so that Tab completes commands and flags.

The script is click's, which asks this very command; nothing is written anywhere.
"""

from __future__ import annotations

import click

from microserve.services.command.shared.terminal import echo

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes this command in SHELL.

    \b
    bash:  eval "$(microserve completion bash)"  in ~/.bashrc
    zsh:   eval "$(microserve completion zsh)"  in ~/.zshrc
    fish:  microserve completion fish > ~/.config/fish/completions/microserve.fish
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    made = get_completion_class(shell)
    assert made is not None
    echo(made(root, {}, "microserve", "_MICROSERVE_COMPLETE").source())
