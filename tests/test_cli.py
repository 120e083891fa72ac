"""The command line as people use it: exit codes, streams, JSON, and that its own examples work."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import typer
from conversions import few_steps, hashes, reload_here
from nanogpt_checkpoints import made
from transformers import AutoModelForCausalLM

from qectomy import __version__
from qectomy.cli import app, main
from qectomy.errors import CheckpointError, NonFiniteError, Stopped, Untrusted
from qectomy.eval.fresh_start import FreshStart
from qectomy.report.page.reading import read_folder
from qectomy.report.page.verdict import judged

QUICK = ["--tokens", "320", "--context", "32", "--eval-tokens", "160"]
COMMANDS = typer.main.get_command(app).commands


@dataclass
class Done:
    code: int
    out: str
    err: str

    def json(self):
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Return a function (arguments…) -> Done that runs the command line in this process."""
    few_steps(monkeypatch)
    reload_here(monkeypatch)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qectomy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Done(stop.value.code or 0, *capsys.readouterr())

    return run


def example(name):
    found = re.fullmatch(r"Example: `(qectomy .*)`", COMMANDS[name].epilog)
    return shlex.split(found[1])[1:]


# The environment


@pytest.mark.parametrize(("said", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(cli, monkeypatch, said, used):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if said:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    assert cli("--version").code == 0
    assert os.environ["OMP_WAIT_POLICY"] == used


def test_the_policy_is_there_before_torch_is():
    """libgomp reads it when torch loads it, and never again."""
    script = "import sys, qectomy.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_parses(cli, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    done = cli(name, "--help")
    assert done.code == 0
    arguments = example(name)
    assert arguments[0] == name
    assert shlex.join(["qectomy", *arguments]) in done.out
    assert COMMANDS[name].make_context(name, arguments[1:]).params
    for option in ("--json", "--help"):
        assert option in done.out


def test_the_examples_work_one_after_the_other(cli, tiny_checkpoint, raven, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "original"):
        shutil.copytree(tiny_checkpoint(), tmp_path / name)
    (tmp_path / "calibration.txt").write_text(raven.read_text())
    (tmp_path / "heldout.txt").write_text(raven.read_text().upper())
    made().save(tmp_path / "ckpt.pt")
    shutil.copytree(tiny_checkpoint(), tmp_path / "gpt2-tokenizer")
    assert cli("convert", "original", "--out", "exact", "--query", "exact").code == 0
    (tmp_path / "mine.txt").write_text(raven.read_text())
    monkeypatch.setattr("qectomy.healing.budget._speed", lambda *_: (20.0, 0.0))  # 10 minutes: few steps
    start = FreshStart(load_seconds=1.0, peak_memory_bytes=1)  # fourteen fresh processes would take a minute
    monkeypatch.setattr("qectomy.eval.inference_cost.fresh_start", lambda *_, **__: start)
    for name in sorted(COMMANDS, key=lambda name: name != "convert"):  # the others read what it wrote
        done = cli(*example(name))
        assert done.code == 0, done.err
        assert done.out.strip()
    assert (tmp_path / "reduced/qectomy.json").is_file()
    assert (tmp_path / "stock/config.json").is_file()
    assert (tmp_path / "gpt2/model.safetensors").is_file()


def test_version_and_bare_command(cli):
    assert cli("--version").out == f"qectomy {__version__}\n"
    bare = cli()
    assert bare.code == 2
    assert all(name in bare.out + bare.err for name in COMMANDS)


NEEDS = {
    "peak_memory_bytes",
    "peak_memory_stage",
    "memory_stages",
    "disk_bytes",
    "seconds",
    "stages",
    "probe_seconds",
}


def test_nothing_heavy_is_imported_where_it_is_not_needed(tiny_checkpoint):
    script = """
import sys
CHECKPOINT = sys.argv[1]
def light(what, *heavy):
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, f"{what} loads {loaded}"
import qectomy
light("import qectomy", "torch", "transformers", "numpy", "rich")
from qectomy.cli import main
for arguments in (
    ["--help"],
    ["convert", "--help"],
    ["inspect", CHECKPOINT, "--no-probe"],
    ["convert", CHECKPOINT, "--out", "no-such-folder", "--dry-run", "--no-probe"],
):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    light(arguments, "torch", "transformers", *(["numpy", "safetensors"] if "--help" in arguments else []))
print("all light", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_checkpoint())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all light" in done.stderr


# Exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuchcommand"],
        ["inspect"],
        ["inspect", "folder", "--nosuchoption"],
        ["inspect", "folder", "--tokens", "0"],
        ["inspect", "folder", "--text", "text"],
        ["convert", "folder"],
        ["convert", "folder", "--out", "out", "--context", "3"],
        ["convert", "folder", "--out", "out", "--tokens", "many"],
        ["eval", "folder"],
        ["eval", "folder", "--text", "text", "--stride", "0"],
        ["materialize", "folder"],
    ],
    ids=shlex.join,
)
def test_usage_errors_exit_with_2(cli, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("inspect no/such/folder", r"no folder no/such/folder"),
        ("inspect nosuchfolder", r"no folder nosuchfolder, and the hub did not give 'nosuchfolder'"),
        ("inspect raven.txt", r"raven.txt is a file; give the folder"),
        ("inspect reduced", r"already reduced"),
        ("inspect model --audit --text nosuch.txt", r"no file 'nosuch.txt'"),
        ("inspect model --audit --text raven.txt --tokens 31 --context 32", r"--tokens 31 is fewer than one window"),
        ("inspect gpt2 --audit --text raven.txt --context 129", r"longer than the model's 128 positions; use 128"),
        ("convert model --out there --text raven.txt", r"there exists; nothing is overwritten"),
        ("convert model --out new --query selekt", r"unknown query map 'selekt'; known: .* Did you mean 'select'\?"),
        ("convert model --out new --query 0=select", r"says nothing of layer\(s\) 1 of 2; to leave .* add ,1=dense$"),
        ("convert model --out new --query low-rank:99", r"query map low-rank:99 stores"),
        ("convert model --out new --text raven.txt --dtype int8", r"unknown --dtype 'int8'; known: float32"),
        ("convert model --out new --text raven.txt --device abacus", r"--device abacus: not usable here"),
        ("convert model --out new --dry-run --dtype int8", r"unknown --dtype 'int8'"),
        ("convert model --out new", r"no calibration text"),
        ("convert model --out new --no-refit --heal 1M", r"--heal trains every weight.*qectomy heal --train query-key"),
        ("convert gpt2 --out new --no-refit --query exact", r"--query exact fits nothing.*leave --no-refit out"),
        ("convert model --out new --no-refit --query identity --dry-run", r"identity in a llama turns the whole"),
        ("convert model --out new --text nosuch.txt", r"no file 'nosuch.txt', and no dataset of that name"),
        ("convert model --out new --text there", r"there is a folder"),
        ("convert reduced --out new --text raven.txt", r"already reduced"),
        ("eval model --text raven.txt --device abacus", r"--device abacus: not usable here"),
        ("eval model --text raven.txt --device cuda:7", r"--device cuda:7: not usable here"),
        ("eval model --text raven.txt --dtype int8", r"unknown --dtype 'int8'; known: float32"),
        ("eval model nosuchfolder --text raven.txt --context 32", r"no folder nosuchfolder"),
        ("eval model --text raven.txt --reference nosuchfolder", r"no folder nosuchfolder"),
        ("eval model --text raven.txt --context 32 --stride 33", r"--stride 33 must lie between"),
        ("eval model --text raven.txt --context 99999", r"fewer than one window of 99999"),
        ("materialize model --out new", r"model_type 'llama' is not a checkpoint that qectomy reduced"),
        ("materialize reduced --out there", r"there exists"),
        ("materialize nosuchfolder --out new", r"no folder nosuchfolder"),
        ("import-nanogpt nosuch.pt --out new", r"no file nosuch.pt"),
        ("import-nanogpt raven.txt --out new", r"raven.txt is not a checkpoint of tensors and plain containers"),
        ("import-nanogpt raven.txt --out there", r"there exists"),
        ("import-nanogpt raven.txt --out new --tokenizer nosuchfolder", r"no folder nosuchfolder"),
        ("import-nanogpt raven.txt --out new --tokenizer there", r"there holds no tokenizer that can be loaded"),
        ("convert gpt2 --out new --text raven.txt --context 129", r"longer than the model's 128 positions; use 128"),
        ("convert gpt2 --out new --dry-run --context 129", r"longer than the model's 128 positions"),
        ("eval gpt2 --text raven.txt --context 129", r"longer than the 128 positions of gpt2; use 128 or less"),
    ],
)
def test_what_a_user_can_mend_exits_with_1(
    cli, arguments, message, tiny_checkpoint, tiny_reduced, raven, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_checkpoint())
    (tmp_path / "gpt2").symlink_to(tiny_checkpoint("gpt2"))
    (tmp_path / "reduced").symlink_to(tiny_reduced(("select", "key-shared")))
    (tmp_path / "raven.txt").write_text(raven.read_text())
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    done = cli(*shlex.split(arguments))
    assert done.code == 1
    assert done.out == ""
    *progress, error = done.err.strip().splitlines()
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert all(line.startswith("evaluating model ") for line in progress)
    assert sorted(tmp_path.iterdir()) == before


# Results


def test_json_is_the_report_and_the_command_repeats_it(cli, tiny_checkpoint, raven, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["convert", tiny_checkpoint(), "--query", "0=select,1=key-shared", "--text", raven, *QUICK, "--json"]
    done = cli(*command, "--out", "out it is", "--seed", 7)
    report = done.json()
    assert report == json.loads((tmp_path / "out it is/qectomy.json").read_text())
    assert report["calibration"]["seed"] == 7
    assert re.findall(r"^converting (\d)/2 attention KL", done.err, re.MULTILINE) == ["1", "2"]
    again = shlex.split(report["command"])
    assert again[0] == "qectomy"
    again[again.index("--out") + 1] = "again"
    assert cli(*again[1:]).json()["perplexity"] == report["perplexity"]
    first, second = (hashes(tmp_path / name) for name in ("out it is", "again"))
    assert first["model.safetensors"] == second["model.safetensors"]


def test_a_dry_run_writes_nothing_and_foretells_the_sizes(cli, tiny_checkpoint, raven, tmp_path):
    command = ["convert", tiny_checkpoint("bf16"), "--query", "0=dense,1=select", "--text", raven, *QUICK]
    command += ["--out", tmp_path / "out", "--dtype", "float32"]
    done = cli(*command, "--dry-run", "--json")
    plan = done.json()
    assert "fitting a little of the first layer, to tell the time; --no-probe leaves it out" in done.err
    assert "dry run: nothing was written" in cli(*command, "--dry-run", "--no-probe").out
    assert list(tmp_path.iterdir()) == []
    assert plan["plan"] == ["dense", "select"]
    assert plan["needs"].keys() == NEEDS
    assert plan["needs"]["seconds"] == pytest.approx(sum(plan["needs"]["stages"].values()), abs=0.2)
    report = cli(*command, "--json").json()
    assert plan["parameters"] == report["parameters"]
    assert plan["bytes"] == report["bytes"]
    assert plan["needs"]["stages"].keys() - report["seconds"].keys() == {"start", "page"}


def test_without_a_probe_there_is_no_time(cli, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint()
    done = cli("inspect", model, "--no-probe", "--json")
    assert "fitting" not in done.err
    needs = done.json()["needs"]
    assert needs.keys() == NEEDS | {"tokens", "eval_tokens", "context"}
    assert needs["seconds"] is needs["stages"] is needs["probe_seconds"] is None
    assert needs["peak_memory_bytes"] == max(needs["memory_stages"].values())
    plan = cli("convert", model, "--out", tmp_path / "out", "--dry-run", "--no-probe", "--json").json()["needs"]
    assert plan == {name: value for name, value in needs.items() if name in NEEDS}


def test_a_dry_run_notes_what_the_conversion_will_want(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["convert", tiny_checkpoint("gpt2"), "--out", out, "--dry-run", "--no-probe"]
    assert "no --text yet" in cli(*command).err
    (tmp_path / "out.converting").mkdir()
    told = cli(*command, "--text", "nowhere.txt").err
    assert "nowhere.txt is no file here" in told
    assert "the conversion will want --resume, --clean or another --out" in told
    assert "note" not in cli(*command, "--text", __file__, "--clean").err


def test_a_dry_run_of_exact_folding_foretells_memory_and_disk(cli, tiny_checkpoint, tmp_path):
    command = ["convert", tiny_checkpoint("gpt2"), "--out", tmp_path / "out", "--query", "exact"]
    plan = cli(*command, "--dry-run", "--json").json()
    assert plan["needs"]["peak_memory_bytes"] > 400_000_000
    assert plan["needs"]["disk_bytes"] > plan["bytes"]["after"]
    assert "an exact conversion here needs about" in cli(*command, "--dry-run").out


def test_inspect_says_what_each_map_removes(cli, tiny_checkpoint):
    result = cli("inspect", tiny_checkpoint("sharded"), "--no-probe", "--json").json()
    assert result["family"] == "llama"
    assert len(result["files"]) > 1
    rows = {row["map"]: row for row in result["query_maps"]}
    assert rows["identity"]["removed_parameters"] == 2 * 32 * 32
    assert rows["select"]["removed_parameters"] == 2 * (32 * 32 - 2 * 32)
    assert rows["key-shared"]["removed_parameters"] == 2 * (32 * 32 - 4 * 8 * 8)
    assert not rows["low-rank:64"]["possible"]
    assert [layer["how"] for layer in result["layers"]] == ["least squares", "least squares"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_audit_adds_numbers_of_each_layer(cli, name, tiny_checkpoint, raven):
    plain = ["inspect", tiny_checkpoint(name), "--no-probe", "--tokens", 320, "--context", 32]
    without, white = cli(*plain, "--json").json(), cli(*plain, "--audit", "--json").json()
    done = cli(*plain, "--audit", "--text", raven, "--json")
    assert re.findall(r"^auditing (\d)/2", done.err, re.MULTILINE) == ["1", "2"]
    audits = [layer.pop("audit") for layer in done.json()["layers"]]
    assert [layer.pop("audit")["rank_99_data"] for layer in white["layers"]] == ["white states"] * 2
    for audited, bare in zip(white["layers"], without["layers"], strict=True):  # now the weights were looked at
        assert audited == {**bare, "reason": f"{bare['reason']}, and W_Q is not one"}
    for audit in audits:
        assert audit["rank_99_data"] == "raven.txt, 320 tokens"
        assert audit["cond"] > 1
        assert audit["distance_from_orthogonal"] > 0.1
        assert 0 < audit["rank_99"] <= audit["d_model"] == 32


def test_the_shown_audit_says_what_it_measured_on(cli, tiny_checkpoint, raven):
    plain = ["inspect", tiny_checkpoint(), "--no-probe", "--tokens", 320, "--context", 32]
    words = lambda *options: " ".join(cli(*plain, *options).out.split())  # noqa: E731
    assert "cond(W_Q)" not in words()
    assert "under white states" in words("--audit")
    assert "under the text's data (raven.txt, 320 tokens)" in words("--audit", "--text", raven)


def test_a_text_needs_an_audit_to_read_it(cli, raven):
    done = cli("inspect", "folder", "--text", raven)
    assert done.code == 2
    assert "add --audit" in done.err


def test_several_checkpoints_and_the_materialised_one(cli, tiny_checkpoint, raven, tmp_path):
    original, reduced, stock = tiny_checkpoint("tied"), tmp_path / "[/reduced]", tmp_path / "stock"
    command = ["convert", original, "--out", reduced, "--query", "identity", "--text", raven, *QUICK, "--json"]
    report = cli(*command).json()
    written = cli("materialize", reduced, "--out", stock, "--json").json()
    assert written["model_type"] == "llama"
    assert written["parameters"] == {
        key: report["parameters"][other] for key, other in (("before", "after"), ("after", "before"))
    }
    assert AutoModelForCausalLM.from_pretrained(stock).config.model_type == "llama"
    command = ["eval", original, reduced, stock, "--text", raven, "--context", 32, "--tokens", 160]
    results = cli(*command, "--reference", original, "--json").json()["results"]
    assert [result["checkpoint"] for result in results] == [str(name) for name in (original, reduced, stock)]
    assert results[0]["perplexity"] == pytest.approx(report["perplexity"]["before"], rel=1e-4)
    assert results[1]["perplexity"] == pytest.approx(report["perplexity"]["after"], rel=1e-4)
    assert results[2]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=1e-5)
    assert results[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert results[2]["kl"] == pytest.approx(results[1]["kl"], rel=1e-3)
    assert len({json.dumps(result["protocol"]) for result in results}) == 1
    shown = cli(*command)
    assert shown.code == 0
    assert "[/reduced]" in shown.err  # progress: no part of a name is taken as markup


def test_what_an_engine_drops_of_a_materialised_config_is_printed(cli, tiny_reduced, tmp_path):
    plain, relu = tiny_reduced(("select", "dense"), "gpt2"), tmp_path / "relu"
    shutil.copytree(plain, relu)
    config = json.loads((relu / "config.json").read_text())
    (relu / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    shown = " ".join(cli("materialize", relu, "--out", tmp_path / "stock").out.split())
    assert "warning: llama.cpp computes GELU whatever the activation is" in shown
    assert "activation_function relu); measured: mean KL 0.69 nats" in shown
    written = cli("materialize", relu, "--out", tmp_path / "json", "--json").json()
    assert [(one["engine"], one["value"]) for one in written["warnings"]] == [("llama.cpp", "relu")]
    assert "warning" not in cli("materialize", plain, "--out", tmp_path / "plain").out


def test_text_output_of_a_conversion(cli, tiny_checkpoint, raven, tmp_path):
    done = cli("convert", tiny_checkpoint(), "--out", tmp_path / "out", "--query", "select", "--text", raven, *QUICK)
    assert done.code == 0
    report = json.loads((tmp_path / "out/qectomy.json").read_text())
    assert f"perplexity {report['perplexity']['before']:.3f} -> " in done.out
    assert "perplexity" not in done.err
    assert re.search(
        r"moved, ‖W' - W‖ / ‖W‖: select: W_K [\d.]+ to [\d.]+ %, W_V 0 %, W_O ", " ".join(done.out.split())
    )
    found = judged(read_folder(tmp_path / "out"))
    assert done.out.splitlines()[-2:] == [f"verdict: {found.word}: {found.rule}", f"wrote {tmp_path / 'out'}"]
    exact = cli("convert", tiny_checkpoint(), "--out", tmp_path / "exact", "--query", "exact").out.splitlines()
    assert exact[-2:] == ["verdict: Lossless: made with --query exact", f"wrote {tmp_path / 'exact'}"]


@pytest.mark.parametrize("query", ["select", "exact"])
def test_a_conversion_that_is_done_says_so(cli, query, tiny_checkpoint, raven, tmp_path):
    command = ["convert", tiny_checkpoint("gpt2"), "--out", tmp_path / "out", "--query", query, "--text", raven, *QUICK]
    report = cli(*command, "--json").json()
    before = hashes(tmp_path / "out")
    again = cli(*command, "--resume", "--json")
    assert again.json() == report
    assert f"note: {tmp_path / 'out'} is whole, and this run made it: there was nothing left to do" in again.err
    assert cli(*command, "--resume-only", "--json").json() == report
    other = cli(*command, "--eval-tokens", 128, "--resume")
    assert other.code == 1
    assert "out is whole, and another run made it: eval tokens was 160, is 128." in other.err
    assert "out exists; nothing is overwritten" in cli(*command).err
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_windows_are_no_longer_than_the_model_was_made_for(cli, name, tiny_checkpoint, raven, tmp_path):
    """512 tokens where nothing is said, or the model's own number of positions: 128 here."""
    model = tiny_checkpoint(name)
    tokens = ["--tokens", 256, "--eval-tokens", 128]
    report = cli(
        "convert", model, "--out", tmp_path / "out", "--query", "select", "--text", raven, *tokens, "--json"
    ).json()
    assert report["calibration"]["context"] == 128
    found = cli("eval", model, tmp_path / "out", "--text", raven, "--tokens", 128, "--json").json()["results"]
    assert [row["protocol"]["context"] for row in found] == [128, 128]
    assert cli("inspect", model, "--no-probe", "--json").json()["needs"]["context"] == 128
    if name == "llama":  # RoPE goes on beyond
        found = cli("eval", model, "--text", raven, "--tokens", 160, "--context", 160, "--json").json()["results"]
        assert found[0]["protocol"]["context"] == 160


# Runs that were stopped

LEFT = "out.converting holds what was done: go on with --resume, or start anew with --clean."


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place, arguments",
    [
        ("qectomy.conversion.fitted.check_reload", ["convert", "model", "--query", "select", "--text", "text", *QUICK]),
        ("qectomy.conversion.exact.check_reload", ["convert", "gpt2", "--query", "exact"]),
        ("qectomy.surgery.materialize.write_config", ["materialize", "reduced"]),
        ("qectomy.surgery.norm_fusion.write_config", ["fold-norms", "gpt2"]),
        ("qectomy.surgery.nanogpt.write_config", ["import-nanogpt", "nanogpt"]),
    ],
)
def test_what_was_stopped_is_resumed_or_cleaned(
    place, arguments, cli, tiny_checkpoint, tiny_reduced, raven, tmp_path, tmp_path_factory, monkeypatch
):
    files = {"model": tiny_checkpoint(), "gpt2": tiny_checkpoint("gpt2"), "text": raven}
    files["reduced"] = tiny_reduced(("select", "dense"))
    files["nanogpt"] = made().save(tmp_path_factory.mktemp("nanogpt") / "ckpt.pt")
    command = [*(files.get(word, word) for word in arguments), "--out", tmp_path / "out"]
    done = cli(*command, "--resume-only")
    assert done.code == 1
    assert done.err.endswith(
        "out.converting holds no run to go on with, and --resume-only begins none (--resume would)\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        done = cli(*command)
    assert (done.code, done.out) == (75, "")
    *_, said, then = done.err.splitlines()
    assert said == f"error: interrupted. {tmp_path}/{LEFT}"
    goes_on = shlex.split(then.removeprefix("to go on: qectomy "))
    assert goes_on == [command[0], "--resume", *map(str, command[1:])]
    done = cli(*command)
    assert done.code == 1
    assert done.err.endswith("holds a run that was not finished: go on with --resume, or start anew with --clean\n")
    assert cli(*command, "--resume-only", "--clean").code == 2
    both = cli(*command, "--resume", "--clean")
    assert both.code == 2
    assert "--resume goes on with what --clean removes" in both.err
    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        done = cli(*command, "--resume-only")
    assert (done.code, "--resume-only" in done.err.splitlines()[-1]) == (75, True)
    assert cli(*goes_on).code == 0
    again = cli(*command, "--resume")
    assert (again.code, "out is whole, and this run made it: there was nothing left to do" in again.err) == (0, True)
    assert cli(*command, "--resume-only").code == 0
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        assert cli(*command, "--clean").err.endswith(then + "\n")  # which no longer says --clean
    assert cli(*command, "--clean").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_before_anything_is_kept(cli, tiny_checkpoint, raven, tmp_path, monkeypatch):
    """130, as shells have it; 75 where an earlier run lies there still, which `--resume` had not entered yet."""
    command = ["convert", tiny_checkpoint(), "--out", tmp_path / "out", "--query", "select", "--text", raven, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr("qectomy.conversion.fitted.SourceWatch", stop)
        done = cli(*command)
    assert (done.code, done.err) == (130, "error: interrupted; what was not finished is not kept\n")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("qectomy.conversion.fitted.check_reload", stop)
        assert cli(*command).code == 75
        patch.setattr("qectomy.conversion.fitted.SourceWatch", lambda *_: signal.raise_signal(signal.SIGTERM))
        done = cli(*command, "--resume")
    assert done.code == 75
    assert done.err.startswith("error: interrupted; what there was to go on from is as it was\nto go on: qectomy ")
    assert cli(*command, "--resume").code == 0


def test_a_disk_that_fails_asks_to_try_again_and_a_result_that_is_refused_does_not(
    cli, tiny_checkpoint, raven, tmp_path, monkeypatch
):
    command = ["convert", tiny_checkpoint(), "--out", tmp_path / "out", "--query", "select", "--text", raven, *QUICK]
    for error, code in {
        OSError(errno.ENOSPC, "No space left on device"): 75,
        Stopped("the process that reloads was killed"): 75,
        CheckpointError("it gives other logits"): 1,
        Untrusted("the journal lacks it"): 1,
        NonFiniteError("NaN"): 1,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr("qectomy.conversion.fitted.check_reload", raising(error))
            done = cli(*command, "--resume")
        assert done.code == code, done.err
        assert ("\nto go on: qectomy convert " in done.err) == (code == 75), done.err
        assert [path.name for path in tmp_path.iterdir()] == ["out.converting"]
    with monkeypatch.context() as patch:  # before a step is kept
        patch.setattr(
            "qectomy.calibrate.hidden_states.WindowFile.__setitem__", raising(OSError(errno.EIO, "I/O error"))
        )
        done = cli(*command, "--clean")
    assert (done.code, list(tmp_path.iterdir())) == (1, [])
    assert done.err.endswith("out could not be written: I/O error. Nothing was left behind.\n")


def raising(error):
    def act(*_, **__):
        raise error

    return act


def test_a_run_of_other_settings_is_not_gone_on_with(cli, tiny_checkpoint, raven, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(raven.read_text() + "More.")
    command = ["convert", tiny_checkpoint(), "--out", tmp_path / "out", "--query", "select", "--text", raven, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr("qectomy.conversion.fitted.check_reload", stop)
        assert cli(*command).code == 75
    for changed, message in {
        ("--seed", 1): "seed was 0, is 1.",
        ("--tokens", 352): "tokens was 320, is 352.",
        ("--dtype", "bfloat16"): "dtype was None, is bfloat16.",
        ("--query", "0=dense,1=select"): "query was select, is 0=dense,1=select.",
        ("--eval-text", other): r"eval text was raven.txt \(sha256 .*\), is other.txt \(sha256 .*\).",
    }.items():
        done = cli(*command, *changed, "--resume")
        assert done.code == 1
        assert re.search(rf"out\.converting holds another run: .*{message}", done.err), done.err
    assert cli(*command, "--resume").code == 0


# Folders of other versions


def test_renew_says_of_each_folder_what_it_did_and_goes_on(cli, tiny_reduced, tiny_checkpoint, tmp_path):
    current = tiny_reduced(("select", "select"))
    old = shutil.copytree(current, tmp_path / "it's old")
    (old / "modeling_qectomy_llama.py").write_text("raise SystemExit\n")
    dry = cli("renew", old, "--dry-run")
    assert (dry.code, dry.out) == (0, f"{old}: would be renewed: modeling_qectomy_llama.py\n")
    done = cli("renew", tiny_checkpoint(), current, tmp_path / "none", old)
    assert done.code == 1
    assert done.out == f"{current}: current already\n{old}: renewed: modeling_qectomy_llama.py\n"
    refused = done.err.splitlines()
    assert refused[0].startswith(f"error: {tiny_checkpoint()}: model_type 'llama' is not a checkpoint that qectomy")
    assert refused[1].startswith(f"{tmp_path / 'none'} is no folder on this disk")
    assert len(refused) == 2
    assert cli("renew", old, current, "--json").json() == [
        {"folder": str(folder), "state": "current", "files": [], "fields": []} for folder in (old, current)
    ]
    failed = cli("renew", tiny_checkpoint(), "--json")
    assert failed.code == 1
    assert [result["state"] for result in json.loads(failed.out)] == ["refused"]


def test_old_code_is_named_with_the_command_that_renews_it(cli, tiny_checkpoint, raven, tmp_path):
    source, out = tiny_checkpoint(), tmp_path / "it's old"
    assert cli("convert", source, "--out", out, "--query", "exact").code == 0
    verify = ["verify", out, "--against", source]
    commands = {
        "verify": verify,
        "eval": ["eval", source, out, "--text", raven, "--tokens", "64", "--context", "32"],
        "report": ["report", out, "--out", tmp_path / "page.html"],
    }
    command = shlex.join(["qectomy", "renew", str(out)])
    for name in commands:
        done = cli(*commands[name])
        assert (done.code, "qectomy renew" in done.out + done.err) == (0, False), name
    (out / "modeling_qectomy_llama.py").unlink()
    for name in commands:
        done = cli(*commands[name])
        assert done.code == 0, done.err
        assert command in (done.out if name == "verify" else done.err), name
        assert done.err.count("\nnote: ") + done.err.startswith("note: ") == (name != "verify")
    assert not cli(*verify, "--json").json()["code_as_shipped"]
    assert cli(*shlex.split(command)[1:]).code == 0
    assert cli(*verify, "--json").json()["code_as_shipped"]
