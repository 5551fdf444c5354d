"""`python -m stream RECIPE --steps 5 [--profile]`"""

import sys

from stream.look import main

sys.exit(main())
