"""Texts as people have them, on the command line: records by any name, the field, and what is said of them."""

import json

import pytest
from test_cli import QUICK, cli  # noqa: F401

ARGUMENTS = ["--tokens", "160", "--context", "32"]


@pytest.fixture
def records(raven, tmp_path):
    """A C4-like file, a record a line, called .json: its text is under `body`, beside another field of text."""
    path = tmp_path / "c4.json"
    lines = [line for line in raven.read_text().splitlines(keepends=True) if line.strip()]
    path.write_text("".join(json.dumps({"title": "raven", "body": line}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("command", ["eval", "verify", "inspect", "convert"])
def test_every_command_reads_records_by_their_field(cli, tiny_checkpoint, records, tmp_path, command):  # noqa: F811
    model = tiny_checkpoint()
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(json.loads(line)["body"] for line in records.read_text().splitlines()))
    first = ["eval", model, *ARGUMENTS]
    if command == "verify":
        assert cli("convert", model, "--query", "exact", "--out", tmp_path / "exact").code == 0

    def run(text, *more):
        out = tmp_path / f"out-{len(more)}"
        arguments = {
            "eval": first,
            "verify": ["verify", tmp_path / "exact", "--against", model, *ARGUMENTS],
            "inspect": ["inspect", model, "--audit", "--no-probe", *ARGUMENTS],
            "convert": ["convert", model, "--out", out, *QUICK],
        }[command]
        return cli(*arguments, "--text", text, *more, "--json")

    refused = run(records)
    assert refused.code == 1
    assert "line 1: several of its fields are texts, and none is called `text`; it has 'title'" in refused.err
    assert "--field NAME" in refused.err
    found, expected = run(records, "--field", "body").json(), run(plain).json()
    numbers = {
        "eval": lambda done: done["results"][0]["perplexity"],
        "verify": lambda done: done["float32"]["logit_error"],
        "inspect": lambda done: [layer["audit"]["rank_99"] for layer in done["layers"]],
        "convert": lambda done: done["perplexity"]["after"],
    }[command]
    assert numbers(found) == numbers(expected)
    if command == "convert":
        read_as = {"kind": "JSON lines", "field": "body"}
        (text,) = found["calibration"]["texts"]
        assert text["read_as"].items() > read_as.items()
        assert found["perplexity"]["protocol"]["text_read_as"] == text["read_as"]
        words = f"{text['read_as']['records']} records (JSON lines), field body"
        assert words in (tmp_path / "out-2/README.md").read_text()
        cli("report", tmp_path / "out-2")
        assert words in (tmp_path / "out-2/report.html").read_text()
    if command == "eval":
        shown = " ".join(cli(*first, "--text", records, "--field", "body").out.split())
        assert "records (JSON lines), field body), " in shown
