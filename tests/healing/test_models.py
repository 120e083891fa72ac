"""Student and teacher: which belong together, what is trained, and that their loss is that of whole logits."""

import re
import shutil

import pytest
import torch
from conversions import reload_here
from damage import edit_json
from tiny_models import load_reduced, tokens
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import CheckpointError, QectomyError
from qectomy.healing.models import (
    Distillation,
    is_trained,
    load_student,
    load_teacher,
    open_pair,
    stream_basis,
)

MIXED = ("key-shared", "dense", "select", "low-rank:3")


# Which belong together


def test_a_fitted_checkpoint_and_its_original(pair):
    for name, query in (("llama", "key-shared"), ("gpt2", "select"), ("llama", "identity")):
        found = pair(name, query)
        student, original = open_pair(str(found.reduced), str(found.original))
        assert (student.folder, original.folder) == (found.reduced, found.original)
        assert student.reduced
        assert not original.reduced


def test_a_head_that_was_untied_is_no_difference(tiny_reduced, tiny_checkpoint):
    student, original = open_pair(str(tiny_reduced(("select", "select"))), str(tiny_checkpoint("tied")))
    assert original.dims.tied
    assert not student.dims.tied


def refused(reduced, teacher, message, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_pair(str(reduced), str(teacher))
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_teacher_that_is_reduced_itself(pair):
    found = pair()
    refused(found.reduced, found.reduced, "already reduced", QectomyError)


def test_a_student_that_is_not_reduced(pair):
    found = pair()
    refused(found.original, found.original, "is not a checkpoint that qectomy reduced", QectomyError)


def test_a_teacher_of_another_family(pair):
    refused(
        pair().reduced,
        pair("gpt2", "select").original,
        r"llama is of the family llama, its teacher .* of gpt2; the teacher is the original that the reduced",
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_hidden_layers": 3}, r"differ in n_layers \(2 and 3\); the teacher is the original"),
        ({"intermediate_size": 48, "vocab_size": 330}, r"differ in d_mlp \(40 and 48\), vocab_size \(320 and 330\);"),
        ({"num_key_value_heads": 4}, r"differ in n_kv_heads \(2 and 4\);"),
    ],
)
def test_a_teacher_of_other_sizes(pair, tiny_checkpoint, overrides, message):
    refused(pair().reduced, tiny_checkpoint(**overrides), message)


def test_a_checkpoint_that_was_folded_exactly(tiny_checkpoint, tmp_path, monkeypatch):
    reload_here(monkeypatch)
    for name in ("llama", "gpt2"):
        source = tiny_checkpoint(name)
        convert_exact(open_checkpoint(source), tmp_path / name, ConvertSettings(), frozenset())
        refused(tmp_path / name, source, "was folded exactly: it computes what its original does, .* nothing to heal")


def test_another_tokenizer(pair, tmp_path):
    found = pair()
    changed = shutil.copytree(found.original, tmp_path / "original")
    open_pair(str(found.reduced), str(changed))

    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_json(changed / "tokenizer.json", swap)
    refused(
        found.reduced, changed, r"have different tokenizers, so their predictions cannot be compared token by token"
    )


def test_no_tokenizer(pair, tmp_path):
    found = pair()
    changed = shutil.copytree(found.original, tmp_path / "original")
    for path in changed.glob("tokenizer*"):
        path.unlink()
    refused(found.reduced, changed, "holds no tokenizer")


# What is trained


def trained(checkpoint, train):
    model = load_student(checkpoint)
    chosen = is_trained(checkpoint, train)
    return {name for name, _ in model.named_parameters() if chosen(name)}, {
        name for name, _ in model.named_parameters()
    }


