"""`python -m tspin` and `accelerate launch -m tspin`: the same as the command `tspin`."""

from tspin.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
