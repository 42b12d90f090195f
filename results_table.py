"""The poster's results table with error bars: train every row with several seeds, compare, judge the claims.

    python results_table.py --data_dir data --seeds 0 1 2 --max_steps 300
    python results_table.py --max_steps 300 --compare surgery_diff diff

The command itself is in reporting/table.py.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import sys

from reporting.table import main

if __name__ == "__main__":
    sys.exit(main())
