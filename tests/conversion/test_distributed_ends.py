"""Several processes end as one does: with one output, one error, or what can be resumed."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conversions import convert_tiny
from interruptions import same_output
from launches import KILLED, launched, several

from qectomy.calibrate import layer_fit, refit
from qectomy.conversion.layerwise import LayerPass
from qectomy.errors import NonFiniteError, OutputError, QectomyError, Stopped
from qectomy.runs.run_dir import RunDir
from qectomy.runs.step_writer import StepWriter


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, raven, tmp_path_factory):
    """A run of two processes that nothing stops: its source and its output."""
    source, out = tiny_checkpoint("llama", num_hidden_layers=3), tmp_path_factory.mktemp("whole") / "out"
    begun = time.perf_counter()
    found = several(source, out, "key-shared", raven)
    assert isinstance(found[0], dict), found
    return source, out, time.perf_counter() - begun


def killed_after(steps, rank):
    """Let one process be killed when so many steps are kept, whatever the other one does by then."""

    def before(processes):
        layer = LayerPass._run_student

        def run(self, index, *rest):
            if index == steps - 1 and self.share.processes.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return layer(self, index, *rest)

        LayerPass._run_student = run

    return before


@pytest.mark.parametrize("query", ["key-shared", "select"])
def test_what_other_processes_solve_does_not_count(query, whole, raven, tmp_path):
    """Their processors may round otherwise: they have their share of the sums, and the first one's solutions."""

    def before(processes):
        if processes.rank == 1:
            fitted_map, refine, solve = layer_fit.fitted_map, layer_fit.refine, refit.ridge_

            def other(start):
                query = {name: tensor.roll(1, 0) for name, tensor in start.query.items()}
                return replace(start, W_K=1.01 * start.W_K, query=query)

            def other_map(spec):
                fit = fitted_map(spec)
                init = lambda *arguments: other(fit.init(*arguments))  # noqa: E731
                return SimpleNamespace(init=init, preconditioned=fit.preconditioned)

            layer_fit.fitted_map = other_map
            layer_fit.refine = lambda *arguments: other(refine(*arguments))
            refit.ridge_ = lambda *arguments: 1.01 * solve(*arguments)

    outs = tmp_path / "plain", tmp_path / "perturbed"
    several(whole[0], outs[0], query, raven)
    several(whole[0], outs[1], query, raven, before=before)
    same_output(*outs)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_which_goes_on(rank, whole, raven, tmp_path, capfd):
    source, expected, _ = whole
    out = tmp_path / "out"
    found = several(source, out, "key-shared", raven, before=killed_after(2, rank))
    assert found[rank] == KILLED
    assert type(found[1 - rank]) is Stopped
    assert str(found[1 - rank]).startswith("another process of this run is gone (")
    if rank == 1:
        left = f"{out}.converting holds what was done: go on with --resume, or start anew with --clean."
        assert str(found[0]).endswith(left)
    assert len(RunDir(out).journal.entries) == 2
    for count, options in ((1, {}), (3, {})):
        refused = several(source, out, "key-shared", raven, count=count, resume=True, **options)
        assert [type(error) for error in refused] == [QectomyError] * count
        assert f"holds another run: processes was 2, is {count}." in str(refused[0])
    resumed = several(source, out, "key-shared", raven, resume=True)
    assert isinstance(resumed[0], dict), resumed
    same_output(out, expected)
    assert not RunDir(out).path.exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, (0,)), (signal.SIGTERM, (0, 1)), (signal.SIGINT, (0, 1))])
