"""The largest resident set of this process, the number that people see in their monitors."""

import re
import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far.

    On Linux `getrusage` would also count what the process that started this one held at that moment.
    """
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
