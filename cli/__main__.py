"""`python -m cli COMMAND ...`: the console command where the project is not installed."""

import sys

from cli import main

sys.exit(main())
