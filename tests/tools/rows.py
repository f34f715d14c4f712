"""Rows of docs/tools.md: what a tool does to a model, and how the patched model then runs."""

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
DOCUMENT = Path(__file__).parents[2] / "docs" / "tools.md"
HEAD = "| tool | before patch | after patch | remark |\n|---|---|---|---|"
# The sections of the document, a test file each.
TITLES = (
    "Checkpoints",
    "Processes and ranks",
    "Compilers, transforms, parametrisations",
    "Replaced code",
    "Training and pools",
    "Quantisation",
    "PEFT",
)


@dataclass(frozen=True)
class Row:
    """act: (model, empty folder) -> the model to call; None where a test of the same file acts.

    before: the outcome where the tool acts before `patch`. after: where it acts after it. reason: a part of
    the report's reason or of the error. remark: shown in place of the reason.
    """

    tool: str
    before: str = "works"
    after: str = "works"
    reason: str = ""
    remark: str = ""
    act: Callable[[nn.Module, Path], nn.Module] | None = None
    families: tuple[str, ...] = ("bert", "mistral")
    train: bool = True

    def outcome(self, when: str) -> str:
        return {"before patch": self.before, "after patch": self.after}[when]

    def line(self) -> str:
        remark = self.remark or (f"“… {self.reason} …”" if self.reason else "")
        return f"| {self.tool} | {self.before} | {self.after} | {remark} |"


def cases(rows: list[Row]):
    """Parametrise row, when and family over the cells of rows that act."""
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
    """Check a cell: the original's states and gradients, on the path that the table names."""

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
            with pytest.raises((PatchError, TypeError), match=row.reason):
                embedfuse.patch(model)
            return
        patch_inside(model)
    assert_same(model, original, row.train)
    found = outcome(model)
    assert (found == "works") is (wanted == "works"), found
    assert wanted == "works" or row.reason in found


def sections() -> dict[str, str]:
    """The document's tables by their titles."""
    parts = DOCUMENT.read_text().split("\n## ")[1:]
    return {title: table.strip() for title, table in (part.split("\n", 1) for part in parts)}


def check_document(title: str, rows: list[Row]) -> None:
    """Check that the document's section has exactly these rows."""
    for row in rows:
        assert {row.before, row.after} <= set(OUTCOMES), row.tool
        assert row.reason or not row.act or "original" not in (row.before, row.after), row.tool
    assert sections()[title] == "\n".join([HEAD, *(row.line() for row in rows)])


def patch_inside(model: nn.Module) -> None:
    """Patch the transformers model inside what a tool has made of it."""
    for module in model.modules():
        if not isinstance(module, Patched):
            try:
                embedfuse.patch(module)
            except TypeError:
                continue
        return
    raise AssertionError("no model inside")
