"""docs/tools.md is what the tests of this folder check."""

from pathlib import Path

from tests.tools import (
    test_checkpoints,
    test_peft,
    test_pipelines,
    test_processes,
    test_quantisation,
    test_replaced,
    test_transforms,
)
from tests.tools.rows import OUTCOMES

DOCUMENT = Path(__file__).parents[2] / "docs" / "tools.md"
MODULES = {
    "Checkpoints": test_checkpoints,
    "Processes and ranks": test_processes,
    "Compilers, transforms, parametrisations": test_transforms,
    "Replaced code": test_replaced,
    "Training and pools": test_pipelines,
    "Quantisation": test_quantisation,
    "PEFT": test_peft,
}


def table() -> str:
    parts = []
    for title, module in MODULES.items():
        head = f"## {title}\n\n| tool | before patch | after patch | remark |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(row.line() for row in module.ROWS) + "\n")
    return "\n".join(parts)


def test_the_document_has_these_rows():
    assert table() in DOCUMENT.read_text()


def test_rows_are_whole():
    rows = [row for module in MODULES.values() for row in module.ROWS]
    assert len({row.tool for row in rows}) == len(rows)
    assert {row.before for row in rows} | {row.after for row in rows} <= set(OUTCOMES)
    assert all(row.said for row in rows if row.act and "original" in (row.before, row.after))
