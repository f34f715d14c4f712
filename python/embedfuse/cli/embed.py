"""embedfuse embed: embed the texts of files."""

import argparse
import codecs
import contextlib
import json
import os
import re
import struct
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from embedfuse import Embedder
from embedfuse.pipeline.embeddings import OUTPUTS, Embeddings

_NAMES = ", ".join(OUTPUTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embeds one text per line, blank lines included, so that row and line numbers agree. Texts are "
        "embedded as documents unless --queries or --instruction is given."
    )
    parser.add_argument("model", metavar="MODEL", help="local folder or hub name")
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="UTF-8, one text per line; .jsonl; - is stdin"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help=".npy: one row per text, dense alone; .jsonl: one object per text with what --outputs names",
    )
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    parser.add_argument(
        "--field",
        help="read all files as JSON, one object per line, and embed this field (.jsonl: text)",
    )
    parser.add_argument(
        "--outputs", default="dense", help=f"of {_NAMES}, with commas (default dense)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", help="default: the GPU when there is one")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--queries", action="store_true", help="with the model's prompt for queries")
    kind.add_argument("--instruction", metavar="TEXT", help="queries, with this instruction")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text")
    parser.add_argument("--preset", metavar="NAME", help="of embedfuse.PRESETS")
    parser.add_argument(
        "--dimensions", type=int, metavar="N", help="keep the first N entries of each vector"
    )


def run(args: argparse.Namespace) -> int:
    try:
        print(embed(args))
    except (OSError, TypeError, ValueError) as error:
        print(f"embedfuse embed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nembedfuse embed: interrupted, {args.out} is not written", file=sys.stderr)
        return 130  # as shells report an interrupt
    return 0


def embed(args: argparse.Namespace) -> str:
    """Embed the files and write --out; returns the summary to print."""
    outputs = tuple(args.outputs.split(","))
    check(args, outputs)
    embedder = Embedder(
        args.model,
        dtype=args.dtype,
        device=args.device,
        max_length=args.max_length,
        preset=args.preset,
        dimensions=args.dimensions,
    )
    if args.queries or args.instruction is not None:
        prompt = embedder.preset.prompt_of_query(args.instruction)
    else:
        prompt = embedder.preset.prompt_of_document()
    lines = Lines(args.files, args.field)
    counts = Counter()

    def counted() -> Iterator[Embeddings]:
        for part in embedder.iter_encode(lines, outputs, prompt=prompt, show_progress=True):
            yield part
            counts.update(texts=len(part), tokens=part.tokens)

    columns = args.dimensions or embedder.model.config.hidden_size
    start = time.perf_counter()
    with atomic_write(args.out) as file, lines.named_in_errors():
        _WRITERS[args.out.suffix](file, counted(), columns)
    seconds = time.perf_counter() - start
    texts, tokens = counts["texts"], counts["tokens"]
    return (
        f"{args.out}: {texts:,} texts, {tokens:,} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )


def check(args: argparse.Namespace, outputs: tuple[str, ...]) -> None:
    """ValueError or OSError for arguments that are wrong whatever the model is."""
    if unknown := set(outputs) - set(OUTPUTS):
        raise ValueError(f"--outputs {args.outputs}: {unknown.pop()!r}; accepted are {_NAMES}")
    if args.out.suffix not in _WRITERS:
        raise ValueError(f"--out {args.out}: accepted are names that end in .npy or .jsonl")
    if args.out.suffix == ".npy" and outputs != ("dense",):
        raise ValueError(f"--out {args.out}: .npy holds dense vectors alone; accepted is .jsonl")
    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out}: a folder; accepted is a file")
    if args.out.exists() and not args.force:
        raise FileExistsError(f"--out {args.out}: there is such a file; --force replaces it")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.parent}")
    for file in args.files:
        if file != "-" and (os.path.isdir(file) or not os.access(file, os.R_OK)):
            raise OSError(f"{file}: cannot be read")
    if args.device:
        check_device(args.device)


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: accepted are names of torch, cpu or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU")


class Lines:
    """The texts of several files, read as they are iterated over. A byte-order mark is dropped.

    field: the field of the JSON object on each line that has the text. None: "text" in .jsonl files; in
    others the line is the text.
    """

    def __init__(self, files: Sequence[str], field: str | None):
        self._files, self._field = files, field
        self._starts: list[int] = []  # index of the first text of each file read so far

    def __iter__(self) -> Iterator[str]:
        count = 0
        for file in self._files:
            self._starts.append(count)
            with contextlib.ExitStack() as stack:
                opened = sys.stdin.buffer if file == "-" else stack.enter_context(open(file, "rb"))
                for line in opened:
                    if count == self._starts[-1]:
                        line = line.removeprefix(codecs.BOM_UTF8)
                        if not line:
                            continue  # the file holds nothing else
                    yield self._text(file, line, self.place(count))
                    count += 1

    def _text(self, file: str, line: bytes, place: str) -> str:
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: byte {error.start} is not UTF-8") from error
        field = self._field or ("text" if file.endswith(".jsonl") else None)
        if field is None:
            return text
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error})") from error
        value = found.get(field) if isinstance(found, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{place}: accepted is an object with a string under {field!r}")
        return value

    def place(self, text: int) -> str:
        """File and line of the text with this index."""
        which = bisect(self._starts, text) - 1
        file = "stdin" if self._files[which] == "-" else self._files[which]
        return f"{file}:{text - self._starts[which] + 1}"

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Replace the index of a text in the pipeline's errors by its file and line."""
        try:
            yield
        except (TypeError, ValueError) as error:
            message = re.sub(r"\btexts\[(\d+)\]", lambda m: self.place(int(m[1])), str(error))
            raise ValueError(message) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `path` at the end; after an error it is removed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_npy(file: BinaryIO, parts: Iterable[Embeddings], columns: int) -> None:
    """As numpy.save. The number of rows is written into the header at the end."""
    file.write(npy_header(0, columns))
    rows = 0
    for part in parts:
        file.write(np.ascontiguousarray(part.dense, "<f4").data)
        rows += len(part)
    file.seek(0)
    file.write(npy_header(rows, columns))


def npy_header(rows: int, columns: int) -> bytes:
    """A header of 128 bytes for any number of rows (NumPy's format 1.0)."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    return np.lib.format.magic(1, 0) + struct.pack("<H", 118) + f"{text:<117}\n".encode("ascii")


def write_jsonl(file: BinaryIO, parts: Iterable[Embeddings], columns: int) -> None:
    """One line per text: {"dense": [...], "sparse": {"token id": weight}, "multi": [[...], ...]}."""
    for part in parts:
        outputs = {
            "dense": None if part.dense is None else part.dense.tolist(),
            "sparse": None if part.sparse is None else part.sparse.dicts(),
            "multi": None if part.multi is None else [x.tolist() for x in part.multi],
        }
        outputs = {name: rows for name, rows in outputs.items() if rows is not None}
        for row in zip(*outputs.values(), strict=True):
            file.write(json.dumps(dict(zip(outputs, row, strict=True))).encode() + b"\n")


_WRITERS = {".npy": write_npy, ".jsonl": write_jsonl}
