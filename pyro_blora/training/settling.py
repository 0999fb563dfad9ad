"""The start of the last phase of `--settle`: the gates come to rest, and what is deployed is taken."""

from ..posterior.draws import component_marginals, deployed
from ..program import BayesianLoRA
from .schedule import Schedule

_UPDATES = 200  # of a prior that adapts, as where the gates start


def settle(program: BayesianLoRA, schedule: Schedule, step: int) -> None:
    """Hold the gates at what is deployed, from the step of the schedule on at which they settle.

    At that step a prior that adapts reaches its target at the log Bayes factors as they are, and with it the gates,
    whose distribution is the prior times their exponential; a training that goes on later has that in its checkpoint.
    """
    if step < schedule.settling:
        return
    if step == schedule.settling and program.prior.adapts:
        for _ in range(_UPDATES):
            program.prior.adapt(component_marginals(program))
    if program.settled is None:
        program.settle(deployed(program))
