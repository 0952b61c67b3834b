"""Python files that a recipe names: what they consist of (`sources`), and how they are loaded (`loading`).

A file may import what lies beside it, as if it were run as a script: modules, and packages with all that is in them.
Its module is called `stages.user_code.<folder>.<name>`, and so are those beside it. So two files in different folders
whose neighbours share a name each have their own, and any process that can import `stages` finds what another one
pickled.
"""

import sys

from stages.user_code.loading import Finder, Misled, Planned

sys.meta_path.insert(0, Planned())
sys.meta_path.insert(0, Finder())
sys.meta_path.append(Misled())
