"""``python -m actckpt`` does what ``actckpt`` does."""

import sys

from actckpt.cli import main

sys.exit(main())
