"""`--rest` and `--settle`: the steps in which gates rest at what is deployed, and weights train there."""

from ..posterior.draws import component_marginals, deployed
from ..program import BayesianLoRA
from .schedule import Schedule

_UPDATES = 200  # of a prior that adapts, as where the gates start


def hold(program: BayesianLoRA, schedule: Schedule, step: int) -> bool:
    """Hold the gates at what is deployed where the schedule says so, and let go of them elsewhere.

    At the first of such steps a prior that adapts reaches its target at the log Bayes factors as they are, and with it
    the gates, whose distribution is the prior times their exponential; a training that goes on later has that in its
    checkpoint.
    Returns whether the allocation is another one than in the step before.
    """
    if schedule.held(step) != "deployed":
        program.settled = None
        return False
    if step in (schedule.opening, schedule.settling) and program.prior.adapts:
        for _ in range(_UPDATES):
            program.prior.adapt(component_marginals(program))
    if program.settled is not None and step != schedule.settling:
        return False
    program.settle(deployed(program))
    return True
