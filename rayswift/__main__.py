"""``python -m rayswift`` is ``rayswift``."""

import sys

from rayswift.cli.main import main

sys.exit(main())
