"""`python -m onegpu.cli`: the `onegpu` command where no script was installed."""

from __future__ import annotations

from onegpu.cli import main

main()
