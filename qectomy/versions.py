"""Which transformers the commands need. pip sees to it where it installs; an environment can be changed afterwards."""

import importlib.metadata
import re

from qectomy.errors import QectomyError

TRANSFORMERS = (5, 4)  # the oldest: before, configs are no dataclasses, and the fields of ours stay empty


def check_transformers() -> None:
    """Raise QectomyError if an older transformers is installed than the model code runs on, without loading it."""
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return  # its import says so
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < TRANSFORMERS:
        oldest = ".".join(map(str, TRANSFORMERS))
        raise QectomyError(
            f"qectomy needs transformers {oldest} or newer, and {installed} is installed here: on it no reduced model "
            f"loads. To mend it: pip install 'transformers>={oldest}'"
        )
