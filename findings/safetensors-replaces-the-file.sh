#!/usr/bin/env bash
# safetensors 0.8.0: save_file replaces the file: mode 0600 for everybody else, links to it keep the old weights.
#
# Versions: safetensors 0.8.0 (against 0.7.0), numpy 2.4.6; umask 022
# Expected: as any file written anew: mode 644 under umask 022; an existing file keeps its mode, a symbolic link goes
#           on pointing at the file that was written. So it is in 0.7.0.
# Seen:     in 0.8.0 the path becomes a new file of mode 600, whatever was there:
#             0.7.0: new file 644, over a 664 file 664, link kept: True,  its target has the new weights: True
#             0.8.0: new file 600, over a 664 file 600, link kept: False, its target has the new weights: False
#           transformers' save_pretrained writes through it, so model.safetensors is 600 beside a config.json of 644.
# Matters:  a checkpoint copied with its modes is unreadable for the server's user or for the group. Saving "through" a
#           link into a shared store leaves the store untouched. chmod, and resolve links, in the tool that saves.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile safetensors==0.8.0 numpy==2.4.6
"$env/bin/pip" install -qq --no-compile --no-deps --target older safetensors==0.7.0

cat > probe.py <<'PY'
import os
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

os.umask(0o022)
version = safetensors.__version__
os.mkdir(version)
os.chdir(version)


def mode(path):
    return f"{os.stat(path).st_mode & 0o777:o}"


old, new = {"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}
save_file(old, "new.safetensors")
save_file(old, "shared.safetensors")
os.chmod("shared.safetensors", 0o664)
save_file(new, "shared.safetensors")
save_file(old, "target.safetensors")
os.symlink("target.safetensors", "link.safetensors")
save_file(new, "link.safetensors")
seen = (
    mode("new.safetensors"),
    mode("shared.safetensors"),
    os.path.islink("link.safetensors"),
    np.array_equal(load_file("target.safetensors")["w"], new["w"]),
)
print(f"safetensors {version}: new file, over a 664 file, link kept, its target new: {seen}")
if seen != (("644", "664", True, True) if version == "0.7.0" else ("600", "600", False, False)):
    sys.exit("changed: modes or links fare otherwise than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
