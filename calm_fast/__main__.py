"""`python -m calm_fast` is `calm-fast`."""

from calm_fast.cli import main

if __name__ == "__main__":
    main()
