"""The whole conversion, on tiny checkpoints of every shape: what is written, and that the report tells the truth."""

import json
import math
import subprocess

import pytest
import torch
from conversions import QUICK, convert_tiny, few_steps, hashes, measured, reload_here, tensor_hashes
from safetensors import safe_open
from tiny_models import ROPES, bos_tokenizer, tiny_tokenizer

from qectomy import __version__
from qectomy.calibrate import layer_fit
from qectomy.checkpoint.checkpoint import open_checkpoint, sha256
from qectomy.checkpoint.sizes import scratch_bytes
from qectomy.conversion.fitted import convert
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import CheckpointError
from qectomy.eval.evaluate import evaluate
from qectomy.eval.protocol import Protocol
from qectomy.models.architectures import FAMILIES
from qectomy.models.query_maps import parse_recipe
from qectomy.text.text import read_source

MAPS = ["identity", "select", "key-shared", "low-rank:3", "dense"]
MIXED = "0=identity,1=key-shared,2=select,3=dense,4=low-rank:3"
SHAPES = ["mha", "llama", "mqa", "tied", "biases", "attention-bias", "mlp-bias", "wide-heads", "narrow-heads"]
STORAGE = ["sharded", "bf16", "fp16", "mistral", "qwen2", "mistral-full"]
CASES = [
    *[(shape, "key-shared") for shape in [*SHAPES, *STORAGE]],
    *[(f"rope-{name}", "select") for name in ROPES],
    *[(shape, name) for shape in ("llama", "tied", "biases", "narrow-heads", "mistral") for name in MAPS],
    ("wide-heads", "identity"),
    ("bf16", "identity"),
    *[("gpt2", name) for name in MAPS],
    ("gpt2-untied", "identity"),
    ("gpt2-bf16", "identity"),
    ("gpt2-sharded", "select"),
    ("gpt2-inverse", "low-rank:3"),
    ("gpt2-unscaled", "key-shared"),
    ("gpt2-one-head", "select"),
]
NBYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}


def stored(folder):
    """(numbers, bytes) that the safetensors files of a folder hold, counted from the files."""
    numbers = n_bytes = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                numbers += math.prod(view.get_shape())
                n_bytes += math.prod(view.get_shape()) * NBYTES[view.get_dtype()]
    return numbers, n_bytes


def check_report(report, source, out, text, recipe):
    on_disk = json.loads((out / "qectomy.json").read_text())
    assert on_disk == report
    assert report["qectomy"] == __version__
    assert {"python", "torch", "transformers", "safetensors", "numpy"} <= report["versions"].keys()
    original = open_checkpoint(source)
    assert report["source"]["model_type"] == original.family.model_type
    assert report["source"]["sha256"] == {n: sha256(source / n) for n in ["config.json", *original.files]}
    for key, folder in (("before", source), ("after", out)):
        assert (report["parameters"][key], report["bytes"][key]) == stored(folder)
    gone = report["query_parameters"]["before"] - report["query_parameters"]["after"]
    if original.family.model_type == "gpt2":  # the biases of its keys and values go too
        gone += sum(name != "dense" for name in recipe) * 2 * original.dims.d_model
    assert report["parameters"]["before"] - report["parameters"]["after"] == gone

    assert [(record["index"], record["map"]) for record in report["layers"]] == list(enumerate(recipe))
    for record in report["layers"]:
        assert record["seconds"] > 0
        for kl in (record["attention_kl"]["fitted"], record["attention_kl"]["heldout"]):
            assert math.isfinite(kl)
            assert kl > (-1e-9 if record["map"] == "dense" else 1e-4)

    perplexity, total = report["perplexity"], report["seconds"]["total"]
    assert perplexity["ratio"] == pytest.approx(perplexity["after"] / perplexity["before"])
    assert perplexity["before"] == pytest.approx(measured(source, text), rel=1e-4)
    assert sum(value for stage, value in report["seconds"].items() if stage != "total") <= total + 0.05
    assert 0 < report["forward_pass_seconds"] < total
    assert 10**7 < report["peak_memory_bytes"] < 10**11
    assert 0 <= report["reload_check"]["largest_relative_logit_error"] < 1e-4

    again = evaluate(
        str(out), read_source(str(text)), Protocol(context=32, tokens=160), dtype="float32", reference=str(source)
    )
    assert again.perplexity == pytest.approx(perplexity["after"], rel=1e-4)
    assert again.bits_per_byte == pytest.approx(report["bits_per_byte"]["after"], rel=1e-4)
    assert again.kl == pytest.approx(report["kl"], rel=1e-3, abs=1e-6)
    assert again.top1_agreement == pytest.approx(report["top1_agreement"], abs=0.01)
    overlap = {name: value for name, value in again.overlap.as_dict().items() if name != "fitted_text"}
    assert again.protocol.as_dict() | {"overlap": overlap} == perplexity["protocol"]


