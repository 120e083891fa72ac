"""`qectomy.bench`: what loading, prefill and decoding take of two checkpoints, in turn."""

import os
from typing import TYPE_CHECKING, Annotated

from qectomy.api.arguments import begin, path_or_none
from qectomy.api.options import Argument, Device, Name, Numbers, Option
from qectomy.progress import Progress, stage

if TYPE_CHECKING:
    from qectomy.record.bench import Bench


def bench(
    original: Annotated[Name, Argument("Folder or hub id of the original.")],
    reduced: Annotated[Name, Argument("Folder of the reduced checkpoint, or of any other.")],
    *,
    batch: Annotated[Numbers | None, Option("Sequences at a time. May be repeated. Default: 1 and 16.", min=1)] = None,
    rounds: Annotated[int, Option("Rounds of both in turn; six or more give a 95 % interval.", min=1)] = 7,
    starts: Annotated[
        int | None,
        Option("Rounds of fresh processes, for load time and memory; 0: none. Default: as --rounds.", min=0),
    ] = None,
    prompt_tokens: Annotated[
        int | None, Option("Tokens of the prompt. Default: 512, or what both models were made for if less.", min=1)
    ] = None,
    new_tokens: Annotated[int, Option("Tokens decoded after it.", min=1)] = 32,
    dtype: Annotated[
        str | None, Option("Type to compute in, both: float32, bfloat16, float16. Default: the original's.")
    ] = None,
    threads: Annotated[int | None, Option("Threads on a CPU. Default: torch's.", min=1)] = None,
    compile: Annotated[
        bool, Option("Compile a step of decoding, with a cache of fixed size; on CUDA as a graph.")
    ] = False,
    seed: Annotated[int, Option("Seed of the random tokens that both read.", min=0, max=2**31 - 1)] = 0,
    save: Annotated[
        Name | None,
        Option("Write the result as JSON too, as REDUCED/bench.json; an earlier one goes.", path=True),
    ] = None,
    device: Device = "cpu",
    progress: bool | Progress = False,
    command: str | None = None,
) -> "Bench":
    """Time two checkpoints in turn, next to what the bytes they read allow; return what `qectomy bench --json` prints.

    The options are those of `qectomy bench`. `progress`: True for bars on stderr, or a function (done, total, note).
    `command`: what the result says made it; by default this call. Raises QectomyError.
    """
    command = begin(bench, locals())
    from qectomy.conversion.fitted import check_device
    from qectomy.eval.inference_cost import BenchSettings, compare
    from qectomy.report.saved import check_savable, save_result

    if (where := path_or_none(save)) is not None:
        check_savable(where, "bench")
    batches = (batch,) if isinstance(batch, int) else tuple(dict.fromkeys(batch or (1, 16)))
    settings = BenchSettings(
        batches=batches,
        rounds=rounds,
        starts=starts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=check_device(device),
        dtype=dtype,
        threads=threads,
        compile=compile,
        seed=seed,
    )
    with stage(progress, "timing") as report:
        result = compare(os.fspath(original), os.fspath(reduced), settings, report, command)
    if where is not None:
        save_result(result, where)
    return result
