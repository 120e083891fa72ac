"""The command that times two checkpoints side by side; `cli.py` registers it."""

from pathlib import Path
from typing import Annotated

import typer

from qectomy.commands.convert import Device
from qectomy.commands.terminal import Json, command_line, print_json
from qectomy.progress import progress_bar


def bench(
    original: Annotated[str, typer.Argument(help="Folder or hub id of the original.")],
    reduced: Annotated[str, typer.Argument(help="Folder of the reduced checkpoint, or of any other.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences at a time. May be repeated. Default: 1 and 16.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of both in turn; six or more give a 95 % interval.")] = 7,
    starts: Annotated[
        int | None,
        typer.Option(min=0, help="Rounds of fresh processes, for load time and memory; 0: none. Default: as --rounds."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt. Default: 512, or what both models were made for if less."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type to compute in, both: float32, bfloat16, float16. Default: the original's."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: torch's.")] = None,
    compile_steps: Annotated[
        bool,
        typer.Option("--compile", help="Compile a step of decoding, with a cache of fixed size; on CUDA as a graph."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the random tokens that both read.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Write the result as JSON too, as REDUCED/bench.json; an earlier one goes.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time loading, prefill and decoding of two checkpoints in turn, next to what the bytes they read allow."""
    from qectomy.conversion.fitted import check_device
    from qectomy.eval.inference_cost import BenchSettings, compare
    from qectomy.report.bench_table import show_bench
    from qectomy.report.record import made
    from qectomy.report.saved import check_savable, save_result

    if save is not None:
        check_savable(save, "bench")
    settings = BenchSettings(
        batches=tuple(dict.fromkeys(batch or (1, 16))),
        rounds=rounds,
        starts=starts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=check_device(device),
        dtype=dtype,
        threads=threads,
        compile=compile_steps,
        seed=seed,
    )
    with progress_bar("timing") as progress:
        measured = compare(original, reduced, settings, progress)
    result = {**made(command_line()), "kind": "bench", **measured}
    if save is not None:
        save_result(result, save)
    if as_json:
        print_json(result)
    else:
        show_bench(result)
        if save is not None:
            typer.echo(f"wrote {save}")
