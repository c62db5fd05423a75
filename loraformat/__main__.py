"""``python -m loraformat``."""

from loraformat.cli.main import main

main()
