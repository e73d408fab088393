"""`accelerate launch pretrain recipe=NAME key=value ...`: a thin door, since run as a folder this is no package."""

import sys

from pretrain.stop import follow_the_launcher

follow_the_launcher()  # first: loading takes seconds, and the launcher may end meanwhile

from pretrain.loop import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
