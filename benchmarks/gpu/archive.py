"""The results of a run in one archive, rewritten every few seconds: a kill at any moment loses no more."""

import io
import os
import tarfile
import threading
from pathlib import Path

NAME = "results.tgz"


class Archive:
    """A context in which the file `path` follows the folder `work`.

    Args:
        work: Folder of the files; temporary ones (*.part) are left out.
        path: Of the archive.
        seconds: Between two writes.
    """

    def __init__(self, work: Path, path: Path, seconds: float = 10.0):
        self.work, self.path, self.seconds = work, path, seconds
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Archive":
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()
        self.write()

    def _follow(self) -> None:
        while not self._ended.wait(self.seconds):
            self.write()

    def write(self) -> None:
        """Under a temporary name first, so that the archive is complete at all times."""
        with self._lock:
            part = self.path.with_name(f"{self.path.name}.part")
            with tarfile.open(part, "w:gz", compresslevel=3) as archive:
                for path in sorted(self.work.rglob("*")):
                    if path.is_file() and path.suffix != ".part":
                        add(archive, path, str(path.relative_to(self.work)))
            os.replace(part, self.path)


def add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """One file as it is now; it may grow meanwhile, or be gone."""
    try:
        with path.open("rb") as file:
            info, data = archive.gettarinfo(arcname=name, fileobj=file), file.read()
        info.size = len(data)  # a file that shrinks while it is added would break the archive
        archive.addfile(info, io.BytesIO(data))
    except FileNotFoundError:
        pass