def test_an_interruption_ends_all_and_the_run_goes_on(number, ranks, whole, raven, tmp_path):
    """As by a launcher, which sends SIGTERM, or by Ctrl-C, which all processes get."""

    def before(processes):
        layer = LayerPass._run_student

        def run(self, index, *rest):
            if index == 1 and processes.rank in ranks:
                os.kill(os.getpid(), number)
            return layer(self, index, *rest)

        LayerPass._run_student = run

    source, expected, _ = whole
    out = tmp_path / "out"
    first, other = several(source, out, "key-shared", raven, before=before)
    assert type(first) is Stopped
    assert str(first).startswith(f"interrupted. {out}.converting holds what was done: go on with --resume")
    if ranks == (0,):
        assert type(other) is Stopped
    else:
        assert other == KILLED or isinstance(other, KeyboardInterrupt)
    assert resumed(source, out, raven)[0] == (1, "done before: going on from there")
    same_output(out, expected)


def killed_at(rank, seconds):
    """Let one process be killed after a while."""

    def before(processes):
        if processes.rank == rank:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    return before


def test_killed_at_random_moments(whole, raven, tmp_path):
    source, expected, seconds = whole
    chance, out = random.Random(5), tmp_path / "out"
    for _ in range(5):
        rank, at = chance.randrange(2), chance.uniform(0.2, 0.8) * seconds
        found = several(source, out, "key-shared", raven, before=killed_at(rank, at), resume=True)
        if out.exists():  # also where the second one is killed after that
            break
        assert KILLED in found
        assert {type(outcome) for outcome in found if outcome != KILLED} <= {Stopped}
    else:
        found = several(source, out, "key-shared", raven, resume=True)
        assert isinstance(found[0], dict), found
    same_output(out, expected)


def killed_when_kept(steps, written):
    """Let the first process be killed when so many steps are kept, before or after the last one's entry is written.

    It comes late, so that the other one could go on.
    """

    def before(processes):
        keep = StepWriter.keep

        def kept(self, **more):
            last = len(self._run.journal.entries) == steps - 1
            if not last or written:
                keep(self, **more)
            if last:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)

        StepWriter.keep = kept

    return before


def resumed(source, out, text):
    """Resume in two processes; return what the first one said of it at once. The other one says nothing."""

    def act(processes):
        said = []
        tell = lambda done, total, note: said.append((done, note))  # noqa: E731
        convert_tiny(source, out, "key-shared", text, processes=processes, resume=True, progress=tell)
        return said

    said, nothing = launched(2, act)
    assert nothing == []
    return said[:-1]


def test_a_step_is_whole_in_all_processes_before_any_goes_on(whole, raven, tmp_path):
    """What a layer leaves lies where its predecessor's states lay: the journal has to know them first."""
    source, expected, _ = whole
    out = tmp_path / "out"
    found = several(source, out, "key-shared", raven, before=killed_when_kept(3, written=False))
    assert found[0] == KILLED
    assert resumed(source, out, raven)[0] == (1, "done before: going on from there")
    same_output(out, expected)


def test_states_of_one_process_that_are_damaged_cost_a_layer(whole, raven, tmp_path, capfd):
    source, expected, _ = whole
    out = tmp_path / "out"
    several(source, out, "key-shared", raven, before=killed_when_kept(3, written=True))
    states = RunDir(out).scratch / "process-1" / "student-2"  # as they enter the third layer
    data = bytearray(states.read_bytes())
    data[100] ^= 1
    states.write_bytes(data)
    assert resumed(source, out, raven)[0] == (1, "done before: going on from there")
    assert capfd.readouterr().err.count("was damaged on the disk: going back to step") == 1
    same_output(out, expected)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "error, kind, message, left",
    [
        (NonFiniteError("layer 1 is no number"), NonFiniteError, "layer 1 is no number", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError, "could not be written: the disk is full", True),
        (ZeroDivisionError("by zero"), Stopped, "process {} has failed, ZeroDivisionError: by zero. ", True),
    ],
)
def test_an_error_in_one_process_is_that_of_all(rank, error, kind, message, left, whole, raven, tmp_path):
    def before(processes):
        layer = LayerPass._run_student

        def run(self, index, *rest):
            if index == 1 and processes.rank == rank:
                raise error
            return layer(self, index, *rest)

        LayerPass._run_student = run

    found = several(whole[0], tmp_path / "out", "key-shared", raven, before=before)
    assert type(found[0]) is kind
    assert message.format(rank) in str(found[0])
    assert type(found[1]) in (kind, type(error))
    assert [path.name for path in tmp_path.iterdir()] == ["out.converting"] * left
    assert ("--resume" in str(found[0])) == left


