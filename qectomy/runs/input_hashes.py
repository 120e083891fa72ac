"""Notice files that change while they are read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint, sha256
from qectomy.checkpoint.config_files import copied_companions
from qectomy.checkpoint.headers import INDEX
from qectomy.errors import Stopped

OnMain = Callable[[Callable[[], Any]], Any]


class FileWatch:
    """Files as they were when this was made, by the names that they have for the run.

    Of several processes, which `on_main` lets hear what the first one finds, that one reads the files; another one
    does so where what it sees there are other files.
    """

    def __init__(self, files: dict[str, Path], on_main: OnMain = lambda act: act()):
        self._files = files
        self._seen = {name: _status(path) for name, path in files.items()}
        seen, self.hashes = on_main(lambda: (self._shared_status(), self._read()))
        if seen != self._shared_status():
            self.hashes = self._read()
        self.check()  # nothing may have changed while it was hashed

    def _read(self) -> dict[str, str]:
        return {name: sha256(path) for name, path in self._files.items()}

    def _shared_status(self) -> dict[str, tuple[int, ...]]:
        """What hosts that see the same files see alike: each numbers its disks for itself."""
        return {name: status[1:] for name, status in self._seen.items()}

    @property
    def fingerprint(self) -> dict[str, str]:
        """What tells a run's source from another one."""
        return {f"source's {name}": digest for name, digest in self.hashes.items()}

    def check(self) -> None:
        """Raise Stopped, naming it, for a file whose content is another now.

        A file is hashed again only where its size, times or inode differ.
        """
        for name, before in self._seen.items():
            path = self._files[name]
            try:
                now = _status(path)
                same = now == before or sha256(path) == self.hashes[name]
            except OSError as error:
                raise Stopped(
                    f"{path} is gone ({error.strerror}); the source must stay as it is. Put it back"
                ) from error
            if not same:
                raise Stopped(
                    f"{path} has changed since this run began, and its layers must all come from one model. Put back "
                    "what it was"
                )
            self._seen[name] = now


class SourceWatch(FileWatch):
    """The files of a checkpoint as they were when this was made: weights, config and what is copied along."""

    def __init__(self, source: Checkpoint, on_main: OnMain = lambda act: act()):
        names = {"config.json", *source.files, *(path.name for path in copied_companions(source.folder))}
        if (source.folder / INDEX).is_file():
            names.add(INDEX)
        self._weights = ["config.json", *source.files]
        super().__init__({name: source.folder / name for name in sorted(names)}, on_main)

    @property
    def weights(self) -> dict[str, str]:
        """The sha256 of the config and of every weights file, as Checkpoint.hashes gives them."""
        return {name: self.hashes[name] for name in self._weights}


def _status(path: Path) -> tuple[int, ...]:
    """Return what differs after any write, or when another file takes the place."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
