"""``python -m hookline``: the command line, where the console script is not on the path."""

from hookline.cli import main

main()
