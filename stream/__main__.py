"""`python -m stream RECIPE --steps 5 [--profile]`"""

import sys

from stream.inspect_plan import main

sys.exit(main())
