"""`heal` and `convert --heal` on the command line."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from conversions import few_steps, hashes, reload_here
from healings import STEP, options

from qectomy.cli import main
from qectomy.commands.terminal import count
from qectomy.errors import QectomyError
from qectomy.report.page.reading import read_folder
from qectomy.report.page.verdict import judged
from qectomy.runs.run_dir import RunDir

FIT = ["--query", "select", "--tokens", "320", "--context", "32", "--eval-tokens", "160"]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Return a function (arguments…) -> (exit code, stdout, stderr) that runs the command line in this process."""
    few_steps(monkeypatch)
    reload_here(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qectomy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "text, wanted",
    [("65536", 65536), ("500k", 500_000), ("10M", 10**7), ("1.5B", 1_500_000_000), (" 1,000 ", 1000), ("2_000", 2000)]
    + [(16_384, 16_384), ("0.5k", 500)],
)
def test_numbers_of_tokens(text, wanted):
    assert count(text) == wanted


@pytest.mark.parametrize("text", ["", "k", "-5", "0", "ten", "10T", "1e6", "0.0001k", "1.k", "10 M M"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(typer.BadParameter, match="is not a number of tokens; write 65536, 500k, 10M or 1B"):
        count(text)


def test_help_names_every_setting(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = cli("heal", "--help")
    assert code == 0
    for option in (
        "--teacher",
        "--self-generated",
        "--minutes",
        "--hidden-weight",
        "--micro-batch",
        "--resume",
        "--patience",
    ):
        assert option in out


@pytest.mark.parametrize(
    "arguments",
    ["heal reduced --out new", "heal reduced --teacher model", "heal reduced --teacher model --out new --tokens many"]
    + [
        f"heal reduced --teacher model --out new --text raven.txt {x}"
        for x in ("--warmup 2", "--context 3", "--patience -1")
    ],
)
def test_usage_errors_exit_with_2(cli, arguments, tmp_path):
    code, out, err = cli(*shlex.split(arguments))
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "no text to heal on: give --text FILE or --dataset NAME"),
        ("--text raven.txt --self-generated", "takes the place of a text"),
        ("--text nosuch.txt", "no file 'nosuch.txt', and no dataset of that name"),
        ("--text raven.txt --lr 0", "--lr 0.0 must be above 0"),
        ("--text raven.txt --loss mse", "unknown --loss 'mse'; known: kl, ce, mixed"),
        ("--text raven.txt --device abacus", "--device abacus: not usable here"),
    ],
)
def test_what_a_user_can_mend_exits_with_1(cli, arguments, message, pair, raven, tmp_path):
    (tmp_path / "raven.txt").write_text(raven.read_text())
    found = pair()
    given = ["heal", found.reduced, "--teacher", found.original, "--out", "new", *shlex.split(arguments)]
    code, out, err = cli(*given)
    assert (code, out) == (1, "")
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert message in err
    assert not (tmp_path / "new").exists()


def test_a_run_that_must_go_on_never_begins(cli, pair, raven, tmp_path):
    found = pair()
    command = ["heal", found.reduced, "--teacher", found.original, "--out", "new", "--text", raven, "--resume-only"]
    code, _, err = cli(*command)
    assert code == 1
    assert "new.healing holds no run to go on with, and --resume-only begins none (--resume would)" in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_leaves_no_run_behind(cli, pair, tmp_path):
    """Else the command with the right name would be refused as another run."""
    found = pair()
    cli("heal", found.reduced, "--teacher", found.original, "--out", "new", "--text", "nosuch.txt")
    assert not (tmp_path / "new.healing").exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_the_outcome_is_printed(cli, as_json, pair, raven, tmp_path):
    found = pair()
    told = options(raven, tokens=2 * STEP, evaluations=1)
    command = ["heal", found.reduced, "--teacher", found.original, "--out", "new", *told]
    code, out, err = cli(*command, *(["--json"] if as_json else []))
    assert code == 0, err
    report = json.loads((tmp_path / "new/qectomy.json").read_text())
    assert shlex.split(report["healing"]["command"])[:2] == ["qectomy", "heal"]
    if as_json:
        assert json.loads(out) == report
    else:
        perplexity = report["healing"]["perplexity"]
        low, high = perplexity["healed_ratio_95"]
        for number in (f"{perplexity['healed']:.3f}", f"{low:.4f} to {high:.4f}"):
            assert number in out
        found = judged(read_folder(tmp_path / "new"))
        assert out.splitlines()[-2:] == [f"verdict: {found.word}: {found.rule}", "wrote new"]
        assert "wrote new" in out
    assert "healing 2/2 loss" in err


