"""What a launcher, as torchrun, has told this process: the environment is read here and nowhere else."""

import os
from dataclasses import dataclass

from qectomy.errors import QectomyError, shown


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many processes were started, and which of them this is."""

    count: int
    rank: int


def launch() -> Launch:
    """Return how this process was started. Raises QectomyError for an environment of which no run can come.

    A cluster may set WORLD_SIZE for every job. Without the rest that torchrun sets, processes cannot find each other.
    """
    count = _number("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1
    if count == 1:
        return Launch(count=1, rank=0)
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise QectomyError(
            f"WORLD_SIZE={count} makes this one of {count} processes, but what they need to find each "
            f"other is not set ({', '.join(missing)}): start them by torchrun, or unset WORLD_SIZE for one process"
        )
    rank = _number("RANK", 0)
    if rank >= count:
        raise QectomyError(f"RANK={rank} is none of WORLD_SIZE={count} processes: start them by torchrun")
    return Launch(count=count, rank=rank)


def _number(name: str, least: int) -> int:
    told = os.environ[name]
    if not (told.isascii() and told.isdigit() and len(told) < 10 and int(told) >= least):
        raise QectomyError(
            f"{name} is {shown(told)} in the environment, and has to be a number from {least} on: unset it for one "
            "process, or start several by torchrun"
        )
    return int(told)
