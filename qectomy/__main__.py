"""python -m qectomy: the command line."""

from qectomy.cli import main

main()
