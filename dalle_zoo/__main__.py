"""``python -m dalle_zoo``, which launchers such as torchrun call."""

import sys

from dalle_zoo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
