"""Lets ``python -m secateur`` run the command line."""

from .cli import main

main()
