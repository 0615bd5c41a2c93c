"""``python -m meshd`` is the command ``meshd``."""

from meshd.cli import main

main(prog_name="meshd")
