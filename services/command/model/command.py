"""``microserve model``: models of the Hub in the cache, and the demo model."""

from __future__ import annotations

import os

import click

from microserve.services.command.model.flags import told
from microserve.services.command.shared.terminal import echo


@click.group()
def model() -> None:
    """Models of the Hugging Face Hub, and one to try things with."""


@model.command("fetch")
@click.argument("name", metavar="[ORG/NAME[@REVISION]]", required=False)
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
def fetch(name: str | None, revision: str | None) -> None:
    """Fetch a model from the Hub, or what is new of it; print its directory. What is there is checked.

    Without a name: make the demo model (SmolLM2-135M-Instruct) if it is not there.
    """
    with told() as view:
        from microserve.services.local.demo import model as demo
        from microserve.services.local.hub.fetch import Wish
        from microserve.services.local.hub.fetch import fetch as fetch_named
        from microserve.services.local.hub.name import parse_name, with_revision
        from microserve.services.local.hub.place import Place

        asked = with_revision(name, revision)
        if asked is None:
            echo(demo.fetch(demo.default_cache(os.environ), view.progress))
            return
        echo(fetch_named(Place.of(os.environ), parse_name(asked), Wish(verify=True), view.progress))


@model.command("list")
def list_models() -> None:
    """Show the models in the cache of the Hub: name, commit, size, and whether all of it is there."""
    with told():
        from microserve.services.local.hub.place import Place, kept
        from microserve.services.local.hub.sizes import in_bytes

        for each in kept(Place.of(os.environ)):
            revisions = ", ".join(each.revisions) or "-"
            state = "whole" if each.is_whole else "not whole"
            echo(f"{each.repo:<48} {each.commit[:8]}  {revisions:<12} {in_bytes(each.nbytes):>10}  {state}")


@model.command("remove")
@click.argument("name", metavar="ORG/NAME")
def remove(name: str) -> None:
    """Take a model out of the cache of the Hub, all its revisions, also for other programs."""
    with told():
        from microserve.services.local.hub.name import parse_name
        from microserve.services.local.hub.place import Place
        from microserve.services.local.hub.place import remove as remove_named
        from microserve.services.local.hub.sizes import in_bytes

        echo(f"{in_bytes(remove_named(Place.of(os.environ), parse_name(name)))} are free")
