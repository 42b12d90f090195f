"""The class's Part 1: sentiment alone, SST and then CFIMDB, with a frozen encoder or the full model.

    python classifier.py --fine-tune-mode last-linear-layer --pretrained bert-base-uncased
    python classifier.py --fine-tune-mode full-model --pretrained bert-base-uncased

Each trains two models and writes their dev and test predictions under the names that the class asks for. The
command itself is in reporting/part1.py.
"""

import sys

from reporting.part1 import main

if __name__ == "__main__":
    sys.exit(main())
