"""JSON files that read well in a diff."""

import json
import os
from pathlib import Path


def write_json(path: Path, document: dict, rows: str) -> None:
    """Write `document`, with a line for each entry of the list under `rows`, as a whole or not at all."""
    head = {key: value for key, value in document.items() if key != rows}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    entries = ",\n".join(json.dumps(entry) for entry in document[rows])
    text = "\n".join(["{", *lines, f"{json.dumps(rows)}: [", entries, "]}"]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
