"""`accelerate launch pretrain recipe=NAME key=value ...`: a thin door, since run as a folder this is no package."""

import sys

from pretrain.launcher import follow_the_launcher
from pretrain.usage import asked, text

if asked(sys.argv[1:]):
    print(text())
    sys.exit()
follow_the_launcher()  # before what takes seconds to import

from pretrain.loop import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
