"""`accelerate launch pretrain recipe=NAME key=value ...`: a thin door, since run as a folder this is no package."""

import sys

from pretrain.loop import main

sys.exit(main(sys.argv[1:]))
