"""`python -m megarpt` is the same program as the `megarpt` command."""

from megarpt.cli import entry

if __name__ == "__main__":
    entry()
