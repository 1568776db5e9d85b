"""`python -m harness`, the command `harness` for launchers that start modules, such as torchrun."""

from harness.cli import main

if __name__ == "__main__":
    main()
