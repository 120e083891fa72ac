"""Texts as people have them, on the command line: records by any name, the field, and what is said of them."""

import json
import random
import re
import subprocess
import sys

import pytest
from test_cli import QUICK, cli  # noqa: F401

from qectomy.text.documents import Documents, check_texts

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
    saved = tmp_path / "out/evaluation.json"
    measured = ["--text", whole, "--context", "32", "--tokens", "160", "--save", saved]
    shown = cli("eval", tiny_checkpoint(), tmp_path / "out", *measured)
    assert said in " ".join(shown.out.split())
    cli("report", tmp_path / "out")
    html = (tmp_path / "out/report.html").read_text()
    assert html.count(said) >= 3  # the verdict, the report's own measurement and this one
    assert "is none of those fitted" not in html


# Mistyped, empty and short


@pytest.fixture
def offline(monkeypatch):
    """Refuse to ask the hub."""
    refuse = lambda *_, **__: pytest.fail("the hub was asked")  # noqa: E731
    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "calib.tx",
            r"no file 'calib.tx'; did you mean calib.txt\? \(a dataset of that name on the hub: calib",
        ),
        ("calib.text", r"did you mean calib.txt\?"),
        ("texts/calip.json", r"no file 'texts/calip.json', and no dataset .*; did you mean texts/calib.json\?"),
        ("texts/calip", r"did you mean texts/calib\?"),
        ("./other", r"no file './other', and its slashes are those of a path"),
        ("a/b/c", r"no file 'a/b/c', and its slashes"),
        ("gone.gz", r"no file 'gone.gz', and no dataset of that name could be read: its ending is a file's$"),
        ("empty.txt", r"empty.txt holds no text"),
        ("short.txt", r"short.txt has 5 bytes of text, fewer than one window of (16|32) tokens; give more"),
        ("empty.json", r"empty.json holds no text"),
    ],
)
def test_a_text_that_is_not_there_or_too_short_is_found_at_once(cli, tmp_path, monkeypatch, offline, name, message):  # noqa: F811
    """Before the model is looked for, which is not there either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for there in ("calib.txt", "texts/calib.json", "texts/calib"):
        (tmp_path / there).write_text("a text that is long enough to fill a window of tokens")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("short\n")
    (tmp_path / "empty.json").write_text("[]")
    for command in (
        ["convert", "model", "--out", "out", "--text", name],
        ["convert", "model", "--out", "out", "--text", "calib.txt", "--eval-text", name],
        ["heal", "model", "--teacher", "model", "--out", "out", "--text", name],
        ["eval", "model", "--context", "32", "--text", name],
        ["verify", "model", "--against", "model", "--context", "32", "--text", name],
    ):
        done = cli(*command)
        assert done.code == 1
        assert re.search(message, done.err.strip()), done.err
        assert len(done.err.splitlines()) == 1


def test_chats_that_are_too_few_are_counted_as_the_model_writes_them(cli, tiny_copy, tmp_path, offline):  # noqa: F811
    """Their bare words may be fewer than the tokens of a window, and the chats as the template writes them are not."""
    model, path = tiny_copy(), tmp_path / "chats.jsonl"
    template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end of the turn|>\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    assert cli("eval", model, "--text", path, "--context", "16").code == 0
    done = cli("eval", model, "--text", path, "--context", "64")
    assert done.code == 1
    assert re.search(r"chats.jsonl has \d+ tokens, fewer than one window of 64; give more text or a sma", done.err)


def test_a_mistyped_text_is_found_before_torch_is_loaded(tmp_path):
    (tmp_path / "calib.txt").write_text("text")
    script = (
        "import sys; sys.argv = ['qectomy', 'convert', 'model', '--out', 'out', '--text', 'calib.tx']\n"
        "from qectomy.cli import main\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "did you mean calib.txt?" in done.stderr
    assert done.stdout == "set()\n"


def test_a_mistyped_model_is_found_at_once(cli, tiny_copy, raven, tmp_path, monkeypatch, offline):  # noqa: F811
    tiny_copy().rename(tmp_path / "smol")
    (tmp_path / "smolls").mkdir()  # which is no model
    monkeypatch.chdir(tmp_path)
    for name, near in (("smoll", "smol"), (f"{tmp_path}/smoll", f"{tmp_path}/smol")):
        for command in (["convert", name, "--out", "out", "--text", raven], ["eval", name, "--text", raven]):
            done = cli(*command)
            assert done.code == 1
            assert f"no folder {name}; did you mean {near}? A model of the hub: its full id, OWNER/NAME" in done.err


def test_the_hub_is_still_asked_for_what_is_like_nothing_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calib.txt").write_text("text")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "from the hub"}])
    for name in ("wikitext", "some/data", "calib.tx::train", "calib:config"):
        check_texts([name], None, 16)
        assert list(Documents(name)) == ["from the hub"]
