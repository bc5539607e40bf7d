"""`python -m redline` is the same as `redline`."""

from redline.cli import main

main()
