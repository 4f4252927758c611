"""``python -m fidelity``, from this folder's parent."""

from fidelity.command import main

if __name__ == "__main__":
    main()
