"""`apportion cache`: what a cache holds, and whether it is whole. To add a command, add one class and one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Union

from tyro.conf import Positional, arg, subcommand

from apportion.cli.arguments import Copies, Place, describe_filter, say


@dataclass(kw_only=True)
class CacheInfo:
    """Say what a cache holds."""

    path: Positional[Place]
    """The folder or the URL of the cache."""
    copies: Annotated[Copies, arg(name="")] = field(default_factory=Copies)

    def run(self) -> None:
        self.copies.choose()
        say_cache(self.path)


@dataclass(kw_only=True)
class CacheVerify:
    """Read all of a cache and compare every file with the checksums in its manifest."""

    path: Positional[Place]
    """The folder or the URL of the cache."""
    copies: Annotated[Copies, arg(name="")] = field(default_factory=Copies)

    def run(self) -> None:
        self.copies.choose()
        verify(self.path)
        say(f"{self.path}: all checksums agree")


@dataclass(kw_only=True)
class CacheRepair:
    """Take out the shards of a cache that are damaged, so that collect makes them again."""

    path: Positional[Place]
    """The folder of the cache."""

    def run(self) -> None:
        from apportion.rows.mend import repair

        if not (bad := repair(self.path, progress=True)):
            say(f"{self.path}: all checksums agree, nothing was changed")
            return
        say(f"{self.path}: taken out with their shards: {', '.join(bad)}")
        say("  next: apportion collect with the same settings makes these shards again")


@dataclass(kw_only=True)
class CacheMerge:
    """Make one cache of several, which have the same model, hookpoints and settings."""

    paths: Positional[tuple[Place, ...]]
    """The folders of the caches, in the order of their rows."""
    out: Place
    """The folder to create."""

    def run(self) -> None:
        from apportion.rows.mend import merge

        merge(self.paths, self.out)
        say_cache(self.out)


COMMANDS: dict[str, type] = {"info": CacheInfo, "verify": CacheVerify, "repair": CacheRepair, "merge": CacheMerge}
Command: Any = Union[tuple(Annotated[c, subcommand(name)] for name, c in COMMANDS.items())]  # noqa: UP007


@dataclass(kw_only=True)
class Cache:
    """Commands about a cache of activations."""

    command: Annotated[Command, arg(name="")]  # pyright: ignore[reportInvalidTypeForm]

    def run(self) -> None:
        self.command.run()


def say_cache(path: str) -> None:
    from apportion.rows.manifest import about_cache

    about = about_cache(path)
    say(f"{path}: activation cache, {about.rows:,} tokens, {about.dtype}")
    say(f"  model {about.lm.model.name_or_path}, text {about.lm.text.to_json()}")
    for site in about.sites:
        say(f"  {site.hookpoint}: width {site.d_in}, {describe_filter(site)}")


def verify(path: str) -> None:
    """ValueError unless every hookpoint can be opened and every file has the digest in the manifest."""
    from apportion.rows.sites import open_stores

    open_stores(path)[0].verify(progress=True)
