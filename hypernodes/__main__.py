"""``python -m hypernodes`` is the command ``hypernodes``."""

from hypernodes._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
