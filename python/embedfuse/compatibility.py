"""Which releases of other libraries work together: one table, for `doctor` and for errors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Pair:
    """Releases of two libraries that work together.

    Attributes:
        package: a library.
        releases: its releases that were tried.
        other: a library that it imports.
        needed: releases of the other that work with them.
        otherwise: what fails with other releases.
    """

    package: str
    releases: str
    other: str
    needed: str
    otherwise: str

    def __str__(self) -> str:
        return f"{self.package} {self.releases} with {self.other} {self.needed}"

    def status(self) -> str:
        """Whether the installed releases work together: "yes", or why not."""
        installed, other = version(self.package), version(self.other)
        if installed is None or other is None:
            return f"{self.package if installed is None else self.other} is not installed"
        if installed not in SpecifierSet(self.releases, prereleases=True):
            return f"{self.package} is {installed}: not tried"
        if other in SpecifierSet(self.needed, prereleases=True):
            return "yes"
        return f"no, {self.other} is {other}: {self.otherwise}"


PAIRS = (
    Pair("sentence-transformers", ">=6.0", "transformers", ">=5.0,<6", "it asks for others"),
    Pair("peft", ">=0.21", "transformers", ">=5.0", "not tried"),
    Pair(
        *("FlagEmbedding", "<=1.4.2", "transformers", ">=5.0,<5.24"),
        "it imports transformers.modeling_attn_mask_utils, which is gone",
    ),
    Pair(
        *("pylate", "<=1.6.0", "sentence-transformers", "<6"),
        "its ColBERT does not load; its scores and losses do",
    ),
)


# Package -> extra of embedfuse that installs it.
EXTRAS = {
    "FlagEmbedding": "flag-embedding",
    "pylate": "pylate",
    "sentence-transformers": "sentence-transformers",
}


def version(package: str) -> str | None:
    """The installed version; None if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def explained(package: str) -> Iterator[None]:
    """Around imports of `package`: an ImportError also says what to install, or which releases conflict."""
    package = package.replace("_", "-")
    try:
        yield
    except ImportError as error:
        if package in EXTRAS and version(package) is None:
            extra = EXTRAS[package]
            raise type(error)(
                f"{error}: pip install 'embedfuse[{extra}]'", name=error.name
            ) from error
        statuses = {p: p.status() for p in PAIRS if p.package == package}
        conflicts = [
            f"{pair}: {status}" for pair, status in statuses.items() if status.startswith("no, ")
        ]
        if not conflicts:
            raise
        raise ImportError(f"{error}. Accepted is {'; '.join(conflicts)}") from error
