"""JSON that reads well in a diff."""

import json
import os
from pathlib import Path


def write_json(path: Path, document: dict, rows: str) -> None:
    """document, whose value under `rows` is a list: one line each. There is never half a file."""
    head = {key: value for key, value in document.items() if key != rows}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = ",\n".join(json.dumps(entry) for entry in document[rows])
    text = "\n".join(["{", *lines, f"{json.dumps(rows)}: [", entries, "]}"]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