def test_too_few_minutes_are_told_once_before_the_first_step(cli, monkeypatch, pair, raven):
    monkeypatch.setattr("qectomy.healing.budget._speed", lambda *_: (128.0, 0.0))
    found = pair()
    told = options(raven, tokens=10**6, minutes=0.2, validation_tokens=10**5, evaluations=9)
    code, out, err = cli("heal", found.reduced, "--teacher", found.original, "--out", "new", *told)
    assert code == 0, err
    few = (
        r"--minutes 0\.2 gives \d steps on this machine, and a run is better planned with 100: --minutes 3 would give "
    )
    assert len(re.findall("note: " + few, err)) == 1
    assert "--minutes" not in out
    spent = (
        r"note: --minutes 0\.2 at 128 tokens/s: 0 s of timing, \d steps of 128 tokens, \d validations on 192 tokens "
    )
    assert re.search(spent + r".*; plus about \d s for scoring before and after, on 155 tokens", err)
    assert err.index("note: ") < err.index(" loss ")
    report = json.loads(Path("new/qectomy.json").read_text())["healing"]
    assert report["settings"]["evaluations"] == report["budget"]["evaluations"] < 9
    assert len(report["validation"]["curve"]) <= report["budget"]["evaluations"] + 1
    assert report["texts"][0]["validation_tokens"] <= report["budget"]["validation_tokens"] < 10**5


def test_every_option_arrives(cli, monkeypatch, pair):
    seen = []
    monkeypatch.setattr("qectomy.healing.heal.heal", lambda *a, **k: seen.append((a, k)))
    found = pair()
    given = {"train": "attention", "loss": "mixed", "ce_weight": 0.25, "hidden_weight": 0.5, "lr": 0.125}
    given |= {"weight_decay": 0.75, "warmup": 0.375, "clip": 2.0, "batch_tokens": 4000, "micro_batch": 3, "context": 64}
    given |= {"eval_text": "e", "eval_tokens": 2000, "validation_tokens": 3000, "evaluations": 7, "patience": 2}
    given |= {"dtype": "float32", "report_to": "wandb", "seed": 9, "tokens": 5_000_000, "minutes": 1.5}
    given |= {"generated_tokens": 70_000}
    told = [x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    told += ["--text", "a", "--text", "b", "--dataset", "c", "--activation-checkpointing", "--compile", "--resume"]
    assert cli("heal", found.reduced, "--teacher", found.original, "--out", "new", *told)[0] == 0
    (arguments, named), settings = seen[0], seen[0][0][3]
    assert arguments[:2] == (str(found.reduced), str(found.original))
    assert named["resume"] is True
    assert settings.texts == ("a", "b", "c")
    assert settings.compile
    assert settings.activation_checkpointing
    assert {name: getattr(settings, name) for name in given} == given


# convert


def test_convert_and_heal_in_one_go(cli, tiny_checkpoint, raven, tmp_path):
    code, out, err = cli("convert", tiny_checkpoint(), "--out", "new", "--text", raven, *FIT, "--heal", "1k", "--json")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"new"}  # the cache of fonts
    report = json.loads(out)
    assert report == json.loads((tmp_path / "new/qectomy.json").read_text())
    assert report["healing"]["settings"]["tokens"] == 1000
    assert report["healing"]["settings"]["context"] == 32


@pytest.mark.parametrize("heal", [(), ("--heal", "500")])
def test_convert_on_what_the_model_writes(cli, heal, tiny_checkpoint, tmp_path):
    code, out, err = cli("convert", tiny_checkpoint(), "--out", "new", "--self-generated", *FIT, *heal, "--json")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "new"]
    assert ("healing" in json.loads(out)) == bool(heal)
    assert json.loads(out)["calibration"]["texts"][0]["file"] == "text.jsonl"


