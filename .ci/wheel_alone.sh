#!/usr/bin/env bash
# The wheel as a user installs it, without extras: every module imports, and every kind of command runs once.
# The tests' environment holds the extras too, so an import of one of them goes unnoticed there.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$work/cache"
model=$PWD/samples/gpt2 train=$PWD/samples/kjv_train.txt heldout=$PWD/samples/kjv_heldout.txt

"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/python -m pip --quiet --disable-pip-version-check"
XDG_CACHE_HOME= $pip wheel --no-deps -w "$work" .
XDG_CACHE_HOME= $pip install -c constraints.txt "$work"/qectomy-*.whl
echo "installed ($SECONDS s)"

cd "$work" # where no source of the package lies
"$work/venv/bin/python" - <<'PYTHON'
import importlib
import importlib.util
import pkgutil

import qectomy

# What only the test extra and other engines bring.
for name in ("beartype", "hypothesis", "pytest"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed, so this environment proves nothing"
elsewhere = {"qectomy.serving.vllm_models", "qectomy.modeling.mlx_qectomy_llama", "qectomy.__main__"}
names = {found.name for found in pkgutil.walk_packages(qectomy.__path__, "qectomy.")}
assert elsewhere <= names and len(names) > 100, len(names)
for name in sorted(names - elsewhere):
    importlib.import_module(name)
print(f"{len(names - elsewhere)} modules import")
PYTHON

run() {
  echo "-- qectomy $*"
  "$work/venv/bin/qectomy" "$@" >"$work/stdout" 2>"$work/stderr" || { cat "$work/stdout" "$work/stderr"; exit 1; }
}
text=(--text "$train" --tokens 1024 --context 64 --eval-text "$heldout" --eval-tokens 512)
run inspect "$model" --no-probe
run convert "$model" --out planned --query key-shared "${text[@]}" --dry-run --no-probe
run convert "$model" --out reduced --query 0=key-shared,1-=dense "${text[@]}"
run convert "$model" --out exact --query exact
run verify exact --against "$model" --text "$heldout" --tokens 256
run heal reduced --teacher "$model" --out healed "${text[@]}" --batch-tokens 256 --validation-tokens 256 --evaluations 1
run heal reduced --teacher "$model" --out written --self-generated --generated-tokens 1024 --context 32 --tokens 512 \
  --batch-tokens 256 --eval-text "$heldout" --eval-tokens 256 --validation-tokens 256 --evaluations 1
run eval "$model" reduced --text "$heldout" --context 64 --tokens 512 --save reduced/evaluation.json
run materialize reduced --out stock
run report reduced healed --out comparison.html
echo "every command ran ($SECONDS s)"
