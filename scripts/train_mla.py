"""Train router and MLA over the frozen experts: `python scripts/train_mla.py size=tiny`.

The same as `python train.py phase=mla expert=all size=tiny`; all arguments are handed on.
"""

from __future__ import annotations

import sys

from hydra_call import become

if __name__ == "__main__":
    become(["phase=mla", "expert=all", *sys.argv[1:]])
