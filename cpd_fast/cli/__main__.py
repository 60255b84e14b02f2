"""``python -m cpd_fast.cli``."""

from cpd_fast.cli import main

main()
