"""The python of someone who has everything installed that is here, but not qectomy."""

import os
import sys
import venv
from pathlib import Path


def make_stranger(home: Path) -> Path:
    """Make an environment in `home` without qectomy; return its python."""
    venv.create(home / "env", with_pip=False, symlinks=True)
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    for libraries in (places := [home / f"libraries-{place}" for place in range(len(folders))]):
        libraries.mkdir()
    for libraries, folder in zip(places, folders, strict=True):  # in their order: the first of a name wins
        for entry in Path(folder).iterdir():
            if "qectomy" not in entry.name and not entry.name.startswith("__editable__"):
                (libraries / entry.name).symlink_to(entry)
    (site,) = (home / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text("".join(f"{libraries}\n" for libraries in places))
    return home / "env/bin/python"


def strange_environment(home: Path) -> dict[str, str]:
    """The variables of a stranger's process: offline, and nothing of ours."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
