"""What can be chosen by name: a table a kind, filled by the decorators in the folders that have its parts. No torch.

    @register_prior       (layout, **settings) -> Gates, or a Prior            priors/base.py
    @register_guide       (layout, prior, **settings) -> a Guide               guides/base.py
    @register_adapter     (backbone, layout, head, **settings) -> a GatedModel adapters/gated_model.py
    @register_weights     (weights, head, **settings) -> a Weights             weights/base.py
    @register_elbo        (**settings) -> an Elbo                              elbos/base.py
    @register_task        (**settings) -> a Task; tasks/base.py has it         tasks/base.py
    @register_likelihood  a Likelihood                                         tasks/likelihoods.py
    @register_section     (run, title) -> a Section of the report              report/sections/

The file on the right defines its interface; `testing.check_prior` and the other checks test it.
"""

from .registry import Registry

PRIORS = Registry("prior", "priors")
GUIDES = Registry("guide", "guides")
ADAPTERS = Registry("adapter", "adapters")
WEIGHTS = Registry("weights", "weights")
ELBOS = Registry("estimator", "elbos", decorator="register_elbo")  # the flag, and what it names
TASKS = Registry("task", "tasks")
LIKELIHOODS = Registry("likelihood", "tasks")
SECTIONS = Registry("section", "report/sections")

register_prior = PRIORS.register
register_guide = GUIDES.register
register_adapter = ADAPTERS.register
register_weights = WEIGHTS.register
register_elbo = ELBOS.register
register_likelihood = LIKELIHOODS.register
register_section = SECTIONS.register

CHOSEN = {registry.kind: registry for registry in (PRIORS, GUIDES, ADAPTERS, WEIGHTS, ELBOS, TASKS)}  # by their flags
LISTED = {  # by the commands that list them
    "priors": PRIORS, "guides": GUIDES, "adapters": ADAPTERS, "weights": WEIGHTS, "elbos": ELBOS, "tasks": TASKS,
    "likelihoods": LIKELIHOODS, "sections": SECTIONS,
}  # fmt: skip
