"""What people see: every table prints, and names are shown as they are."""

import pytest
from conversions import convert_tiny
from page_folders import full_evaluation
from tiny_models import save_variant

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.sizes import totals
from qectomy.models.query_maps import parse_recipe
from qectomy.record.evaluation import Evaluated
from qectomy.record.reduced import Plan, read_reduced
from qectomy.report import tables
from qectomy.report.evaluation_table import show_evaluations
from qectomy.report.inspection_table import show_inspection
from qectomy.surgery.inspect import inspect

NEEDS = dict(
    peak_memory_bytes=512_000_000,
    peak_memory_stage="refitting",
    disk_bytes=3_400_000,
    seconds=150.0,
    stages={"start": 3.0, "fitting": 90.0, "forward": 45.0, "reload": 12.0},
)


@pytest.fixture(params=[80, 200])
def printed(request, monkeypatch, capsys):
    """A function that returns what was printed since it was last called, on a narrow or a wide console."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return lambda: " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("shape", ["llama", "biases", "bf16", "mistral", "qwen2"])
def test_an_inspection(shape, tiny_checkpoint, printed):
    checkpoint = open_checkpoint(tiny_checkpoint(shape))
    found = inspect(checkpoint) | {"needs": NEEDS}
    show_inspection(found, "./my model")
    text = printed()
    assert f"{checkpoint.parameters:,} parameters" in text
    assert "4 query heads on 2 KV heads of 8" in text
    assert "key-shared" in text
    assert "possible" in text  # not low-rank:64 in a model 32 wide
    assert "W_Q of layers 0-1 does not go without loss: with RMSNorm before its readers it goes whole only if" in text
    exact, fit = ({row["map"]: row for row in found["query_maps"]}[name] for name in ("exact", "key-shared"))
    command = "qectomy convert './my model' --query"
    assert f"to take out {exact['removed_parameters']:,} parameters without any loss: {command} exact --out OUT" in text
    assert (
        f"to take out {fit['removed_parameters']:,} parameters, at a cost in perplexity that the conversion measures"
        in text
    )
    assert f"{command} key-shared --text YOURS.txt --eval-text OTHER.txt --out OUT" in text
    assert "goes whole without loss: qectomy inspect './my model' --audit" in text


def test_an_inspection_of_what_no_map_is_fitted_to(tmp_path, printed):
    checkpoint = open_checkpoint(save_variant(tmp_path / "source", "llama", norms=False, mlp_skip=False))
    show_inspection(inspect(checkpoint) | {"needs": NEEDS}, "./my model")
    text = printed()
    assert text.count("query maps are fitted to stock models; what goes from this one goes exactly") == 1
    assert "│ exact │ 100.0% │ 2,272 │" in text  # two W_Q of 1,024, and 112 numbers of each W_V
    assert "W_Q of layers 0-1 goes whole, without loss: no norm before its readers" in text
    assert "--query exact" in text
    assert "key-shared --text" not in text
    assert "--audit" not in text  # without norms the structure tells
    assert "a fitted conversion" not in text


def test_an_audit(tiny_checkpoint, printed):
    result = inspect(open_checkpoint(tiny_checkpoint())) | {"needs": NEEDS}
    shared = dict(rank_99=17, rank_99_data="[red]text[/], 320 tokens", d_model=32)
    why = "the block of head 1 is singular"
    records = [
        dict(cond=1234.5, distance_from_orthogonal=0.5678, distance_why_not=None),
        dict(cond=None, distance_from_orthogonal=None, distance_why_not=why),
    ]
    for layer, record in zip(result["layers"], records, strict=True):
        layer["audit"] = {**shared, **record}
    show_inspection(result, "./my model")
    text = printed()
    assert "│ 0 │ 1.23e+03 │ 0.568 │ 17 │ 32 │" in text
    assert "│ 1 │ inf │ - │ 17 │ 32 │" in text
    assert "under the text's data ([red]text[/], 320 tokens)" in text
    assert f"no distance in layers 1: {why}" in text
    for column in ("cond(W_Q)", "distance", "rank 99 %"):
        assert f"{column}: " in text
    for command in ("--query exact", "--query key-shared", "--query low-rank:R"):
        assert f"`convert {command}`" in text
    assert "gauge" not in text
    assert "--audit" not in text
    result["layers"][1]["how"] = "exact"
    show_inspection(result, "hub/id")
    assert "without any loss, all of W_Q in layer 1 among them: qectomy convert hub/id --query exact" in printed()
    for row in result["query_maps"]:
        row |= {"possible": False, "why_not": "too small"}
    result["layers"][1]["how"] = "least squares"
    show_inspection(result, "hub/id")
    assert "nothing can be taken out of this checkpoint, for the reasons above" in printed()


def test_a_plan(tiny_checkpoint, printed):
    checkpoint = open_checkpoint(tiny_checkpoint())
    recipe = tuple(parse_recipe("0=dense,1=select", checkpoint.dims))
    plan = Plan(plan=[str(s) for s in recipe], **totals(checkpoint, recipe), needs=NEEDS)
    tables.show_plan(plan)
    text = printed()
    assert "0=dense, 1=select" in text
    told = "512.0 MB of memory, give or take 15 % (most in its stage refitting), 3.4 MB of disk and 2 minutes"
    assert f"a fitted conversion here needs about {told} (fitting 60%, forward 30%, reload 8%)" in text
    tables.show_plan(plan.model_copy(update={"needs": NEEDS | {"seconds": None, "stages": None}}))
    assert "(most in its stage refitting), 3.4 MB of disk dry run" in printed()
    assert "dry run: nothing was written" in text


def test_a_conversion(tiny_checkpoint, raven, tmp_path, printed):
    convert_tiny(tiny_checkpoint(), tmp_path / "out", "select", raven)
    report = read_reduced(tmp_path / "out/qectomy.json")
    tables.show_conversion(report)
    text, perplexity = printed(), report.perplexity
    assert f"perplexity {perplexity.before:.3f} -> {perplexity.after:.3f} (x {perplexity.ratio:.4f}; 95 %: " in text
    assert "s, as long as the original takes to read the same tokens" in text


@pytest.mark.parametrize("compared", [False, True])
def test_evaluations_show_names_as_they_are(compared, printed):
    """rich reads square brackets as markup; [/nope] alone would be an error."""
    names = ["plain", "[red]x[/]", "[/nope]", "[bold]", ":bird:", "\\[x]"]
    numbers = full_evaluation()["results"][0] | dict(perplexity=12.34567, bits_per_byte=0.98765)
    numbers |= dict(tokens_per_second=1.0, perplexity_95=[12.0, 13.0])
    numbers["protocol"] |= dict(text="[red]text[/]", text_sha256="0" * 64, scored_tokens=1234)
    if compared:
        numbers |= dict(kl=0.0123, top1_agreement=0.875)
    show_evaluations([Evaluated.model_validate(numbers | dict(checkpoint=name)) for name in names])
    text = printed()
    for name in names:
        assert name in text
    assert "12.3457" in text
    assert ("87.50%" in text) == compared
    assert "[red]text[/] (sha256 0000000000000000), 1,234 tokens scored in" in " ".join(text.split())


@pytest.mark.parametrize(
    "n_bytes, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (5e12, "5.00 TB"), (-2e6, "-2.0 MB")],
)
def test_sizes(n_bytes, text):
    assert tables.size(n_bytes) == text