@pytest.mark.parametrize("shape, query", CASES)
def test_every_shape_and_map(shape, query, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape)
    before = hashes(source)
    report = convert_tiny(source, tmp_path / "out", query, raven)
    assert hashes(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_report(report, source, tmp_path / "out", raven, [query] * 2)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    code = f"modeling_qectomy_{'gpt2' if shape.startswith('gpt2') else 'llama'}.py"
    assert {"config.json", "tokenizer.json", "README.md", code} <= names
    assert not [name for name in names if name.startswith(".")]
    if query == "dense":
        assert report["perplexity"]["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert report["parameters"]["after"] == report["parameters"]["before"]
        assert report["top1_agreement"] == 1.0
        assert report["kl"] == pytest.approx(0.0, abs=1e-6)
    else:
        assert report["parameters"]["after"] < report["parameters"]["before"]
        assert report["perplexity"]["ratio"] < 5


@pytest.mark.parametrize(
    "shape", ["llama", "tied", "biases", "mistral", "qwen2", "gpt2", "gpt2-untied", "gpt2-inverse"]
)
def test_a_mixed_recipe(shape, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape, num_hidden_layers=5)
    report = convert_tiny(source, tmp_path / "out", MIXED, raven)
    check_report(report, source, tmp_path / "out", raven, [part.partition("=")[2] for part in MIXED.split(",")])
    kls = [record["attention_kl"]["fitted"] for record in report["layers"]]
    assert kls[3] > 1e-4  # a dense layer that reads a stream which has left the teacher's


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_dense_layers_before_the_first_converted_one_stay_as_they_were(shape, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape, num_hidden_layers=3)
    report = convert_tiny(source, tmp_path / "out", "0-1=dense,2=select", raven)
    old, new = open_checkpoint(source), open_checkpoint(tmp_path / "out", reduced=True)
    for layer in (0, 1):
        ours = new.read_layer(layer)
        assert all(torch.equal(tensor, ours[name]) for name, tensor in old.read_layer(layer).items())
        assert report["layers"][layer]["attention_kl"] == {"fitted": 0.0, "heldout": 0.0}
    for name in old.family.outer_shapes(old.dims):
        assert torch.equal(old.read(name), new.read(name))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_dense_layers_after_it_are_refitted_to_a_stream_that_drifts(shape, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape, num_hidden_layers=3)
    convert_tiny(source, tmp_path / "out", "0=select,1-2=dense", raven)
    old, new = open_checkpoint(source).read_layer(1), open_checkpoint(tmp_path / "out", reduced=True).read_layer(1)
    changed = {name.partition(".")[2] for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    writers = {"c_proj.weight", "c_proj.bias"} if shape == "gpt2" else {"o_proj.weight", "down_proj.weight"}
    assert changed == writers


def test_the_first_layer_reads_a_scaled_embedding_as_before(tiny_checkpoint, raven, tmp_path):
    """A tied head's gain goes into the embedding when the stream is turned: the first attention undoes it."""
    report = convert_tiny(tiny_checkpoint("tied"), tmp_path / "out", "0=dense,1=identity", raven)
    assert report["layers"][0]["attention_kl"]["fitted"] < 1e-2


# By default the eval text is the start of the calibration text.


def test_the_evaluation_tokens_of_one_text_are_never_fitted_on(tiny_checkpoint, raven, tmp_path):
    """Another start of the text, of as many tokens, gives other perplexities and the very same weights."""
    words = raven.read_text().splitlines(keepends=True)
    tokenizer = tiny_tokenizer()

    def ids(lines):
        return tokenizer("".join(lines))["input_ids"]

    head, tail = words[:12], words[12:]
    other = head[::-1]
    count = len(ids(head))
    assert ids(head + tail)[count:] == ids(other + tail)[count:]
    assert ids(head) != ids(other)
    reports = []
    for name, lines in (("one", head + tail), ("two", other + tail)):
        text = tmp_path / f"{name}.txt"
        text.write_text("".join(lines))
        reports.append(
            convert_tiny(
                tiny_checkpoint(), tmp_path / name, "key-shared", text, context=16, tokens=160, eval_tokens=count
            )
        )
    weights = [hashes(tmp_path / name)["model.safetensors"] for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert reports[0]["perplexity"]["before"] != pytest.approx(reports[1]["perplexity"]["before"], rel=1e-3)
    for report in reports:
        assert report["calibration"]["texts"][0]["first_token"] == count


def test_two_texts_and_an_evaluation_text(tiny_checkpoint, raven, tmp_path):
    other, held = tmp_path / "other.jsonl", tmp_path / "held.txt"
    other.write_text(json.dumps({"text": raven.read_text().upper()}) + "\n")
    held.write_text(raven.read_text().swapcase())
    report = convert_tiny(
        tiny_checkpoint(), tmp_path / "out", "select", raven, texts=(str(raven), str(other)), eval_text=str(held)
    )
    texts = report["calibration"]["texts"]
    assert [text["file"] for text in texts] == ["raven.txt", "other.jsonl"]
    assert [text["sha256"] for text in texts] == [sha256(raven), sha256(other)]
    assert [text["tokens"] for text in texts] == [160, 160]
    assert [text["first_token"] for text in texts] == [0, 0]
    protocol = report["perplexity"]["protocol"]
    assert (protocol["text"], protocol["text_sha256"]) == ("held.txt", sha256(held))
    assert (protocol["context"], protocol["stride"], protocol["windows"], protocol["tokens"]) == (32, 32, 5, 160)
    assert protocol["scored_tokens"] == 5 * 31
    assert protocol["dtype"] == "float32"
    assert str(tmp_path) not in json.dumps(report)  # no folder of the user's but in the command


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("query", ["identity", "select", "key-shared", "low-rank:3"])
def test_the_same_seed_writes_the_same_bytes(query, shape, tiny_checkpoint, raven, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert_tiny(tiny_checkpoint(shape), tmp_path / name, query, raven, seed=seed)
    files = [hashes(tmp_path / name) for name in "abc"]
    same = {name for name in files[0] if files[0][name] == files[1][name]}
    assert files[0].keys() - same <= {"qectomy.json"}  # which holds the seconds it took
    assert files[0]["model.safetensors"] != files[2]["model.safetensors"]


@pytest.mark.parametrize(
    "shape, dtype, stored_as",
    [("llama", "bfloat16", "BF16"), ("bf16", "float32", "F32"), ("gpt2", "bfloat16", "BF16")],
)
@pytest.mark.parametrize("query", ["key-shared", "identity", "dense"])
def test_another_dtype(shape, dtype, stored_as, query, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape)
    report = convert_tiny(source, tmp_path / "out", query, raven, dtype=dtype)
    new = open_checkpoint(tmp_path / "out", reduced=True)
    assert new.dtype == stored_as
    assert {info.dtype for info in new.tensors.values()} == {stored_as}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    check_report(report, source, tmp_path / "out", raven, [query] * 2)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn"])
def test_rope_that_depends_on_the_length(kind, tiny_checkpoint, raven, tmp_path):
    """Some RoPE types change with the text's length: the reload check must use the window that was measured."""
    parameters = {**ROPES[kind], "original_max_position_embeddings": 80}
    if kind == "dynamic":
        del parameters["original_max_position_embeddings"]
    source = tiny_checkpoint(f"rope-{kind}", rope_parameters=parameters, max_position_embeddings=80)
    report = convert_tiny(source, tmp_path / "out", "select", raven, context=128, tokens=256, eval_tokens=128)
    assert report["perplexity"]["before"] == pytest.approx(measured(source, raven, 128, 128), rel=1e-4)


@pytest.mark.parametrize("query", MAPS)
def test_heads_of_an_odd_width(query, tiny_checkpoint, raven, tmp_path):
    """Without RoPE nothing comes in pairs."""
    source = tiny_checkpoint("gpt2", hidden_size=20)
    report = convert_tiny(source, tmp_path / "out", query, raven)
    check_report(report, source, tmp_path / "out", raven, [query] * 2)


def test_a_tokenizer_that_adds_bos(tiny_copy, raven, tmp_path):
    source = tiny_copy()
    bos_tokenizer().save_pretrained(source)
    report = convert_tiny(source, tmp_path / "out", "key-shared", raven)
    protocol = report["perplexity"]["protocol"]
    assert protocol["bos"] == "every window starts with BOS"
    assert protocol["scored_tokens"] == 5 * 31  # BOS is given, and every token of the text after it is scored
    for key, folder in (("before", source), ("after", tmp_path / "out")):
        again = evaluate(str(folder), read_source(str(raven)), Protocol(context=32, tokens=160))
        assert again.protocol.as_dict() | {"overlap": protocol["overlap"]} == protocol
        assert again.perplexity == pytest.approx(report["perplexity"][key], rel=1e-4)


def test_the_reload_check_ran_in_a_fresh_process(tiny_checkpoint, raven, tmp_path, monkeypatch):
    commands, run = [], subprocess.run

    def watch(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", watch)
    report = convert_tiny(
        tiny_checkpoint("tied"), tmp_path / "out", MIXED[: MIXED.index(",2")], raven, fresh_process=True
    )
    assert any("qectomy.eval.reload" in part for command in commands for part in command)
    assert report["seconds"]["reload"] > 0
    assert report["reload_check"]["largest_relative_logit_error"] < 1e-4


@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "gpt2"])
def test_the_reload_check_runs_the_models_own_forward(shape, tiny_checkpoint, raven, tmp_path, monkeypatch):
    """What lies outside the layers, and so outside what the pass runs, must be right too."""
    whole = FAMILIES[shape].base_class(reduced=True)
    right = whole.forward

    def wrong(self, *arguments, **options):
        out = right(self, *arguments, **options)
        out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    monkeypatch.setattr(whole, "forward", wrong)
    with pytest.raises(CheckpointError, match="gives other logits in a fresh process"):
        convert_tiny(tiny_checkpoint(shape), tmp_path / "out", "select", raven)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_scratch_stays_within_what_the_plan_says(shape, tiny_checkpoint, raven, tmp_path, monkeypatch):
    source, sizes = open_checkpoint(tiny_checkpoint(shape)), []

    def watch(folder):
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))

    def refine_and_look(*arguments):
        watch(tmp_path / "out.converting/scratch")
        return refine(*arguments)

    def search_and_look(*arguments):
        watch(tmp_path / "out.converting/scratch")
        return searchsorted(*arguments)

    refine, searchsorted = layer_fit.refine, torch.searchsorted
    monkeypatch.setattr(layer_fit, "refine", refine_and_look)
    monkeypatch.setattr(torch, "searchsorted", search_and_look)
    convert_tiny(source.folder, tmp_path / "out", "key-shared", raven)
    planned = scratch_bytes(source, QUICK["tokens"], QUICK["eval_tokens"])
    assert 0.5 * planned < max(sizes) <= planned


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_report_has_the_sha256_of_each_tensor(dtype, tiny_checkpoint, raven, tmp_path):
    report = convert_tiny(tiny_checkpoint(), tmp_path / "out", "0=select,1=dense", raven, dtype=dtype)
    assert report["tensors_sha256"] == tensor_hashes(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out", reduced=True)
    assert {name: checkpoint.digest(name) for name in checkpoint.tensors} == report["tensors_sha256"]


def test_progress_counts_the_layers(tiny_checkpoint, raven, tmp_path):
    source, calls = open_checkpoint(tiny_checkpoint()), []
    settings = ConvertSettings(texts=(str(raven),), **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        few_steps(patch)
        reload_here(patch)
        recipe = tuple(parse_recipe("select", source.dims))
        convert(source, tmp_path / "out", recipe, settings, lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]
    assert all("KL" in call[2] for call in calls)
