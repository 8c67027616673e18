"""`python -m tierewrite`."""

from tierewrite.cli import main

if __name__ == "__main__":
    main()
