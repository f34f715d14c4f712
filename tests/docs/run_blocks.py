"""Runs the Python blocks of Markdown files, each alone, and prints the outcomes as JSON on the last line.

python -m tests.docs.run_blocks README.md docs/patching.md
"""

import contextlib
import io
import json
import re
import sys
import traceback
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[dict]:
    """Each ```python block, its line in the file, and the ```text block after it: what it prints."""
    text = path.read_text()
    return [
        {
            "file": path.name,
            "line": text[: found.start()].count("\n") + 2,
            "code": found[1],
            "prints": found[2],
        }
        for found in BLOCK.finditer(text)
    ]


def run(block: dict) -> dict:
    """What the block printed, and its traceback or None."""
    source = "\n" * (block["line"] - 1) + block["code"]
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(source, block["file"], "exec"), {"__name__": "__main__"})
        except Exception:
            error = traceback.format_exc()
    return {"printed": printed.getvalue(), "error": error}


if __name__ == "__main__":
    print(json.dumps({path: [run(b) for b in blocks(Path(path))] for path in sys.argv[1:]}))
