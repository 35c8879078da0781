"""Questions beside the matrix, which ``evaluate`` answers with the suite ``full``.

Attacks that the index never saw, the cost attack, contamination of one request by another, and an approximate index in
the place of the exact one.
"""

from mithridate.evaluation.extras.approximate import approximate
from mithridate.evaluation.extras.contamination import contamination
from mithridate.evaluation.extras.cost import cost
from mithridate.evaluation.extras.ground import Ground
from mithridate.evaluation.extras.run import run_extras
from mithridate.evaluation.extras.unseen import unseen

__all__ = ["Ground", "approximate", "contamination", "cost", "run_extras", "unseen"]
