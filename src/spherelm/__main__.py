"""`python -m spherelm` is `spherelm`."""

from spherelm.cli import main

if __name__ == "__main__":
    main()
