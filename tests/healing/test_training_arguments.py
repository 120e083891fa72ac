"""What Trainer is told of a run."""

import pytest

from qectomy.errors import QectomyError
from qectomy.healing import training_arguments as module
from qectomy.healing.checkpoints import Checkpoints
from qectomy.healing.plan import Plan
from qectomy.healing.settings import HealSettings
from qectomy.healing.training_arguments import training_arguments
from qectomy.runs.run_dir import HEALING, RunDir


@pytest.fixture
def arguments(tmp_path):
    """Return a function (plan's steps, steps, starts, settings) -> TrainingArguments."""

    def make(planned=200, steps=200, starts=True, **settings):
        told = HealSettings(**{"texts": ("a",), "context": 32, "dtype": "float32", "lr": 1e-3, **settings})
        return training_arguments(
            told, Plan(planned, 3, 4, 12, 384), steps, Checkpoints(RunDir(tmp_path / "out", HEALING)), starts
        )

    return make


def test_what_was_told_arrives(arguments, tmp_path):
    found = arguments(lr=2e-3, weight_decay=0.25, clip=0.7, seed=11, evaluations=8)
    assert found.output_dir == str(tmp_path / "out.healing/checkpoints")
    assert (found.max_steps, found.per_device_train_batch_size, found.gradient_accumulation_steps) == (200, 3, 4)
    assert found.per_device_eval_batch_size == 3
    assert (found.learning_rate, found.weight_decay, found.max_grad_norm, found.seed) == (2e-3, 0.25, 0.7, 11)
    assert (found.eval_steps, found.save_steps, found.logging_steps) == (25, 25, 1)
    assert found.lr_scheduler_type == "cosine"
    assert found.metric_for_best_model == "eval_objective"
    assert found.greater_is_better is False
    assert found.load_best_model_at_end
    assert found.eval_on_start
    assert found.use_cpu
    assert not found.bf16
    assert not arguments(starts=False).eval_on_start


@pytest.mark.parametrize("warmup, wanted", [(0.0, 0), (0.05, 10), (1.0, 200)])
def test_warmup_is_a_part_of_the_planned_steps(arguments, warmup, wanted):
    """Also where the run ended sooner: the rates of its steps stay what they were."""
    assert arguments(warmup=warmup).warmup_steps == wanted
    assert arguments(warmup=warmup, steps=40).warmup_steps == wanted


@pytest.mark.parametrize(
    "planned, evaluations, every", [(3, 10, 1), (1, 1, 1), (1000, 10, 100), (19, 2, 10), (19, 10, 2)]
)
def test_validations_are_spread_over_the_planned_steps(arguments, planned, evaluations, every):
    """No more of them than were asked for."""
    found = arguments(planned, planned, evaluations=evaluations)
    assert found.eval_steps == found.save_steps == every
    assert found.logging_steps == max(1, every // 20)


def test_types_and_reports(arguments):
    assert arguments(dtype="bfloat16").bf16
    assert arguments().report_to == []


def test_only_reporters_that_are_there(arguments, monkeypatch):
    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    assert module.reporters(HealSettings(texts=("a",), context=32, report_to="tensorboard,wandb")) == [
        "tensorboard",
        "wandb",
    ]
    with pytest.raises(QectomyError, match=r"--report-to tensorbord: not installed, or not .* tensorboard, wandb"):
        arguments(report_to="tensorbord")


def test_a_process_takes_one_gpu(arguments):
    found = arguments()
    found._n_gpu = 8
    assert found.n_gpu == 8
    module.take_one_gpu_(found)
    assert found.n_gpu == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_activation_checkpointing_by_whichever_name_it_has(arguments, wanted):
    found = arguments(activation_checkpointing=wanted)
    assert (getattr(found, "activation_checkpointing", None) or found.gradient_checkpointing or False) is wanted
