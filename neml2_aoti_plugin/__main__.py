"""`python -m neml2_aoti_plugin` is the command `neml2-aoti`."""

import sys

from neml2_aoti_plugin._cli import main

if __name__ == "__main__":
    sys.exit(main())