WANTED = {
    ("llama", "attention"): r"model\.layers\.\d+\.(self_attn\..*|input_layernorm\.weight)",
    ("llama", "query-key"): r"model\.layers\.\d+\.(self_attn\.(query\..*|k_proj\..*)|input_layernorm\.weight)",
    ("gpt2", "attention"): r"transformer\.h\.\d+\.(attn\..*|ln_1\.(weight|bias))",
    ("gpt2", "query-key"): r"transformer\.h\.\d+\.(attn\.c_attn\..*|ln_1\.(weight|bias))",
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_is_every_parameter(family, tiny_reduced):
    chosen, there = trained(open_checkpoint(tiny_reduced(MIXED, family), reduced=True), "all")
    assert chosen == there


@pytest.mark.parametrize("family, train", WANTED)
def test_parts_are_chosen_by_their_role(family, train, tiny_reduced):
    chosen, there = trained(open_checkpoint(tiny_reduced(MIXED, family), reduced=True), train)
    assert chosen == {name for name in there if re.fullmatch(WANTED[family, train], name)}
    for layer in range(4):
        own = [name for name in chosen if f".{layer}." in name]
        assert sum(name.endswith(("k_proj.weight", "c_attn.weight")) for name in own) == 1
        assert any("query" in name for name in own) == (MIXED[layer] != "dense")


def test_query_key_trains_the_map_but_no_value_and_no_output(tiny_reduced):
    chosen, _ = trained(open_checkpoint(tiny_reduced(("key-shared", "low-rank:3")), reduced=True), "query-key")
    inner = {name.removeprefix("model.layers.") for name in chosen}
    assert {"0.self_attn.k_proj.weight", "0.input_layernorm.weight"} <= inner
    assert sum("self_attn.query" in name for name in inner) >= 3
    assert not [name for name in inner if "v_proj" in name or "o_proj" in name or "mlp" in name]


def test_a_layers_number_is_not_the_beginning_of_anothers(tiny_reduced):
    chosen, _ = trained(open_checkpoint(tiny_reduced(("select",) * 12), reduced=True), "attention")
    assert len([name for name in chosen if name.endswith("o_proj.weight")]) == 12


# Loading


@pytest.mark.parametrize(
    "name, fields", [("gpt2", ("attn_pdrop", "resid_pdrop", "embd_pdrop")), ("llama", ("attention_dropout",))]
)
def test_neither_model_drops_anything(name, fields, pair, tmp_path):
    found = pair(name, "select")
    changed = shutil.copytree(found.reduced, tmp_path / "reduced")
    edit_json(changed / "config.json", lambda config: config.update(dict.fromkeys(fields, 0.5)))
    model, ids = load_student(open_checkpoint(changed, reduced=True)).train(), tokens()
    with torch.no_grad():
        dropless = [model(input_ids=ids).logits for _ in range(2)]
        torch.testing.assert_close(*dropless, rtol=0, atol=0)
        torch.testing.assert_close(dropless[0], model.eval()(input_ids=ids).logits)
    assert not load_teacher(open_checkpoint(found.original), "float32", "cpu").training


def test_types(pair):
    found = pair("bf16", "key-shared")
    student = load_student(open_checkpoint(found.reduced, reduced=True))
    teacher = load_teacher(open_checkpoint(found.original), "bfloat16", "cpu")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# The stream's basis


def models(found):
    student, teacher = open_pair(str(found.reduced), str(found.original))
    return load_student(student), load_teacher(teacher, "float32", "cpu")


@pytest.mark.parametrize("name, query", [("llama", "key-shared"), ("llama", "select"), ("gpt2", "identity")])
def test_a_stream_that_stayed_as_it_was(name, query, pair):
    assert stream_basis(*models(pair(name, query))) is None


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_a_stream_that_was_turned(name, pair):
    student, teacher = models(pair(name, "identity"))
    basis = stream_basis(student, teacher)
    theirs, ours = (model.get_input_embeddings().weight for model in (teacher, student))
    assert not torch.allclose(ours, theirs, atol=0.1)
    torch.testing.assert_close(theirs @ basis, ours, rtol=0, atol=1e-2 if name == "bf16" else 1e-5)
    assert basis.dtype == torch.float32


def test_embeddings_that_have_nothing_to_do_with_each_other(pair):
    student, teacher = models(pair())
    with torch.no_grad():
        student.get_input_embeddings().weight.normal_()
    with pytest.raises(
        CheckpointError,
        match=r"no change of basis takes the teacher's embedding to the student's \(\d.*\d is left over\)",
    ) as caught:
        stream_basis(student, teacher)
    assert str(caught.value).endswith("give --hidden-weight 0")


# The loss


def layer_outputs(model, layers, ids):
    """Logits, and what each layer but the last gives, seen by hooks."""
    seen, hooks = [], []
    for layer in layers[:-1]:
        hooks.append(
            layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    for hook in hooks:
        hook.remove()
    return logits, seen


def layers_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


CASES = [("llama", "key-shared"), ("llama", "identity"), ("tied", "select"), ("gpt2", "select"), ("gpt2", "key-shared")]


@pytest.mark.parametrize("ce_weight, hidden_weight", [(0.0, 0.0), (1.0, 0.0), (0.3, 0.0), (0.3, 0.7)])
@pytest.mark.parametrize("name, query", CASES)
def test_the_loss_is_that_of_both_models_whole_logits(name, query, pair, ce_weight, hidden_weight):
    found = pair(name, query)
    student, teacher = models(found)
    basis = stream_basis(student, teacher)
    criterion = Distillation(teacher, ce_weight, hidden_weight, basis)
    criterion.attach_(student)
    ids = tokens(3, 21)
    with torch.no_grad():
        given = student(input_ids=ids, teacher_states=criterion.teach(ids))

    ours, our_states = layer_outputs(fresh := load_reduced(found.reduced), layers_of(fresh), ids)
    stock = AutoModelForCausalLM.from_pretrained(found.original, dtype=torch.float32)
    theirs, their_states = layer_outputs(stock, layers_of(stock), ids)
    s, t = (logits[:, :-1].log_softmax(-1) for logits in (ours, theirs))
    kl = kl_div(s, t, reduction="none", log_target=True).sum(-1)
    nll = cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 20)
    loss = (1 - ce_weight) * kl.mean() + ce_weight * nll.mean()
    if hidden_weight:
        assert len(our_states) == len(their_states) == 1
        wanted = their_states[0].double()
        if query == "identity" and name != "gpt2":
            E, F = (m.get_input_embeddings().weight.double() for m in (stock, fresh))
            wanted = wanted @ (torch.linalg.pinv(E.detach()) @ F.detach())
        loss = loss + hidden_weight * ((our_states[0].double() - wanted) ** 2).sum() / (wanted**2).sum()
    torch.testing.assert_close(given["loss"].double(), loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given["kl"].double(), kl.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given["nll"].double(), nll.mean(1), rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_every_parameter_of_the_student_and_none_of_the_teacher(pair):
    student, teacher = models(pair())
    criterion = Distillation(teacher, 0.3, 0.5, None)
    criterion.attach_(student)
    ids = tokens(2, 17)
    student(input_ids=ids, teacher_states=criterion.teach(ids))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_computes_in_its_own_type_under_autocast(pair):
    _, teacher = models(pair())
    criterion = Distillation(teacher, 0.0)
    ids = tokens()
    plain = criterion.teach(ids)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion.teach(ids)[-1], plain)
    assert plain.dtype == torch.float32


def test_the_student_is_saved_without_its_teacher(pair):
    found = pair()
    student, teacher = models(found)
    before = set(student.state_dict())
    Distillation(teacher, 0.0).attach_(student)
    assert set(student.state_dict()) == before
    assert set(open_checkpoint(found.reduced, reduced=True).tensors) <= before
