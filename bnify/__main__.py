"""``python -m bnify`` is the ``bnify`` command."""

from __future__ import annotations

from bnify.cli import main

if __name__ == "__main__":
    main()
