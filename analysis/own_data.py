# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # From a pandas frame to a posterior, and back
#
# Messages to a shop and the department that answers each: a frame with a column of texts and a column of words. The
# labels are the frame's own; there is no class number, no file and no command line. The frame is made here, by a few
# patterns, so that the notebook runs anywhere in a minute; yours would come from `pd.read_csv`.
#
# `python own_data.py` runs as it is; `make notebooks` executes it into `own_data.ipynb`.

# %%
import tempfile
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its next version, tqdm misses a widget
    from pyro_blora import RunConfig, draw, expected_bops, export, fit, load, register_task
    from pyro_blora.posterior import marginals
    from pyro_blora.tasks import from_frame

PATTERNS = {
    "billing": ("I was charged twice for the {}", "the invoice for my {} shows the wrong amount",
                "why did you take {} payments from my card", "please send a receipt for the {}"),
    "delivery": ("where is my {}", "the parcel with the {} has not arrived", "when will the {} be shipped",
                 "the courier left my {} at the wrong door"),
    "returns": ("I want to send the {} back", "the {} is broken, can I exchange it",
                "how do I return a {} that does not fit", "please pick up the faulty {}"),
}  # fmt: skip
ITEMS = ("lamp", "kettle", "coat", "bicycle", "phone", "chair", "drill", "tent", "camera", "jacket")
OPENINGS = ("", "hello, ", "good morning, ", "hi there, ", "urgent: ")
rng = np.random.default_rng(0)
rows = [
    {"message": opening + pattern.format(item), "department": department}
    for department, patterns in PATTERNS.items() for pattern in patterns for item in ITEMS for opening in OPENINGS
]  # fmt: skip
frame = pd.DataFrame(rows).sample(300, random_state=0, ignore_index=True)
print(frame.head(4).to_string())

# %% [markdown]
# ## The task
#
# `from_frame` finds out what kind of outcome the labels are (words are classes, numbers with decimals a number, lists
# several labels), holds a fifth of the texts out, and says what it did. `register_task` gives it a name.

# %%
task = register_task(from_frame("departments", frame, text="message", label="department"))
for sentence in task.findings["sentences"]:
    print("-", sentence)

# %% [markdown]
# ## Training
#
# Two thirds of the steps learn the adapters with all gates open; then the gates learn, too.

# %%
config = RunConfig(task="departments", backbone="demo", prior="bops", epochs=10, kl_warmup=0.66, max_length=32)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trained = fit(config, quiet=True)
program, layout = trained.program, trained.program.layout
z, g = marginals(program)  # exact probabilities that each gate is open
print(f"E[BOPs] {float(expected_bops(layout, z, g).adapted_ratio):.1%} of the adapted projections at 32 x 32 bit")

# %% [markdown]
# ## The posterior
#
# Draws of the gates are draws of bit widths: 2 bit, and what each open gate adds.

# %%
gates = draw(program, 200)
bits = 2 + gates.z @ layout.ladder_steps.float()  # (draws, projections, tensors)
figure, panel = plt.subplots(figsize=(7, 3))
for t, tensor in enumerate(layout.tensors[:2]):
    panel.hist(bits[:, :, t].mean(1).numpy(), bins=20, alpha=0.6, label=tensor)
panel.set(xlabel="bit width, mean over projections, bits", ylabel="draws", title="200 draws of the posterior")
panel.legend()
plt.show()

# %% [markdown]
# In the stored run a draw differs little from the next in its mean width, as 18 projections are averaged; which
# projections have more bits differs more: [reading the gates](gates.ipynb).
#
# ## And back
#
# `predict` returns a frame with the index of the one that it is given, so that the two can be joined. `entropy` is the
# whole uncertainty about a label, `mutual_information` the part of it that the draws of the gates disagree about. The
# last two messages belong to no department.

# %%
new = pd.DataFrame({"message": [
    "the parcel has been lost", "you took the money twice", "this coat is too small, take it back",
    "do you sell gift cards", "what a lovely day",
]})  # fmt: skip
answers = trained.predict(new)
new.join(answers[["label", "confidence", "entropy", "mutual_information"]]).round(3)

# %% [markdown]
# In the stored run the question about gift cards is the least certain, but the lovely day goes to a department with as
# much confidence as a lost parcel: confidence compares the classes that there are. How far uncertainty finds texts that
# belong to none is measured in [a study on two sets of intents](../benchmarks/uncertainty.md).
#
# ## Out and in
#
# `export` writes a PEFT adapter, which `load` reads back. The task's code is not needed for that: the names of labels
# and of the text column are in the folder.

# %%
with tempfile.TemporaryDirectory() as folder:
    export(program, f"{folder}/adapter", config=config, tokenizer=trained.parts.tokenizer)
    model = load(f"{folder}/adapter")
    again = model.predict(new)
print("the same answers:", answers.drop(columns="label").equals(again.drop(columns="label")), *again["label"])

# %% [markdown]
# To keep a run with its page, call `train_run(config)` in place of `fit`; to train in your own loop,
# [plain Pyro](../docs/plain-pyro.md).