def test_healing_that_fails_keeps_what_was_fitted_and_says_the_command(
    cli, monkeypatch, tiny_checkpoint, raven, tmp_path
):
    source, module = tiny_checkpoint(), "qectomy.healing.convert_and_heal"

    def fail(*_, **__):
        raise QectomyError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.heal", fail)
        code, _, err = cli("convert", source, "--out", "new", "--text", raven, *FIT, "--heal", "1k")
    assert code == 1
    assert "error: no luck" in err
    assert f"The fitted checkpoint is whole, in {tmp_path / 'new.fitted'}. Go on with it, also with other" in err
    assert [path.name for path in tmp_path.iterdir()] == ["new.fitted"]
    before = hashes(tmp_path / "new.fitted")
    command = shlex.split(err.strip().splitlines()[-1])
    assert command[:2] == ["qectomy", "heal"]
    assert command[-1] == "--resume"
    few = ["--tokens", "256", "--batch-tokens", "128", "--validation-tokens", "64"]
    assert cli(*command[1:], *few)[0] == 0
    assert hashes(tmp_path / "new.fitted") == before


@pytest.mark.parametrize("place", ["heal.open_pair", "trainer.HealTrainer.training_step"])
def test_an_interruption_of_the_healing_names_the_command_that_goes_on(
    cli, place, monkeypatch, tiny_checkpoint, raven, tmp_path
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"qectomy.healing.{place}", interrupt)
        code, _, err = cli("convert", tiny_checkpoint(), "--out", "new", "--text", raven, *FIT, "--heal", "500")
    assert code == 75
    assert "error: interrupted" in err
    assert "to go on: " not in err  # the same command with --resume would not
    command = shlex.split(err.strip().splitlines()[-1])
    assert command[:2] == ["qectomy", "heal"]
    assert cli(*command[1:])[0] == 0
    assert (tmp_path / "new/qectomy.json").is_file()


@pytest.mark.parametrize("name", ["new.fitted", "new.healing"])
def test_what_lies_in_the_way_is_said_before_the_fit(cli, name, monkeypatch, tiny_checkpoint, raven, tmp_path):
    (tmp_path / name).mkdir()
    monkeypatch.setattr("qectomy.healing.convert_and_heal.convert", lambda *_: pytest.fail("fitted"))
    code, _, err = cli("convert", tiny_checkpoint(), "--out", "new", "--text", raven, *FIT, "--heal", "1k")
    assert code == 1
    assert f"{name} " in err


def test_what_the_fit_left_beside_its_output_goes(cli, monkeypatch, tiny_checkpoint, raven, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "remove", lambda self: None)
        assert cli("convert", tiny_checkpoint(), "--out", "new.fitted", "--text", raven, *FIT)[0] == 0
    assert (tmp_path / "new.fitted.converting").is_dir()
    code, _, err = cli("convert", tiny_checkpoint(), "--out", "new", "--text", raven, *FIT, "--heal", "1k")
    assert code == 1
    assert "new.fitted is there from a run before. Go on with it by" in err
    assert [path.name for path in tmp_path.iterdir()] == ["new.fitted"]


@pytest.mark.parametrize(
    "extra, message",
    [
        (
            ["--query", "exact", "--heal", "1k"],
            "--query exact loses nothing: there is nothing to heal; leave --heal out",
        ),
        (["--text", "a", "--self-generated"], "--self-generated takes the place of a text; give one or the other"),
    ],
)
def test_what_does_not_go_together(cli, extra, message, tiny_checkpoint, tmp_path):
    code, _, err = cli("convert", tiny_checkpoint(), "--out", "new", *extra)
    assert code == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_to_go_on_with_says_all_that_convert_did(cli, monkeypatch, tiny_checkpoint, raven):
    from qectomy.healing import convert_and_heal

    def fail(*_, **__):
        raise QectomyError("no luck")

    monkeypatch.setattr(convert_and_heal, "heal", fail)
    told = ["--eval-text", raven, "--heal", "1k", "--seed", "7"]
    _, _, err = cli("convert", tiny_checkpoint(), "--out", "new", "--text", raven, *FIT, *told)
    command = shlex.join(shlex.split(err.strip().splitlines()[-1]))
    for part in (f"--text {raven}", f"--eval-text {raven}", "--tokens 1000", "--context 32", "--seed 7"):
        assert part in command
