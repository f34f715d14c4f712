"""docs/tools.md has the sections and the rows that the other tests of this folder check, each once."""

from tests.tools.rows import TITLES, sections


def test_sections():
    assert tuple(sections()) == TITLES


def test_every_tool_has_one_row():
    rows = [line for table in sections().values() for line in table.splitlines()[2:]]
    tools = [row.split(" | ")[0] for row in rows]
    assert len(tools) > 100
    assert len(set(tools)) == len(tools)
