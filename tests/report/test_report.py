"""The report and the model card say what was measured, whatever the names they have to carry."""

import json
import os

import pytest
from conversions import convert_tiny

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.record.reduced import Fitted, read_reduced
from qectomy.report.record import model_card, write_report


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, raven, tmp_path_factory):
    """(report, source) of one conversion."""
    source = tiny_checkpoint("llama", num_hidden_layers=3)
    out = tmp_path_factory.mktemp("report") / "out"
    command = "qectomy convert it --out there"
    convert_tiny(source, out, "0-1=key-shared,2=select", raven, command=command)
    return read_reduced(out / "qectomy.json"), open_checkpoint(source)


@pytest.fixture
def report(converted):
    return converted[0].model_copy(deep=True)


def test_the_card_holds_the_numbers_of_the_report(converted, report):
    card = model_card(report, converted[1])
    for value in (
        f"{report.parameters.before:,}",
        f"{report.parameters.after:,}",
        f"{report.bytes.after:,}",
        f"{report.perplexity.before:.3f}",
        f"{report.perplexity.after:.3f} (x {report.perplexity.ratio:.3f}",
        f"{report.kl:.4f} nats",
        "key-shared (2 layers), select (1 layers)",
        "`raven.txt`",
        report.perplexity.protocol.text_sha256[:16],
        "    qectomy convert it --out there\n",
        "trust_remote_code=True",
        "arXiv 2510.23912",
    ):
        assert value in card, value


def test_names_that_are_no_unicode_are_written(converted, report, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    told = report.as_dict() | {"command": f"qectomy convert --text {name}"}
    told["perplexity"]["protocol"]["text"] = name
    report = Fitted.model_validate(told)
    write_report(tmp_path, report, converted[1])
    assert json.loads((tmp_path / "qectomy.json").read_text()) == report.as_dict()
    assert "caf\ufffd.txt" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_report_is_plain_json(converted, tmp_path):
    report, source = converted
    write_report(tmp_path, report, source)
    assert json.loads((tmp_path / "qectomy.json").read_text()) == report.as_dict()
    assert not (source.folder / "qectomy.json").exists()


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_bytes()
    block = bytearray(b"x" * (before // 4 + 150_000_000))
    assert before < peak_memory_bytes() < 40 * before
    del block
