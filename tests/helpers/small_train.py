"""`train.py` that knows the small model and draws nothing, for several ranks.

torchrun --nproc_per_node 2 tests/helpers/small_train.py ...
"""

import sys

import train
from tests.helpers.runs import small_runs

if __name__ == "__main__":
    with small_runs():
        sys.exit(train.main())
