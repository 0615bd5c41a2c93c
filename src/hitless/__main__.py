"""``python -m hitless`` is the hitless command."""

from hitless.cli import main

main()
