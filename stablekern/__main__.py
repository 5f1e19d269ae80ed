"""`python -m stablekern` is the command `stablekern`."""

import sys

from stablekern.cli import main

sys.exit(main())
