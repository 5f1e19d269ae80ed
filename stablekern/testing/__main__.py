"""`python -m stablekern.testing`."""

import sys

from stablekern.testing.report import main

sys.exit(main())
