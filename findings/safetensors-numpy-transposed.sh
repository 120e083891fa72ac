#!/usr/bin/env bash
# safetensors 0.8.0: saving a transposed or strided NumPy array writes other numbers, in silence.
#
# Versions: safetensors 0.8.0 (against 0.7.0), numpy 2.4.6
# Expected: save_file({"w": array.T}) stores array.T (0.7.0 does), or raises, as safetensors.torch does for a tensor
#           that is not contiguous.
# Seen:     0.8.0 stores the array's memory as it lies, under the transposed shape:
#             0.7.0: transposed True,  Fortran order True,  every second column True  (read back equal)
#             0.8.0: transposed False, Fortran order False, every second column False
#           No error, no warning. Others have reported it to the developers; 0.8.0 still does it.
# Matters:  turning GPT-2's (in, out) matrices into (out, in), or slicing heads out of a fused one, in NumPy ends in
#           exactly such views: shapes and statistics are right, the matrix is scrambled. np.ascontiguousarray first.
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
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save, save_file

array = np.arange(12, dtype=np.float32).reshape(3, 4)
views = {"transposed": array.T, "Fortran order": np.asfortranarray(array), "every second column": array[:, ::2]}
equal = {}
for name, view in views.items():
    save_file({"w": view}, "file.safetensors")
    by_file, by_bytes = load_file("file.safetensors")["w"], load(save({"w": view}))["w"]
    equal[name] = np.array_equal(by_file, view), np.array_equal(by_bytes, view)
    if by_file.shape != view.shape:
        sys.exit("changed: the shape is not kept")
print(f"safetensors {safetensors.__version__}, read back equal (save_file, save): {equal}")
right = safetensors.__version__ == "0.7.0"
if any(result != (right, right) for result in equal.values()):
    sys.exit("changed: views of arrays are stored otherwise than stated")
save_file({"w": np.ascontiguousarray(array.T)}, "file.safetensors")
if not np.array_equal(load_file("file.safetensors")["w"], array.T):
    sys.exit("changed: a contiguous copy is not stored right either")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
