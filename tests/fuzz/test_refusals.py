"""What single hostile files are told: the message names the file and what is wrong with it."""

import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from cases import SECRET
from conversions import convert_tiny, tensor_hashes
from damage import edit_json, refused
from nanogpt_checkpoints import made
from page_folders import full_report, write_folder
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_MAP, RAVEN, bos_tokenizer, tiny_tokenizer

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import copy_companions, load_config
from qectomy.checkpoint.headers import INDEX, MAX_DEPTH, SINGLE, parse_json
from qectomy.cli import complain
from qectomy.conversion.pass_steps import is_whole
from qectomy.errors import (
    CheckpointError,
    OutputError,
    QectomyError,
    QueryMapError,
    Stopped,
    TextError,
    Untrusted,
    shown,
)
from qectomy.eval.loading import read_config
from qectomy.eval.protocol import Protocol, scoring_windows
from qectomy.models.architectures import find_family
from qectomy.report.page.reading import ReportError, read_folder
from qectomy.runs.produce import run_dir
from qectomy.runs.run_dir import TOLD, RunDir, finished
from qectomy.surgery.materialize import materialize
from qectomy.surgery.nanogpt import import_nanogpt
from qectomy.text.documents import Documents
from qectomy.text.text import Source, check_growth, load_tokenizer, read_source
from qectomy.text.windows import make_windows

NORM = "model.norm.weight"


