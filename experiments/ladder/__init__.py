"""The acceptance ladder of the inference: problems with known posteriors, fits, and tests of calibration.

    states.py       every state of the free ladders, and exact quantities from a table of log-likelihoods
    problems.py     programs that small: Gaussian toys, and the real adapter layers in a tiny BERT
    fitting.py      stochastic variational inference as it is shipped, and Pyro's naive pairing for contrast
    rivals.py       gradient estimators that the package does not ship
    tabulated.py    the same posterior on a table of every example: values and slopes in all states
    estimates.py    estimates of the natural gradient: bias, noise, and what is reached with them
    gradients.py    bias and variance of every estimator against enumeration
    calibration.py  simulation-based calibration
    rungs.py        the rungs, their thresholds, and what each measures
    figures.py      the figures

`experiments/check_posterior.py` runs it all and writes the report; tests/experiments/test_ladder.py runs it in small.
"""
