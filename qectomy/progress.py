"""How work that takes long says how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # (steps done, of how many, what is being done)
