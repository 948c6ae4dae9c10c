"""``python -m limbeck``, which is how torchrun starts it."""

from limbeck.cli import main

if __name__ == "__main__":
    main()
