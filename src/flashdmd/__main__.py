"""`python -m flashdmd` is `flashdmd`."""

from flashdmd.cli import main

main()
