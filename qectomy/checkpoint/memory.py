"""Give freed memory back to the system, so that a pass stays as small as what it holds."""

import ctypes
import sys


def release_freed() -> None:
    """Return the C heap's free pages. glibc keeps blocks of up to 32 MB for itself otherwise; elsewhere a no-op."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
