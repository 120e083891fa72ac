"""Texts as people have them, on the command line: records by any name, the field, and what is said of them."""

import json
import random

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


@pytest.fixture
def random_words(tmp_path):
    """Return a function (name, seed) -> path of a text of 3,000 words in which nothing comes twice."""

    def make(name, seed):
        dice = random.Random(seed)
        words = ["".join(dice.choices("abcdefghij", k=3)) for _ in range(3000)]
        path = tmp_path / name
        path.write_text("\n".join(" ".join(words[at : at + 10]) for at in range(0, 3000, 10)))
        return path

    return make


def test_a_part_of_the_fitted_text_in_a_file_of_its_own_is_found(cli, tiny_checkpoint, random_words, tmp_path):  # noqa: F811
    """By its content: another file, other line ends."""
    model, whole, other = tiny_checkpoint(), random_words("whole.txt", 0), random_words("other.txt", 1)
    part, out, clear = tmp_path / "part.txt", tmp_path / "out", tmp_path / "clear"
    part.write_bytes(whole.read_bytes()[:3000].replace(b"\n", b"\r\n"))
    options = ["--tokens", "2400", "--context", "32", "--eval-tokens", "1600"]
    said = "100% of the measured text stands in text that was fitted or trained on"
    shown = cli("convert", model, "--out", out, "--text", whole, "--eval-text", part, *options)
    assert said in " ".join(shown.out.split())
    assert said in (out / "README.md").read_text()
    report = json.loads((out / "qectomy.json").read_text())
    assert report["perplexity"]["protocol"]["overlap"]["share"] == 1
    cli("report", out)
    assert said in (out / "report.html").read_text()
    shown = cli("convert", model, "--out", clear, "--text", whole, "--eval-text", other, *options)
    assert "the measured text is none of those fitted or trained on: 0.0% of" in " ".join(shown.out.split())
    for text, words in ((part, said[5:]), (other, "is none of those fitted or trained on")):
        shown = " ".join(cli("eval", model, clear, "--text", text, "--context", "32").out.split())
        assert words in shown
        assert f"{model}: " not in shown  # an original was not fitted on anything here
    report.pop("fitted_spans")
    (clear / "qectomy.json").write_text(json.dumps(report))  # as an older version wrote it
    shown = " ".join(cli("eval", clear, "--text", other, "--context", "32").out.split())
    assert "is not known: what was fitted or trained on is not recorded by its content" in shown


def test_the_same_file_twice_is_said_on_the_terminal_and_in_the_card(cli, tiny_checkpoint, random_words, tmp_path):  # noqa: F811
    whole = random_words("whole.txt", 0)
    shown = cli("convert", tiny_checkpoint(), "--out", tmp_path / "out", "--text", whole, *QUICK)
    said = "he measured tokens are another part of a text that was fitted on: other text will cost more"
    assert said in " ".join(shown.out.split())
    assert said in (tmp_path / "out/README.md").read_text()
