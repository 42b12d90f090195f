"""Check the six prediction files of a run against the data and zip them, with the code, for the class.

    python prepare_submit.py runs/NAME --data_dir data

The command itself is in reporting/submission.py.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import sys

from reporting.submission import main

if __name__ == "__main__":
    sys.exit(main())
