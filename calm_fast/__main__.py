"""`python -m calm_fast`: the same as the console script `calm-fast`."""

from calm_fast.cli import main

if __name__ == "__main__":
    main()
