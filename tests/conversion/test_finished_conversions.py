"""Conversions stopped when their output was in its place: `--resume` says so, of the run that made it alone."""

import pytest
from conversions import convert_tiny, reload_here

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError
from qectomy.runs.run_dir import RunDir


def exact(source, out, text, resume=False):
    settings = ConvertSettings(eval_text=str(text), eval_tokens=160, context=32)
    return convert_exact(open_checkpoint(source), out, settings, resume=resume)


def fitted(source, out, text, resume=False):
    return convert_tiny(source, out, "select", text, resume=resume)


@pytest.mark.parametrize("run", [exact, fitted])
def test_a_finished_output_is_not_that_of_other_settings(run, tiny_checkpoint, raven, tmp_path, monkeypatch):
    reload_here(monkeypatch)
    source, out, other = tiny_checkpoint(), tmp_path / "out", tmp_path / "other.txt"
    other.write_text(raven.read_text().lower())
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "remove", lambda self: None)
        report = run(source, out, raven)
    with pytest.raises(QectomyError, match=r"out is whole, and another run made it: .*text.* was .*, is other.txt"):
        run(source, out, other, resume=True)
    assert run(source, out, raven, resume=True) == report
    assert not (tmp_path / "out.converting").exists()
