"""The card's own lines load the checkpoint for someone who has not installed qectomy, and ask nothing."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conversions import convert_tiny, reload_here
from strangers import make_stranger, strange_environment
from tiny_models import load_reduced

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings

BEFORE, AFTER = (
    """
import sys
loaded = [*sys.modules]
""",
    """
import json
ids = tokenizer("Nevermore, quoth the raven", return_tensors="pt").input_ids
found = {"ids": ids.tolist(), "logits": model(ids).logits.tolist(), "loaded": loaded, "modules": [*sys.modules]}
with open("found.json", "w") as file:
    json.dump(found, file)
""",
)
KINDS = {"gpt2-exact": "gpt2", "llama-key-shared": "llama", "mistral-select": "mistral"}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return make_stranger(tmp_path_factory.mktemp("stranger"))


def converted(source, kind, raven, out):
    """Convert as `kind` says; the conversion writes the card."""
    if kind.endswith("exact"):
        with pytest.MonkeyPatch.context() as patch:
            reload_here(patch)
            convert_exact(open_checkpoint(source), out, ConvertSettings())
    else:
        convert_tiny(source, out, kind.partition("-")[2], raven)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_the_card_load_it_and_ask_nothing(kind, stranger, tiny_checkpoint, raven, tmp_path):
    folder = converted(tiny_checkpoint(KINDS[kind]), kind, raven, tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet.count('"PATH"') == 2
    *rest, model, tokenizer = snippet.replace('"PATH"', repr(str(folder))).splitlines()
    script = "\n".join([*rest, tokenizer, BEFORE, model, AFTER])  # the tokenizer first, to see what it loads
    run = shlex.join([str(stranger), "-c", script]) + " <&-"  # no stdin at all: who is asked there hears nothing
    done = subprocess.run(
        run, shell=True, env=strange_environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "qectomy" not in found["modules"]
    code = [{name for name in found[when] if "modeling_qectomy" in name} for when in ("loaded", "modules")]
    assert not code[0]
    assert code[1]
    with torch.no_grad():
        logits = load_reduced(folder)(torch.tensor(found["ids"])).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-4, atol=1e-4)


def test_where_a_text_loads_a_tokenizer_it_lets_no_code_be_run():
    root = Path(__file__).parents[2]
    texts = [
        path.read_text(encoding="utf-8") for folder in (".", "docs", "samples") for path in (root / folder).glob("*.md")
    ]
    calls = [call for text in texts for call in re.findall(r"AutoTokenizer\.from_pretrained\(.*", text)]
    assert calls
    assert [call for call in calls if "trust_remote_code=False" not in call] == []
