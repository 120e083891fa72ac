"""Which checkpoint a result belongs to, by its files and not by its folder's name."""

import hashlib
from pathlib import Path

ENDS = 1 << 20  # bytes at either end of a weights file: the header, and numbers of many layers' last tensor


def fingerprint(folder: Path) -> str:
    """Return a hash of a checkpoint's config, and of the size, beginning and end of each weights file.

    Enough to tell one checkpoint from another in no time; it is no proof that not a number was changed: `verify` is.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()[:32]
