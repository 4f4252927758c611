"""The command line as a module, for `torchrun -m viscircuits …` and `python -m viscircuits …`."""

from viscircuits.cli import main

if __name__ == "__main__":
    main()
