"""fit(): stochastic variational inference of gates and adapters together, in a plain Accelerate loop.

Two phases. While `kl_warmup` of the steps pass, adapter and head learn with the gates open. Then the guide starts from
an estimate of every gate's log Bayes factor (gate_init.py), and gates, ranges and adapter learn together under the
whole ELBO. The loss is -ELBO / N at any accumulation and on any number of processes. Every random number comes from a
generator seeded by (seed, step, micro-batch, process), so a run that is cut off resumes to the same bits.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from pathlib import Path

import accelerate
import torch

from .. import adapters
from ..adapters.input_pca import explained_variances
from ..build import Parts, build, require_config
from ..checkpoint import saved_in
from ..config.run_config import RunConfig
from ..deploy.peft import require_exportable
from ..distributed import AnyOf, as_on_main, average_gradients, on_main, shard, sharding_wanted
from ..elbos import GateELBO
from ..machine import release_freed_memory
from ..posterior.draws import component_marginals
from ..progress import phase, silenced
from ..signals import Interrupted, asked, deferred
from ..tasks.batching import epoch_order, first_inputs, lengths_of, loader, on_device, split_labels
from .best_epoch import Validation
from .gate_init import log_bayes_factors, sensitivity
from .gradients import Gradients
from .identity import identity
from .laplace_fit import fit_run
from .metrics_log import Logbook
from .natural_gradient import NaturalGradient, is_natural
from .non_finite import FiniteSteps, unvalidated
from .optimizer import forget_moments, make_optimizer
from .range_calibration import range_errors
from .resuming import DIVERGED, Checkpoints
from .schedule import Schedule, step_seed
from .settling import hold
from .trained import Trained

_CALIBRATION_BATCHES = 4  # for the starting ranges
_START_BATCHES = 32  # for an adapter that starts from its inputs, as EVA does
_STARTING_EXAMPLES = 256  # to initialize the gates: mean squares with a standard error of about a tenth
_SHOWN = 16  # numbers of rows that an error lists


def fit(
    config: RunConfig, *, folder: str | Path | None = None, quiet: bool = False, until: int | None = None
) -> Trained:
    """Train the run that `config` describes.

    folder: where metrics.jsonl and checkpoints/ are kept, and found again after an interruption; None keeps nothing.
    until: leave after that many steps, with a checkpoint, from which the same call without it goes on.
    Errors: ValueError, see `build`, before anything is written; where the training diverges; NotWritten for a full
    disk. Interrupted after SIGTERM, SIGINT or SIGHUP, with a checkpoint of the step that was in progress.
    """
    require_config(config)
    with silenced(quiet):
        return _fit(config, None if folder is None else Path(folder).expanduser(), until)


def _fit(config: RunConfig, folder: Path | None, until: int | None) -> Trained:
    if config.tracker and folder is None:
        raise ValueError(f"tracker {config.tracker!r} needs a folder to write to: fit(config, folder=...)")
    cpu = not torch.cuda.is_available()  # exact BOPs are float64, which Apple's GPUs do not have
    accelerator = accelerate.Accelerator(cpu=cpu, log_with=config.tracker, project_dir=folder)
    if config.tracker and not accelerator.log_with:
        raise ValueError(
            f"tracker {config.tracker!r} is not installed: pip install {config.tracker}, or drop --tracker"
        )
    parts = build(config)
    schedule = Schedule.of(config, len(parts.rows["train"]), accelerator.num_processes, parts.program.weights)
    parts.program.weights.require(schedule.steps, schedule.opening if parts.program.gates_close else 0)
    schedule.require(parts.program.gates_are_random, parts.program.gate_guide.starts_from_data)
    if parts.program.teacher is not None:
        parts.program.teacher.require(schedule.steps, schedule.opening, sharded=sharding_wanted())
    if folder is not None:
        if not (folder / "checkpoints").exists():
            rows = first_inputs(parts.tokens["train"], parts.collate)
            with phase("checking that it can be exported"):
                on_main(lambda: require_exportable(parts.program, folder / ".exportable", rows))
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
    return _Loop(accelerator, parts, schedule, folder).run(until)


class _Loop:
    """One training run: what the phases share."""

    def __init__(self, accelerator, parts: Parts, schedule: Schedule, folder: Path | None):
        self.accelerator, self.parts, self.schedule, self.folder = accelerator, parts, schedule, folder
        self.config, self.program = parts.config, parts.program
        self.book = Logbook(accelerator, parts.program, schedule, folder)
        self.validation = Validation(parts, schedule, folder)
        self.lengths: list[int] | None = None  # of the training rows, where batches are grouped by them

    def run(self, until: int | None = None) -> Trained:
        config, accelerator, began = self.config, self.accelerator, time.perf_counter()
        origin = identity(self.parts) if self.folder else {}  # before a backbone is sharded
        if sharding_wanted():
            shard(self.program.net.peft_model, accelerator)
            self.program.net.gate_context.keeps_weights = False  # all layers' at once would be the whole backbone
        self.program.to(accelerator.device)
        self._calibrate()
        release_freed_memory()
        optimizer = make_optimizer(self.program, config)
        natural = is_natural(self.program, config)
        self.natural = NaturalGradient(self.program, config.kl_weight, optimizer.state) if natural else None
        self.drops_out = not natural if config.gated_dropout is None else config.gated_dropout
        total = self.schedule.steps
        last = total if until is None else min(until, total)
        self.finite = FiniteSteps(config.max_skipped_steps, total, accelerator.device)
        self.checkpoints = Checkpoints(
            self.folder, self.program, optimizer, total, origin, self.book, self.validation, self.finite
        )
        first = self.checkpoints.resume()
        began -= self.book.lines[-1]["seconds"] if self.book.lines else 0.0
        self.learning = [p for group in optimizer.param_groups for p in group["params"]]
        self.learning += self.natural.parameters if self.natural else []
        self.gradients = Gradients(self.program, self.learning, sharded=sharding_wanted())
        any_of = AnyOf(accelerator)
        if config.tracker:
            accelerator.init_trackers("pyro-blora", config={k: str(v) for k, v in dataclasses.asdict(config).items()})
        with contextlib.ExitStack() as ending, deferred(), phase("training", last, first=first) as shown:
            for tracker in accelerator.trackers:  # also where a signal ends the loop
                ending.callback(tracker.finish)  # not end_training: processes of its group have yet to evaluate
            for step, micro_batches in itertools.islice(self._steps(first), max(0, last - first)):
                if step == self.schedule.opening:
                    self._open_phase(step, optimizer)
                self._optimizer_step(step, micro_batches, optimizer)
                if step + 1 == total == self.schedule.opening:
                    self._open_phase(total, optimizer)
                note = None
                more = self.validation.after_epoch(step + 1) if (step + 1) % self.schedule.steps_per_epoch == 0 else {}
                if more or (step + 1) % config.logging_steps == 0 or step + 1 == last:
                    self.checkpoints.require_folder()
                    more |= self._skipped() | (self.natural.report() if self.natural else {})
                    seconds = time.perf_counter() - began
                    note = self.book.log(step + 1, seconds, self.last, self.grad_norm, optimizer, more)
                shown.advance(note=note)
                signum = any_of(asked() or 0, step)
                due = self.checkpoints.due(step + 1, config.checkpoint_steps, config.checkpoint_minutes)
                if self.folder and (due or signum or step + 1 == last):
                    self._skipped()  # or it has diverged
                    self.checkpoints.save(step + 1)
                if signum:
                    accelerator.wait_for_everyone()  # for the checkpoint: a launcher ends all after the first one
                    raise Interrupted(signum, (self.folder and saved_in(self.folder)) or "nothing was kept")
        if last == total:
            self._finish()
        self.program.eval()
        return Trained(self.parts, self.book.lines, time.perf_counter() - began)

    def _skipped(self) -> dict[str, int]:
        """For the log, how many steps were left out, if any.  Errors: ValueError where these are too many in a row."""
        left_out, longest, step = self.finite.read()
        if longest > self.finite.tolerated:
            rows = self._rows_of(step)
            listed = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
            what = (
                f"the loss or a gradient was not finite for {longest} steps from there on, and at most "
                f"{self.finite.tolerated} are left out in a row; the batch of that step is training rows {listed}"
            )
            raise ValueError(DIVERGED.format(step, what, self.checkpoints.kept()))
        return {"skipped_steps": left_out} if left_out else {}

    def _finish(self) -> None:
        """What follows the last step; the same again whenever a finished training is taken up."""
        weights = self.program.weights
        self.validation.finish()
        weights.finish()
        if weights.curvature:
            fit_run(self.parts)

    def _steps(self, first: int):
        """(step, its micro-batches) from step `first` on: the same rows whenever and wherever a run goes on."""
        config, per_epoch, rows = self.config, self.schedule.steps_per_epoch, self.parts.tokens["train"]
        for epoch in range(first // per_epoch, config.epochs):
            done = max(0, first - epoch * per_epoch)
            batches = iter(loader(rows, self.parts.collate, self._order(epoch, done)))
            for step in range(epoch * per_epoch + done, (epoch + 1) * per_epoch):
                yield step, [next(batches) for _ in range(config.accumulation)]

    def _order(self, epoch: int, done: int) -> list[list[int]]:
        """The numbers of the rows in this process's batches of an epoch, from its step `done` on."""
        config, rows, accelerator = self.config, self.parts.tokens["train"], self.accelerator
        share = config.accumulation * accelerator.num_processes
        if config.group_by_length and self.lengths is None:
            self.lengths = lengths_of(rows)
        order = epoch_order(len(rows), config.batch_size, share, config.seed, epoch, self.lengths)
        return order[done * share :][accelerator.process_index :: accelerator.num_processes]

    def _rows_of(self, step: int) -> list[int]:
        epoch, done = divmod(step, self.schedule.steps_per_epoch)
        return [row for batch in self._order(epoch, done)[: self.config.accumulation] for row in batch]

    def _optimizer_step(self, step: int, micro_batches: list[dict], optimizer) -> None:
        config, accelerator = self.config, self.accelerator
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(group["name"], step)
        temperature, held = self.schedule.temperature(step), self.schedule.held(step)
        if hold(self.program, self.schedule, step):
            self.gradients.forget()
        if step == self.schedule.learning:
            forget_moments(optimizer, self.program)
        self.program.train()
        if held != "open" and not self.drops_out:
            adapters.without_dropout(self.program.net)
        parts = []
        for micro, batch in enumerate(micro_batches):
            torch.manual_seed(step_seed(config.seed, step, micro, accelerator.process_index))
            inputs, labels = split_labels(batch, accelerator.device)
            parts.append(self.gradients(inputs, labels, temperature, config.kl_weight, held, len(micro_batches)))
        net = self.program.net
        average_gradients(self.learning, accelerator)
        clipped = [*net.adapter_parameters(), *net.head_parameters()]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(clipped, config.clip_norm)
        known = set(map(id, clipped))
        others = [p for p in self.learning if id(p) not in known]
        bad = self.finite.step(optimizer, step, self.grad_norm, others)
        if net.allocates:
            for parameter in net.adapter_parameters():  # it reads their gradients
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(bad, 0.0)
            guide = self.program.gate_guide
            guide.allocate(net.allocate(step + 1, self.schedule.steps, guide.target_rank))
        if self.natural and held is None and config.lr_gates:
            self.natural.step(bad, self.schedule.gates_move(step))
        for parameter in self.learning:
            parameter.grad = None
        self.program.weights.collect(step + 1, self.schedule.steps)
        if held is None and self.program.prior.adapts:
            self.program.prior.adapt(component_marginals(self.program))
        self.last = torch.stack(parts).mean(0)  # loss and the ELBO's parts of this process, read when a line is logged

    def _calibrate(self) -> None:
        net = self.program.net
        if net.start_from_inputs is not None:
            with phase("finding principal components"):
                net.start_from_inputs(net, (inputs for inputs, _ in self._training_batches(_START_BATCHES, epoch=-3)))
            self.program.weights.follow(net.random_weights(), dict(enumerate(net.head_parameters())))  # may be new ones
            as_on_main(net.adapter_parameters(), self.accelerator)
        batches = self._training_batches(_CALIBRATION_BATCHES, epoch=-1)
        with phase("calibrating ranges", len(batches), unit="batches") as shown:
            adapters.calibrate(net, (inputs for inputs, _ in shown.over(batches)))

    def _open_phase(self, step: int, optimizer) -> None:
        """Start the gates.  Errors: ValueError where the network's answers give them no finite start."""
        self.gradients.forget()
        if self.program.teacher is not None:
            self.program.teacher.follow(self.program.net, self.program.log_scale)
        with unvalidated():
            self._start_gates(optimizer)
        started = (*self.program.gate_guide.parameters(), *self.program.net.grid_parameters())
        if not all(bool(x.isfinite().all()) for x in started):
            what = "the gates cannot start, as slopes of the loss are not finite"
            raise ValueError(DIVERGED.format(step, what, self.checkpoints.kept()))

    def _start_gates(self, optimizer) -> None:
        """Initialize the guide from estimated log Bayes factors, and the ranges for the resulting bit widths."""
        program, guide, config = self.program, self.program.gate_guide, self.config
        if not program.net.layers():  # PEFT's own layers are not gated
            return
        batches = self._training_batches(_CALIBRATION_BATCHES, epoch=-1)
        if program.prior.explains:
            with phase("explaining variances"):
                program.prior.explain(explained_variances(program.net, (inputs for inputs, _ in batches)))
        with phase("fitting ranges"):
            adapters.start_smoothing(program.net, (inputs for inputs, _ in batches))
            errors = range_errors(program, batches)
        torch.manual_seed(step_seed(config.seed, -1))
        elbo = program.elbo if isinstance(program.elbo, GateELBO) and program.elbo.needs_curvature else None
        if guide.starts_from_data or elbo:
            batches = self._training_batches(math.ceil(_STARTING_EXAMPLES / config.batch_size), epoch=-2)
            with phase("initializing gates", len(batches), unit="batches") as shown:
                slopes = sensitivity(program, shown.over(batches), errors.best_by_width())
            if guide.starts_from_data:
                guide.start(log_bayes_factors(program, slopes, config.kl_weight))
            if elbo:
                elbo.take_curvature(slopes.curvature)
        with torch.no_grad():
            widths = guide.posterior().z.depth_probs  # (L, T, K + 1)
        adapters.set_ranges(program.net, errors.best(widths))
        forget_moments(optimizer, program)
        state = guide.state_dict(keep_vars=True).values()
        as_on_main((*state, *program.prior.buffers(), *program.net.grid_parameters()), self.accelerator)

    def _training_batches(self, count: int, epoch: int) -> list[tuple[dict, torch.Tensor]]:
        """The first batches of a separate order: the same on every process."""
        rows, config = self.parts.tokens["train"], self.config
        order = epoch_order(len(rows), config.batch_size, 1, config.seed, epoch)[:count]
        return list(on_device(loader(rows, self.parts.collate, order), self.accelerator.device))
