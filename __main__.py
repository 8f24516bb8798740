"""Lets ``python -m secateur`` run the command line."""

from .cli.main import main

main()
