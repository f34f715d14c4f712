"""Rows of docs/tools.md: what a tool does to a model, and how a patched one fares then."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

import embedfuse
from embedfuse.patching import PatchError
from embedfuse.patching.swap import Patched
from tests.tools.twins import assert_same, make_model, outcome

OUTCOMES = ("works", "original", "refused", "-")


@dataclass(frozen=True)
class Row:
    """act: (model, empty folder) -> the model to call then; None where the file tests it by itself.

    before, after: the outcome where the model is patched after or before the tool acts. said: what the
    reason or the error then has in it.
    """

    tool: str
    before: str = "works"
    after: str = "works"
    said: str = ""
    remark: str = ""
    act: Callable[[nn.Module, Path], nn.Module] | None = None
    families: tuple[str, ...] = ("bert", "mistral")
    train: bool = True

    def outcome(self, when: str) -> str:
        return {"before patch": self.before, "after patch": self.after}[when]

    def line(self) -> str:
        remark = self.remark or (f"“… {self.said} …”" if self.said else "")
        return f"| {self.tool} | {self.before} | {self.after} | {remark} |"


def cases(rows: list[Row]):
    """Parametrises row, when and family over the cells of rows that act."""
    return pytest.mark.parametrize(
        ("row", "when", "family"),
        [
            pytest.param(row, when, family, id=f"{row.tool}-{when}-{family}")
            for row in rows
            if row.act
            for family in row.families
            for when in ("before patch", "after patch")
            if row.outcome(when) != "-"
        ],
    )


def check(row: Row, when: str, family: str, folder: Path) -> None:
    """The cell of the table: the original's states and gradients, on the path that the table names."""

    def acted(model: nn.Module, name: str) -> nn.Module:
        (folder / name).mkdir()
        return row.act(model, folder / name)

    original, model = acted(make_model(family), "original"), make_model(family)
    wanted = row.outcome(when)
    if when == "after patch":
        embedfuse.patch(model)
        model = acted(model, "patched")
    else:
        model = acted(model, "patched")
        if wanted == "refused":
            with pytest.raises((PatchError, TypeError), match=row.said):
                embedfuse.patch(model)
            return
        patch_inside(model)
    assert_same(model, original, row.train)
    found = outcome(model)
    assert (found == "works") is (wanted == "works"), found
    assert wanted == "works" or row.said in found


def patch_inside(model: nn.Module) -> None:
    """Patch the transformers model, under whatever a tool has put around it."""
    for module in model.modules():
        if not isinstance(module, Patched):
            try:
                embedfuse.patch(module)
            except TypeError:
                continue
        return
    raise AssertionError("no model inside")
