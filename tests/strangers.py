"""The python of someone who has everything installed that is here, but not qectomy."""

import os
import sys
import venv
from pathlib import Path


def make_stranger(home: Path) -> Path:
    """Make an environment in `home` without qectomy; return its python."""
    venv.create(home / "env", with_pip=False, symlinks=True)
    libraries = home / "libraries"
    libraries.mkdir()
    for folder in [path for path in sys.path if Path(path).name == "site-packages"]:  # the first of a name wins
        for entry in Path(folder).iterdir():
            ours = "qectomy" in entry.name or entry.name.startswith("__editable__")
            if not ours and not (libraries / entry.name).exists():
                (libraries / entry.name).symlink_to(entry)
    (site,) = (home / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
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
