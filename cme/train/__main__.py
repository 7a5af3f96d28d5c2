"""`python -m cme.train`."""

import sys

from cme.cli import main  # which says so if there is too little memory for the imports

sys.exit(main(["train", *sys.argv[1:]]))
