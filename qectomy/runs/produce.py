"""Make an output: step by step in the folder of its run, whence it goes on after whatever has ended it.

A run that a signal, a full disk or a failing one ends goes on from its last step. One that was refused, for the text or
the weights that it was given, would be again: it leaves nothing behind, unless all its weights were written by then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qectomy.checkpoint.shards import MAX_SHARD_BYTES, ShardWriter, TensorSpec
from qectomy.errors import OutputError, QectomyError, Stopped, Untrusted, note, resumable
from qectomy.progress import Progress
from qectomy.runs.input_hashes import FileWatch
from qectomy.runs.output import cause, check_room, interruptible, make_parents, remove_empty
from qectomy.runs.run_dir import ANEW, GoOn, RunDir, check_out, versions
from qectomy.runs.step_writer import write_steps

Report = TypeVar("Report")


def produce(
    out: Path,
    told: dict[str, Any],
    specs: dict[str, TensorSpec],
    steps: Sequence[Callable[[ShardWriter], None]],
    finish: Callable[[Path, dict[str, str]], Report],
    inputs: FileWatch,
    *,
    resume: GoOn = False,
    clean: bool = False,
    progress: Progress | None = None,
    doing: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Make the output of tensors, some of which each step writes, and return its report.

    `told` is all that decides what it is. `finish(folder, sha256 of each tensor)` writes what lies beside the weights
    and returns the report. Raises as `run_dir` does, Stopped where one of the `inputs` has changed, and OutputError
    where the disk has no room.
    """
    check_room(out, sum(spec.nbytes for spec in specs.values()) - RunDir(out).nbytes())
    with run_dir(out, told, resume=resume, clean=clean) as run:
        digests = write_steps(run, specs, steps, inputs, progress, doing, max_shard_bytes)
        report = finish(run.result, digests)
        inputs.check()
        run.publish()
    return report


@contextmanager
def run_dir(out: Path, fingerprint: dict[str, Any], *, resume: GoOn = False, clean: bool = False) -> Iterator[RunDir]:
    """Yield the folder of a run, new or, with `resume`, as it was left; `clean` removes one that is there.

    The block ends by `publish`. Signals that end a process are treated as Ctrl-C. Raises OutputError where the output
    exists or cannot be written, QectomyError where another run is there, and Stopped for what can be resumed.
    """
    check_out(out, resume=False)
    made = make_parents(out.absolute().parent)
    run = RunDir(out)
    try:
        with interruptible(), _explained(run):
            if clean:
                run.clean()
            if not run.start(versions() | fingerprint, resume) and resume:
                note(f"{run.path} holds nothing to resume; starting anew")
            with _kept_or_removed(run):
                yield run
    finally:
        run.release()
        remove_empty(made)


@contextmanager
def _kept_or_removed(run: RunDir) -> Iterator[None]:
    """Remove the folder of a run that was refused before its weights were written, or has no step to go on from."""
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, QectomyError) and not isinstance(error, OutputError | Stopped)
        if (refused and not run.whole) or not (run.journal.entries or run.must_go_on):
            run.remove()
        raise


@contextmanager
def _explained(run: RunDir) -> Iterator[None]:
    """Say of an error of the system, or an interruption, what it left and how to go on."""
    try:
        yield
    except OSError as error:
        raise _ended(run, OutputError, f"{run.out} could not be written: {cause(error)}") from error
    except Untrusted as error:
        raise Untrusted(str(error) if run.must_go_on else f"{error}: {ANEW}") from error
    except QectomyError as error:
        if not isinstance(error, OutputError | Stopped) and not run.whole:
            raise
        raise _ended(run, type(error), str(error).rstrip(".")) from error
    except KeyboardInterrupt as error:
        if not run.journal.entries:
            raise
        raise _ended(run, Stopped, "interrupted") from error


def _ended(run: RunDir, kind: type[QectomyError], why: str) -> QectomyError:
    """Return the error of a run that ended early, which says what lies on the disk and whether to go on from it.

    A result that was refused would be again: what was done is there, but nothing passes by itself.
    """
    if not run.path.exists():
        left = f"{run.out} is whole." if run.out.exists() else "Nothing was left behind."
        return kind(f"{why}. {left}")
    error = kind(f"{why}. {run.path} holds what was done: go on with --resume, or {ANEW}.")
    return resumable(error) if issubclass(kind, OutputError | Stopped) else error