FAILING = """
import os, sys
from qectomy.conversion.layerwise import LayerPass
from qectomy.errors import NonFiniteError

def fail(self, *given):
    raise NonFiniteError("a layer is no number")

if os.environ["RANK"] == "1":
    LayerPass._run_student = fail
from qectomy.cli import main
main()
"""


def test_torchrun_ends_all_with_the_error_of_one(whole, raven, tmp_path):
    """Whatever a process has imported since it found the others, it can close its connections to them."""
    script, out = tmp_path / "failing.py", tmp_path / "out"
    script.write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += ["convert", whole[0], "--out", out, "--query", "select", "--text", raven, "--tokens", "320"]
    command += ["--context", "32", "--eval-tokens", "160"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error: " in line] == ["error: a layer is no number"]
    assert "[c10d]" not in done.stderr
    assert list(tmp_path.iterdir()) == [script]


def test_an_error_before_and_after_the_pass_is_that_of_all(whole, raven, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    found = several(whole[0], tmp_path / "out", "key-shared", raven)
    assert [type(error) for error in found] == [OutputError] * 2
    assert str(found[0]) == str(found[1])
    monkeypatch.setattr(StepWriter, "finish", lambda self: (_ for _ in ()).throw(OutputError("no more")))
    found = several(whole[0], tmp_path / "other", "key-shared", raven)
    assert [type(error) for error in found] == [OutputError] * 2
    assert "no more" in str(found[1])


def test_processes_that_were_told_different_things(whole, raven, tmp_path):
    def act(processes):
        return convert_tiny(whole[0], tmp_path / "out", "key-shared", raven, processes=processes, seed=processes.rank)

    assert [str(error) for error in launched(2, act)] == [
        "process 1 works on something else than process 0: seed was 0, is 1"
    ] * 2

    def elsewhere(processes):
        return convert_tiny(whole[0], tmp_path / f"out-{processes.rank}", "key-shared", raven, processes=processes)

    found = launched(2, elsewhere)
    assert [type(error) for error in found] == [QectomyError] * 2
    assert str(found[0]) == (
        f"process 1 does not see {tmp_path}/out-0.converting: all processes need one folder; put --out on a disk that "
        "all hosts see"
    )
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_windows(whole, raven, tmp_path):
    found = several(whole[0], tmp_path / "out", "key-shared", raven, tokens=32)
    assert [str(error) for error in found] == [
        "2 processes, but only 1 window(s) to fit on, and each needs one: start no more than that, or give more "
        "--tokens"
    ] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_ends_first(rank):
    """A launcher ends all as soon as one has failed: the others wait until it is gone, and no longer."""

    def act(processes):
        begun = time.monotonic()
        try:
            with processes.collective():
                if processes.rank == rank:
                    raise QectomyError("no")
                processes.barrier()
        except QectomyError as error:
            if processes.is_main:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            return str(error), time.monotonic() - begun

    main, (said, waited) = launched(2, act)
    assert (main, said) == (KILLED, "no")
    assert 0.4 < waited < 20


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_system_keeps_its_file(rank):
    """In the process that met it, it is the one that was raised."""

    def act(processes):
        met = FileNotFoundError(errno.ENOENT, "No such file or directory", "calibration.txt")
        try:
            with processes.collective():
                if processes.rank == rank:
                    raise met
        except OSError as error:
            return str(error), error is met

    said = "[Errno 2] No such file or directory: 'calibration.txt'"
    assert launched(2, act) == [(said, rank == 0), (said, rank == 1)]
