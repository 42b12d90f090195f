"""Check the six prediction files of a run against the data and zip them, with the code, for the class.

    python prepare_submit.py runs/NAME --data_dir data

The command itself is in reporting/submission.py.
"""

import sys

from reporting.submission import main

if __name__ == "__main__":
    sys.exit(main())
