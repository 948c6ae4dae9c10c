"""``python -m limbeck``, which is how torchrun starts it."""

from limbeck.app.cli import main

if __name__ == "__main__":
    main()
