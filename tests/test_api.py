"""The functions of `import qectomy` do what the commands of the same names do."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
import typer
from conversions import few_steps, hashes, reload_here
from nanogpt_checkpoints import made
from test_cli import cli  # noqa: F401

import qectomy
from qectomy.cli import app
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError, UsageError
from qectomy.healing.settings import HealSettings

FUNCTIONS = {name: name.replace("_", "-") for name in qectomy.__all__ if name != "QectomyError"}
FUNCTIONS |= {"evaluate": "eval", "page": "report"}
QUICK = dict(tokens=320, context=32, eval_tokens=160)
CHANGES = {"command", "created", "seconds", "tokens_per_second", "peak_memory_bytes"}


def same(ours, theirs):
    """Compare two records but for when and how fast they were made, and how it was asked for."""
    return without(ours) == without(json.loads(json.dumps(theirs)))


def without(record):
    if isinstance(record, dict):
        return {name: without(value) for name, value in record.items() if name not in CHANGES}
    return [without(value) for value in record] if isinstance(record, list) else record


@pytest.fixture
def quick(monkeypatch):
    few_steps(monkeypatch)
    reload_here(monkeypatch)


def in_a_new_process(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_importing_loads_nothing_and_the_names_are_there():
    script = (
        "import sys, qectomy; qectomy.convert, qectomy.heal, qectomy.evaluate; print(*dir(qectomy)); "
        "print(*{'torch', 'transformers', 'typer', 'rich'} & sys.modules.keys(), sep='!')"
    )
    found = in_a_new_process(script)
    assert FUNCTIONS.keys() <= set(found)
    assert not {"torch", "transformers", "typer", "rich"} & set(" ".join(found).replace("!", " ").split())


def test_a_function_stays_one_when_the_modules_are_loaded():
    script = (
        "import qectomy.conversion.fitted, qectomy.healing.heal, qectomy.surgery.materialize, qectomy.cli\n"
        "import qectomy\n"
        f"print(*(callable(getattr(qectomy, name)) for name in {list(FUNCTIONS)}))"
    )
    assert in_a_new_process(script) == ["True"] * len(FUNCTIONS)


def test_a_name_that_is_none_is_told():
    with pytest.raises(AttributeError, match="module 'qectomy' has no attribute 'fold'"):
        _ = qectomy.fold


def test_every_command_is_a_function():
    assert {*FUNCTIONS.values()} == {*typer.main.get_command(app).commands}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_have_the_names_and_defaults_of_the_command_line(name):
    command = typer.main.get_command(app).commands[FUNCTIONS[name]]
    theirs = {}
    for option in command.params:
        assert option.help, option.name
        long = max(option.opts, key=len).lstrip("-").replace("-", "_")
        theirs[long] = None if option.default in ((), []) or option.required else option.default
    del theirs["json"]
    ours = inspect.signature(getattr(qectomy, name)).parameters
    assert ours.keys() - {"progress", "command"} == theirs.keys()
    for option, parameter in ours.items():
        if option not in ("progress", "command") and parameter.default is not parameter.empty:
            assert parameter.default == theirs[option], option


def test_what_is_told_no_option_is_as_the_options_are():
    for name, settings in {"heal": HealSettings, "convert": ConvertSettings}.items():
        options = inspect.signature(getattr(qectomy, name)).parameters
        told = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
        both = told.keys() & options.keys() - {"command", "context"}
        assert {option: told[option] for option in both} == {option: options[option].default for option in both}
        assert {"seed", "eval_tokens", "dtype", "device", "tokens"} <= both


def test_python_shows_what_an_option_is():
    assert "Tokens a window. Default: 512" in str(inspect.signature(qectomy.heal))
    assert "'Folder or hub id of the original.'" in str(inspect.signature(qectomy.verify).parameters["against"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_option_is_a_type_error(name):
    required = [
        parameter.name
        for parameter in inspect.signature(getattr(qectomy, name)).parameters.values()
        if parameter.default is parameter.empty
    ]
    with pytest.raises(TypeError, match="toknes"):
        getattr(qectomy, name)(*required, toknes=5)


def test_inspect(cli, tiny_checkpoint, raven):  # noqa: F811
    model = tiny_checkpoint("llama")
    theirs = cli("inspect", model, "--no-probe", "--json").json()
    assert same(qectomy.inspect(model, no_probe=True), theirs)
    told = ["--audit", "--text", raven, "--tokens", "160", "--context", "32"]
    audited = qectomy.inspect(str(model), audit=True, text=raven, tokens=160, context=32, no_probe=True)
    assert audited["layers"][0]["audit"]
    assert same(audited, cli("inspect", model, *told, "--no-probe", "--json").json())


def test_evaluate(cli, tiny_checkpoint, raven, tmp_path):  # noqa: F811
    one, two = tiny_checkpoint("gpt2"), tiny_checkpoint("gpt2", seed=1)
    options = dict(text=raven, context=32, tokens=160, reference=one)
    ours = qectomy.evaluate([one, str(two)], **options, save=tmp_path / "evaluation.json")
    told = ["--text", raven, "--context", "32", "--tokens", "160", "--reference", one, "--json"]
    assert same(ours.as_dict(), cli("eval", one, two, *told).json())
    assert json.loads((tmp_path / "evaluation.json").read_text()) == ours.as_dict()
    assert ours.results[1].reference == str(one)
    assert ours.command == (
        f"qectomy.evaluate([{str(one)!r}, {str(two)!r}], text={str(raven)!r}, context=32, tokens=160, "
        f"reference={str(one)!r}, save={str(tmp_path / 'evaluation.json')!r})"
    )
    alone = qectomy.evaluate(one, text=raven, context=32, tokens=160)
    assert alone.results[0].perplexity == ours.results[0].perplexity


def test_convert_verify_and_materialize(cli, quick, tiny_checkpoint, raven, tmp_path):  # noqa: F811
    model, seen = tiny_checkpoint("llama"), []
    fitted = qectomy.convert(
        model, tmp_path / "fitted", text=[raven], **QUICK, progress=lambda *step: seen.append(step)
    )
    assert fitted.as_dict() == json.loads((tmp_path / "fitted/qectomy.json").read_text())
    assert fitted.command == (
        f"qectomy.convert({str(model)!r}, {str(tmp_path / 'fitted')!r}, text=[{str(raven)!r}], tokens=320, "
        "context=32, eval_tokens=160)"
    )
    assert [layer.map for layer in fitted.layers] == ["key-shared"] * 2
    assert len(seen) > 1
    told = ["--text", raven, "--tokens", "320", "--context", "32", "--eval-tokens", "160", "--json"]
    theirs = cli("convert", model, "--out", tmp_path / "theirs", *told).json()
    assert fitted.tensors_sha256 == theirs["tensors_sha256"]
    assert fitted.as_dict()["perplexity"] == theirs["perplexity"]

    exact = qectomy.convert(str(model), str(tmp_path / "exact"), query="exact")
    assert exact.method == "exact"
    certificate = qectomy.verify(tmp_path / "exact", model, text=raven, tokens=64, context=32)
    told = ["--against", model, "--text", raven, "--tokens", "64", "--context", "32", "--json"]
    assert same(certificate, cli("verify", tmp_path / "exact", *told).json())
    assert certificate["verdict"] == "exact"
    assert qectomy.verify(tmp_path / "fitted", model)["verdict"] == "not exact"  # returned, not raised

    stock = qectomy.materialize(tmp_path / "fitted", tmp_path / "stock")
    theirs = cli("materialize", tmp_path / "fitted", "--out", tmp_path / "stock-2", "--json").json()
    assert stock.pop("out") == str(tmp_path / "stock")
    theirs.pop("out")
    assert same(stock, theirs)


def test_the_other_rewrites_and_the_page(cli, quick, tiny_checkpoint, tmp_path):  # noqa: F811
    model, weights = tiny_checkpoint("gpt2"), made().save(tmp_path / "ckpt.pt")
    for call, command in [
        (lambda out: qectomy.fold_norms(model, out, only="gain"), ["fold-norms", model, "--only", "gain"]),
        (
            lambda out: qectomy.import_nanogpt(weights, out, tokenizer=model),
            ["import-nanogpt", weights, "--tokenizer", model],
        ),
    ]:
        ours, theirs = call(tmp_path / "ours"), cli(*command, "--out", tmp_path / "theirs", "--json").json()
        assert (ours.pop("out"), theirs.pop("out")) == (str(tmp_path / "ours"), str(tmp_path / "theirs"))
        assert same(ours, theirs)
        assert hashes(tmp_path / "ours") == hashes(tmp_path / "theirs")
        shutil.rmtree(tmp_path / "ours")
        shutil.rmtree(tmp_path / "theirs")
    qectomy.convert(model, tmp_path / "exact", query="exact")
    ours, html = qectomy.page(tmp_path / "exact", title="Mine"), tmp_path / "exact/report.html"
    assert "<title>Mine" in html.read_text()
    assert same(ours, cli("report", tmp_path / "exact", "--json").json())
    assert qectomy.renew([tmp_path / "exact", model])[0]["state"] == "current"
    assert qectomy.renew(model)[0]["state"] == "refused"


def test_bench(quick, tiny_checkpoint, tmp_path):
    model, save = tiny_checkpoint("gpt2"), tmp_path / "bench.json"
    options = dict(batch=2, rounds=1, starts=0, prompt_tokens=4, new_tokens=2, save=save)
    found = qectomy.bench(model, model, **options)
    assert found.as_dict() == json.loads(save.read_text())
    assert found.command == (
        f"qectomy.bench({str(model)!r}, {str(model)!r}, batch=2, rounds=1, starts=0, prompt_tokens=4, new_tokens=2, "
        f"save={str(save)!r})"
    )


def test_a_plan_writes_nothing(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    model, out = tiny_checkpoint("gpt2"), tmp_path / "out"
    for query in ("select", "exact"):
        told = ["--query", query, "--dry-run", "--no-probe", "--json"]
        ours = qectomy.convert(model, out, query=query, dry_run=True, no_probe=True)
        assert same(ours.as_dict(), cli("convert", model, "--out", out, *told).json())
    assert list(tmp_path.iterdir()) == []


def test_heal(quick, tiny_checkpoint, raven, tmp_path):
    model, reduced = tiny_checkpoint("gpt2"), tmp_path / "reduced"
    qectomy.convert(model, reduced, query="select", text=raven, **QUICK)
    quick_heal = dict(tokens=256, batch_tokens=128, context=32, validation_tokens=160, eval_tokens=160, evaluations=1)
    healed = qectomy.heal(reduced, model, tmp_path / "healed", text=raven, **quick_heal)
    assert healed.as_dict() == json.loads((tmp_path / "healed/qectomy.json").read_text())
    assert healed.healing.steps == 2
    assert healed.healing.command.startswith(f"qectomy.heal({str(reduced)!r}, {str(model)!r}, ")
    one_go = qectomy.convert(model, tmp_path / "both", query="select", text=raven, heal=256, **QUICK)
    assert one_go.as_dict()["healing"]["settings"]["tokens"] == 256


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, out: qectomy.inspect(model, text="a.txt"), "--text: only an audit reads a text; add --audit"),
        (lambda model, out: qectomy.evaluate(model), "nothing to measure: give --text FILE"),
        (lambda model, out: qectomy.evaluate([], protocol="rolling"), "there is no checkpoint to measure"),
        (lambda model, out: qectomy.evaluate(model, lm_eval="x", streamed=True), "--streamed: the harness loads"),
        (lambda model, out: qectomy.evaluate(model, lm_eval_limit=2), "--lm-eval-path: names no task"),
        (lambda model, out: qectomy.evaluate(model, lm_eval="x", stride=2), "--stride: concerns a text"),
        (lambda model, out: qectomy.convert(model, out, tokens=0), "--tokens: 0 is no whole number from 1 on"),
        (lambda model, out: qectomy.convert(model, out, context="512"), "--context: '512' is no whole number from 16"),
        (lambda model, out: qectomy.convert(model, out, heal="1k"), "--heal: '1k' is no whole number from 1 on"),
        (lambda model, out: qectomy.heal(model, model, out, eval_tokens=True), "--eval-tokens: True is no whole"),
        (lambda model, out: qectomy.heal(model, model, out, warmup=2), "--warmup: 2 is no number from 0 to 1"),
        (lambda model, out: qectomy.heal(model, model, out, clip=float("inf")), "--clip: inf is no finite number"),
        (lambda model, out: qectomy.heal(model, model, out, lr="1e-3"), "--lr: '1e-3' is no number"),
        (lambda model, out: qectomy.convert(model, out, tokens=None), "--tokens: None is no whole number from 1 on"),
        (lambda model, out: qectomy.bench(model, model, batch=[1, 0]), "--batch: 0 is no whole number from 1 on"),
        (lambda model, out: qectomy.bench(model, model, seed=-1), "--seed: -1 is no whole number from 0 to 2147483647"),
        (lambda model, out: qectomy.materialize(model, out, resume=True, clean=True), "--resume goes on with what"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(call, message, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError) as refused:
        call(tiny_checkpoint("gpt2"), tmp_path / "out")
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_what_the_commands_refuse_is_refused_alike(tiny_checkpoint, raven, tmp_path):
    model = tiny_checkpoint("gpt2")
    (tmp_path / "there").mkdir()
    for call, message in [
        (lambda: qectomy.convert(model, tmp_path / "there", text=raven), "exists; nothing is overwritten"),
        (lambda: qectomy.convert(model, tmp_path / "out", text=raven, query="selct"), "selct"),
        (lambda: qectomy.verify(model, model), "qectomy_"),
        (lambda: qectomy.heal(model, model, tmp_path / "out"), "no text to heal on|reduced"),
    ]:
        with pytest.raises(qectomy.QectomyError, match=message) as refused:
            call()
        assert isinstance(refused.value, QectomyError)
