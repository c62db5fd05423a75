"""``python -m loraformat``."""

from loraformat.cli.main import main

if __name__ == "__main__":
    main()
