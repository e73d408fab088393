"""`accelerate launch pretrain recipe=NAME key=value ...`: a thin door, since run as a folder this is no package."""

import os
import sys

from pretrain.launcher import follow_the_launcher
from pretrain.usage import asked, text, words

if asked(sys.argv[1:]) and not words(sys.argv[1:]):
    print(text())
    sys.exit()
follow_the_launcher()  # before what takes seconds to import

from pretrain.loop import main  # noqa: E402

code = main(sys.argv[1:])
# All is on the disk. A library's thread that Python ends while it is in C++ would abort the process now (134), and a
# scheduler would take a run that can go on for a broken one.
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
