"""The command line `w2wpp`: every verb; nothing but parsing arguments and printing results."""

from .main import build_parser, main

__all__ = ["build_parser", "main"]
