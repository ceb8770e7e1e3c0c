"""``python -m medvdm`` is the command ``medvdm``."""

import sys

from medvdm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
