"""What healing may be told, and what it says to all else."""

import math
import re

import pytest

from qectomy.errors import QectomyError
from qectomy.healing import devices
from qectomy.healing.settings import TRAINED, HealSettings


def told(**values):
    return HealSettings(**{"texts": ("a.txt",), "context": 32, **values})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train": "some"}, r"unknown --train 'some'; known: all, attention, query-key$"),
        ({"loss": "mse"}, r"unknown --loss 'mse'; known: kl, ce, mixed$"),
        ({"dtype": "float16"}, r"unknown --dtype 'float16'; known: float32, bfloat16$"),
        ({"self_generated": True}, r"--self-generated takes the place of a text; give one or the other$"),
        ({"texts": ()}, r"no text to heal on: give --text FILE or --dataset NAME .* or --self-generated to let"),
        ({"lr": 0.0}, r"--lr 0\.0 must be above 0$"),
        ({"lr": -1e-3}, r"--lr -0\.001 must be above 0$"),
        ({"lr": math.nan}, r"--lr nan must be above 0$"),
        ({"minutes": 0.0}, r"--minutes 0\.0 must be above 0$"),
        ({"minutes": -2.0}, r"--minutes -2\.0 must be above 0$"),
        ({"clip": 0.0}, r"--clip 0\.0 must be above 0$"),
        ({"ce_weight": 1.01}, r"--ce-weight 1\.01 must lie between 0 and 1$"),
        ({"ce_weight": -0.1}, r"--ce-weight -0\.1 must lie between 0 and 1$"),
        ({"ce_weight": math.nan}, r"--ce-weight nan must lie between 0 and 1$"),
    ],
)
def test_values_that_no_run_can_use(values, message):
    with pytest.raises(QectomyError) as caught:
        told(**values)
    assert re.match(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"ce_weight": 0.0},
        {"ce_weight": 1.0},
        {"lr": 1e-9},
        {"minutes": 0.01},
        {"texts": (), "self_generated": True},
        {"dtype": None},
        *({"train": name} for name in TRAINED),
    ],
    ids=str,
)
def test_values_at_the_edge(values):
    assert told(**values)


def test_the_learning_rate_is_given_or_goes_by_the_width_and_the_step():
    assert told().learning_rate(400, 4096) == pytest.approx(1e-4)
    assert told().learning_rate(400, 10**6) == pytest.approx(1e-4)
    assert told().learning_rate(400, 1024) == pytest.approx(5e-5)
    assert told().learning_rate(4000, 4096) == pytest.approx(1e-5)
    assert told(lr=0.5).learning_rate(400, 1) == 0.5
    assert told(dtype="float32").resolved().dtype == "float32"
    assert told().resolved().dtype == told().compute_dtype


def test_the_weight_of_the_cross_entropy():
    weights = [told(loss=loss, ce_weight=0.3).cross_entropy for loss in ("kl", "ce", "mixed")]
    assert weights == [0.0, 1.0, 0.3]


@pytest.mark.parametrize("capable", [True, False])
def test_products_are_of_the_type_that_was_given_or_suits_the_device(capable, monkeypatch):
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda _: capable)
    assert told().compute_dtype == ("bfloat16" if capable else "float32")
    assert told(dtype="float32").compute_dtype == "float32"
    assert told(dtype="bfloat16").compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    "capabilities, wanted", [({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)]
)
def test_a_cpu_multiplies_bfloat16_where_it_has_tiles_for_it(capabilities, wanted, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert devices.multiplies_bfloat16("cpu") is wanted
    monkeypatch.delattr("torch.cpu.get_capabilities")  # as in an older torch
    assert devices.multiplies_bfloat16("cpu") is False


@pytest.mark.parametrize("answer", [True, False])
def test_a_gpu_is_asked_without_emulation(answer, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: asked.append(options) or answer)
    assert devices.multiplies_bfloat16("cuda:1") is answer
    assert asked == [{"including_emulation": False}]
