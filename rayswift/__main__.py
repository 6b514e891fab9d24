"""``python -m rayswift`` is ``rayswift``."""

import sys

from rayswift.cli import main

sys.exit(main())
