"""`python -m train.data RECIPE --steps 5 [--profile]`"""

import sys

from train.data.look import main

sys.exit(main())
