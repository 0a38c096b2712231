"""`python -m megarpt` is the same program as the `megarpt` command."""

from megarpt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
