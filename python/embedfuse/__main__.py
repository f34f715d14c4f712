import sys

from embedfuse.cli import main

sys.exit(main())
