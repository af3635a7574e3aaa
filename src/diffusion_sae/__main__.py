"""`python -m diffusion_sae` is the command line, as launchers of several processes want it."""

import sys

from .cli.main import main

sys.exit(main())
