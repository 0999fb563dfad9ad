"""What a part of your own must keep, checked one promise at a time: put these into your tests.

    from pyro_blora.testing import check_guide, check_prior

    check_prior("late.py:late", settings={"rate": 2.0})
    check_guide("tied.py:tied")

Each takes a registered name, `file.py:function` or the function itself, says in one sentence what is wrong and the
remedy, and returns what was built.
"""

from .adapters import check_adapter
from .elbos import check_elbo
from .guides import check_guide
from .priors import GatesAlone, check_prior
from .promises import example_layout
from .tasks import check_task
from .weights import check_weights

__all__ = [
    "GatesAlone", "check_adapter", "check_elbo", "check_guide", "check_prior", "check_task", "check_weights",
    "example_layout",
]  # fmt: skip