def rewrite_header(path: Path, change) -> None:
    """Put a changed header text before the same bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_a_tensor_that_stands_twice_in_a_header(tiny_copy):
    folder = tiny_copy()
    entry = re.search(rf'"{NORM}":\{{.*?\}}', (folder / SINGLE).read_bytes()[8:4000].decode(errors="ignore"))
    rewrite_header(folder / SINGLE, lambda text: text.rstrip()[:-1] + "," + entry[0] + "}")
    refused(folder, rf"{SINGLE}: not a whole safetensors file \('{NORM}' stands twice in one object\)")


@pytest.mark.parametrize("length", [0, 20_000_001, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length(tiny_copy, length):
    folder = tiny_copy()
    (folder / SINGLE).write_bytes(length.to_bytes(8, "little") + (folder / SINGLE).read_bytes()[8:])
    refused(folder, rf"{SINGLE}: not a whole safetensors file \(no model has a header of {length:,} bytes\)")


def test_overlapping_tensors(tiny_copy):
    folder = tiny_copy()
    offsets = re.compile(r'"data_offsets":\[(\d+),(\d+)\]')
    first = offsets.search((folder / SINGLE).read_bytes()[8:4000].decode(errors="ignore"))
    rewrite_header(folder / SINGLE, lambda text: offsets.sub(first[0], text))
    refused(folder, f"{SINGLE}: not a whole safetensors file .*offset")


@pytest.mark.parametrize("file", ["config.json", INDEX, SINGLE])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_would_never_end(tiny_copy, file, kind):
    folder = tiny_copy("sharded")
    name = sorted(folder.glob("*.safetensors"))[0].name if file == SINGLE else file
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    message = {
        "config.json": "is not a regular file",
        INDEX: "holds no model.safetensors and no",
        SINGLE: "regular file",
    }
    refused(folder, message[file])


def test_an_index_that_says_another_file(tiny_copy):
    folder = tiny_copy("sharded")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    held = json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    other = next(name for name in shards if name != held)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: other}))
    refused(folder, f"{INDEX} says that {NORM} lies in {other}; it lies in {held}")


def test_an_index_that_lists_a_tensor_that_was_dropped(tiny_copy):
    folder = tiny_copy("sharded")  # as converted from pickles, where a tied head stood twice
    shard = sorted(folder.glob("*.safetensors"))[0].name
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.bias": shard}))
    assert open_checkpoint(folder).tensors


def test_an_index_that_says_another_file_of_a_tensor_that_no_model_needs(tiny_copy):
    folder = tiny_copy("sharded")
    first, other = sorted(folder.glob("*.safetensors"))[:2]
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(first), name: torch.ones(4)}, first)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: other.name}))
    assert name not in open_checkpoint(folder).tensors


def test_a_setting_that_stands_twice(tiny_copy):
    folder = tiny_copy()
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "use_cache": true, "use_cache": true}')
    assert open_checkpoint(folder).config["use_cache"] is True
    (folder / "config.json").write_text(text + ', "hidden_size": 64}')
    refused(folder, r"config.json: .*'hidden_size' stands twice in one object, with two values")


def test_names_that_stand_twice_and_depth():
    with pytest.raises(ValueError, match=r"'a' stands twice in one object$"):
        parse_json(b'{"b": [{"a": 1, "a": 1}]}', once=True)
    for values in (b"1, 2", b"1, true", b"[1], [1.0]", b"1, 2, 1", b"null, 0"):
        first, *others = [b'"a": ' + value for value in values.split(b", ")]
        with pytest.raises(ValueError, match="'a' stands twice in one object, with two values"):
            parse_json(b'{"b": [{' + b", ".join([first, *others]) + b"}]}")
    assert parse_json(b'{"a": [1, {}], "b": 2, "a": [1, {}]}') == {"a": [1, {}], "b": 2}
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    for depth in (MAX_DEPTH + 2, 500, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(b"[" * depth + b"]" * depth)


def test_json_of_a_million_lists():
    with pytest.raises(ValueError, match="it has 1,000,002 lists and objects, more than any model's"):
        parse_json(b"[" + b"[]," * 10**6 + b"[]]")


def test_a_config_that_nests(tiny_copy):
    folder = tiny_copy()
    text = (folder / "config.json").read_text().replace("{", '{"x": ' + "[" * 200 + "]" * 200 + ",", 1)
    (folder / "config.json").write_text(text)
    refused(folder, "config.json: cannot be read as JSON: nested too deeply")


@pytest.mark.parametrize("value", ["x" * 10**6, "\x1b[2J", [[[[1] * 50] * 50] * 50] * 50, 10**400])
def test_a_message_quotes_little_of_a_file(tiny_copy, value):
    folder = tiny_copy()
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=value))
    with pytest.raises(CheckpointError, match="hidden_size must be a positive whole number") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_no_file_gives_orders_to_the_terminal(capsys):
    complain("tensor \x1b]0;owned\x07\u202e has no place" + "x" * 10**6)
    err = capsys.readouterr().err
    assert "owned" in err
    assert not {"\x1b]", "\x07", "\u202e"} & {err[i : i + width] for i in range(len(err)) for width in (1, 2)}
    assert len(err) < 5000
    assert err.endswith("xxx ... (cut)\n")
    complain("x" * 4000)
    assert capsys.readouterr().err == f"error: {'x' * 4000}\n"


@pytest.mark.parametrize("field, name", [("num_attention_heads", "2 and 4"), ("num_hidden_layers", "10000000 and 2")])
def test_gpt2_sizes_under_two_names(tiny_copy, field, name):
    folder = tiny_copy("gpt2")
    said = int(name.split()[0])
    edit_json(folder / "config.json", lambda config: config.update({field: said}))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"{field} is said to be {name}"):
        load_config(checkpoint.family, checkpoint.config)


@pytest.mark.parametrize(
    "field, value", [("rms_norm_eps", float("nan")), ("rms_norm_eps", -1.0), ("sliding_window", 0)]
)
def test_config_numbers_that_no_model_has(tiny_checkpoint, field, value):
    config = json.loads((tiny_checkpoint("mistral") / "config.json").read_text()) | {field: value}
    with pytest.raises(CheckpointError, match=f"{field} must be a "):
        load_config(find_family(config), config)


def test_a_million_layers_of_any_model(tiny_copy):
    folder = tiny_copy()
    for change in ({"num_hidden_layers": 10**7}, {"text_config": {"num_hidden_layers": 10**12}}):
        fields = {"model_type": "qwen3", **change}
        edit_json(folder / "config.json", lambda config, fields=fields: config.update(fields))
        with pytest.raises(CheckpointError, match=r"num_hidden_layers 1000.* is beyond any model"):
            read_config(str(folder))


def test_an_unknown_stored_map_is_named_by_its_layer(tiny_reduced, tmp_path):
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    edit_json(folder / "config.json", lambda config: config["query_maps"].__setitem__(3, "x" * 10**7))
    with pytest.raises(QectomyError, match=r"config.json, layer 3: unknown query map 'xxx") as caught:
        open_checkpoint(folder, reduced=True)
    assert len(str(caught.value)) < 300


def test_a_gauge_where_none_can_be(tiny_copy):
    folder = tiny_copy()
    fields = dict(model_type="qectomy_llama", query_maps=["gauge"] * 2)
    edit_json(folder / "config.json", lambda config: config.update(fields))
    refused(folder, "config.json, layer 0: a model with RoPE has no query map 'gauge'", QueryMapError, reduced=True)


# What is copied along


@pytest.mark.parametrize("target", ["/etc/passwd", "../id_rsa", "../models--a--b/blobs/x"])
def test_a_link_to_a_private_file_is_not_copied(tiny_copy, tmp_path, target):
    folder, out = tiny_copy(), tmp_path / "out"
    out.mkdir()
    (tmp_path / "id_rsa").write_bytes(SECRET)
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "x").write_bytes(SECRET)
    (folder / "LICENSE").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*, outside its folder"):
        copy_companions(folder, out)
    assert not list(out.iterdir())
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("config.json")  # within the folder
    copy_companions(folder, out)
    assert (out / "LICENSE").read_bytes() == (folder / "config.json").read_bytes()


# A run's folder


@pytest.mark.parametrize(
    "name", ["journal", "run.json.draft", "result/model.safetensors", "scratch/teacher-0", "lock", "result", ""]
)
def test_nothing_is_written_through_a_link(tmp_path, name):
    private, work = tmp_path / "private", tmp_path / "out.converting"
    (work / "result").mkdir(parents=True)
    (work / "scratch").mkdir()
    private.write_bytes(SECRET)
    link = work / name
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(private)
    for options in ({}, {"resume": True}, {"clean": True}):
        with pytest.raises((QectomyError, OutputError), match=r"is a link, (or no file|and what)"):
            with run_dir(tmp_path / "out", {}, **options):
                pytest.fail("the folder was entered")
    assert private.read_bytes() == SECRET
    assert not (tmp_path / "out").exists()


def test_a_run_that_lies_on_another_disk_is_not_to_be_removed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.converting").symlink_to(tmp_path / "disk")
    with pytest.raises(QectomyError, match="do not remove that: give an --out that lies beside it there"):
        RunDir(tmp_path / "out").start({}, resume=True)


def test_a_pipe_in_a_runs_folder_is_not_waited_on(tmp_path):
    (tmp_path / "out.converting").mkdir()
    for name in ("journal", "lock"):
        os.mkfifo(tmp_path / "out.converting" / name)
        with pytest.raises(QectomyError, match=f"{name} is a link, or no file"):
            RunDir(tmp_path / "out").start({}, resume=False)
        (tmp_path / "out.converting" / name).unlink()


@pytest.mark.parametrize("told", [b"", b"[]", b'{"seed": 1', b"\xff", None])
def test_an_output_that_does_not_say_what_made_it(tmp_path, told):
    out = tmp_path / "out"
    out.mkdir()
    (out / TOLD).mkdir() if told is None else (out / TOLD).write_bytes(told)
    if told is None:
        assert not finished(out, {})
    else:
        with pytest.raises(QectomyError, match=TOLD):
            finished(out, {})


@pytest.mark.parametrize("count", [1, 9])
def test_a_journal_of_empty_steps(tiny_reduced, tmp_path, count):
    checkpoint, out = open_checkpoint(tiny_reduced(EVERY_MAP), reduced=True), tmp_path / "out"

    def stop(done, total, what):
        raise Stopped("stopped for the test")

    with pytest.raises(Stopped):
        materialize(checkpoint, out, stop)
    work = RunDir(out)
    work.journal.cut(0)
    for _ in range(count):
        work.journal.append(tensors={})
    for _ in range(2):
        with pytest.raises(Untrusted, match=r"the journal lacks .* that makes it.*: start anew with --clean$"):
            materialize(checkpoint, out, resume=True)
    materialize(checkpoint, out, clean=True)
    assert open_checkpoint(out).tensors


def test_a_step_of_a_conversion_that_lacks_what_it_goes_on_from(tiny_checkpoint, tmp_path, raven, capsys):
    source, out = tiny_checkpoint(), tmp_path / "out"

    def stop(done, total, note):
        if done == 1:
            raise Stopped("stopped for the test")

    with pytest.raises(Stopped):
        convert_tiny(source, out, "select", raven, progress=stop)
    work = RunDir(out)
    first, last = work.journal.entries
    assert is_whole(0, first)
    assert is_whole(1, last)
    assert not is_whole(1, first)
    assert not is_whole(0, last)
    kl = {"index": 0, "map": "select", "attention_kl": {"fitted": 0.1}}
    changes = (dict(generator="00"), dict(generator=None), dict(drifted=3), dict(seconds={"fit": "long"}))
    for change in (*changes, dict(total_seconds=[]), dict(teacher_seconds=float("nan")), dict(record=kl)):
        assert not is_whole(1, {**last, **change}), change
    work.journal.cut(1)
    work.journal.append(**{**last, "record": None})
    convert_tiny(source, out, "select", raven, resume=True)
    assert "note: step 2 of 2 in " in capsys.readouterr().err
    convert_tiny(source, tmp_path / "whole", "select", raven)
    assert tensor_hashes(out) == tensor_hashes(tmp_path / "whole")


# Tokenizer and texts


def test_replacements_that_multiply():
    tokenizer = tiny_tokenizer()
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for count, normalizer in ((12, None), (40, {"type": "Sequence", "normalizers": [double] * 40})):
        loaded = type(tokenizer.backend_tokenizer).from_str(json.dumps({**state, "normalizer": normalizer}))
        holder = type("Holder", (), {"backend_tokenizer": loaded})
        if count == 12:
            check_growth(holder)
            continue
        with pytest.raises(ValueError, match="make a text up to 1e\\+12 times as long"):
            check_growth(holder)


def replacing(pattern, content, times):
    """A tokenizer with as many such replacements, one after the other."""
    rule = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    backend = tiny_tokenizer().backend_tokenizer
    state = {**json.loads(backend.to_str()), "normalizer": {"type": "Sequence", "normalizers": [rule] * times}}
    return type("Holder", (), {"backend_tokenizer": type(backend).from_str(json.dumps(state))})


@pytest.mark.parametrize("pattern", ["[aA]", "[^a]", "a", " {2,}", r"\s+", r"\p{L}b*", r"\.", "ab?"])
def test_replacements_that_lengthen_nothing(pattern):
    check_growth(replacing(pattern, "a", 40))
    with pytest.raises(ValueError, match="make a text up to"):
        check_growth(replacing(pattern, "ab", 40))


@pytest.mark.parametrize(
    "pattern", ["", "a*", "[aA]?", "[aA]{0,3}", "a{,3}", "^", "$", "(?=a)", "(a)?", r"\b", r"a\K", "a|", "[a&&b]*"]
)
def test_replacements_between_all_characters(pattern):
    holder = replacing(pattern, "x", 14)
    assert len(holder.backend_tokenizer.normalizer.normalize_str("ab ab")) > 5 or pattern in (r"a\K", "a{,3}", "a|")
    with pytest.raises(ValueError, match="make a text up to"):
        check_growth(holder)


def test_a_tokenizer_that_cannot_read_the_text(tiny_copy):
    folder = tiny_copy()
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<pad>": 4}, "unk_token": "none"}
    edit_json(folder / "tokenizer.json", lambda found: found.update(model=model, added_tokens=[], pre_tokenizer=None))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="the checkpoint's tokenizer cannot read the text: "):
        make_windows(tokenizer, [Source("x", "0", RAVEN)], context=16, tokens=32, vocab_size=320)


def test_bos_beyond_the_embedding():
    tokenizer = bos_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(["<bos>"])
    tokenizer.bos_token = "<bos>"
    bos = tokenizer.bos_token_id
    assert bos >= 320
    single = type(tokenizer.backend_tokenizer.post_processor)(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.backend_tokenizer.post_processor = single
    source = Source("x", "0", RAVEN)
    with pytest.raises(CheckpointError, match=f"makes token id {bos}, but the model's embedding has 320 rows"):
        make_windows(tokenizer, [source], context=16, tokens=32, vocab_size=320)
    with pytest.raises(CheckpointError, match=f"makes token id {bos}, but the model's embedding has 320 rows"):
        scoring_windows(tokenizer, source, Protocol(context=16, tokens=32), 320)


def test_texts_without_an_end(tmp_path):
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with (tmp_path / "long.txt").open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(TextError, match=r"zero.txt is a device"):
        read_source(str(tmp_path / "zero.txt"))
    with pytest.raises(TextError, match=r"zero.txt is a device"):
        next(iter(Documents(str(tmp_path / "zero.txt"))))
    whole_lines = r"head -n 100000 \S+long.txt > part.txt$"
    with pytest.raises(TextError, match=rf"long.txt has more than 4,000,000,000 bytes, .*: {whole_lines}"):
        read_source(str(tmp_path / "long.txt"))


# nanoGPT, reports


def test_an_archive_that_unfolds(tmp_path):
    held = io.BytesIO()
    torch.save({"model_args": made().args, "model": made().state}, held)
    with zipfile.ZipFile(held) as archive, zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as other:
        for part in archive.namelist():
            other.writestr(part, archive.read(part) + b"\0" * 10**5)
    with pytest.raises(CheckpointError, match="its parts are compressed, which PyTorch never does"):
        import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match=r"pipe.pt cannot be read as a PyTorch checkpoint: .*not a regular file"):
        import_nanogpt(tmp_path / "pipe.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reports_without_an_end(tmp_path):
    write_folder(tmp_path, full_report())
    for name in ("evaluation.json", "bench.json"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(ReportError, match=f"{name} cannot be read: {name} is not a regular file"):
            read_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "qectomy.json").unlink()
    (tmp_path / "qectomy.json").symlink_to("/dev/zero")
    with pytest.raises(ReportError, match=r"holds no qectomy.json"):
        read_folder(tmp_path)


def test_shown_is_one_short_line():
    for value in ("a\nb" * 99, {"a": [1] * 99}, [[[[[[[[[1]]]]]]]]], 10**999, 10**5000, [10**5000], "\x1b", None, 1.5):
        assert len(shown(value)) < 400
        assert shown(value).isprintable()
