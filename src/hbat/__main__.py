"""`python -m hbat`, and with it `accelerate launch -m hbat`."""

import sys

from hbat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
