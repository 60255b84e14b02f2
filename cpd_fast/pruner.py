"""Pruning inside the user's own training loop: score, mask, and compact at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpd_fast.compact import compact
from cpd_fast.errors import PlanError, ScoreError
from cpd_fast.masking import attach_masks
from cpd_fast.memory import Split, parse_bytes
from cpd_fast.pipeline import comb
from cpd_fast.schedule import Greedy, OneGroup, plan, plan_cost
from cpd_fast.score import Context, Criterion, Fitter, InTraining, Step, Taylor, quiet
from cpd_fast.types import ChannelGraph, PrunePlan, Scores, Target
from cpd_fast.wrappers import ddp_of, unwrap

_STATE_VERSION = 2


class Pruner:
    r"""Removes channels under masks while the user's own loop trains the model.

    Call :meth:`step` between ``loss.backward()`` and ``optimizer.step()``. It accumulates importance; at the end of
    every interval it masks the lowest channels along the schedule's ramp, until the target holds. The model object
    stays the user's: from the first mask on its forward computes "as if removed", gradients of removed weights are
    zero, and what the optimizer does to them is never seen. Channels that are masked stay masked. In distributed
    training every rank has its pruner; scores are averaged over the ranks, so that all remove the same channels.

    HessianTrace needs the loss itself. :meth:`backward` in place of ``loss.backward()`` gives it for one more
    forward and backward: the gradient of the training step is one end of a finite difference. A closure given to
    :meth:`step` serves every criterion, in eval mode, for two to three times that.

    Args:
        model: The model that is trained; wrappers of DDP and compile are looked through.
        example_inputs: A tensor, tuple or dict for one forward; costs are counted for it.
        target: What may remain at the end. A latency is one that the option ``latency=cpd.LatencyTable(...)`` predicts.
        criterion: ``Taylor()`` where None. First-order criteria read ``.grad`` at every step; the others (HessianTrace,
            GateHessian, GroupFisher) look at the loss, at the end of an interval or as ``probe_every`` says.
        schedule: ``Greedy()`` where None; ``OneGroup()`` is that of the released code.
        ignore: Modules or parameters that keep their shapes; see ``comb``.
        on_unknown: What comb does at an operator without a rule, ``"error"`` or ``"freeze"``.
        granularity: What a channel of an attention is, ``"dim"`` or ``"head"``; see ``comb``.
        conv_groups: What a channel of a grouped convolution is, ``"channel"`` or ``"group"``; see ``comb``.
        protect: ``"first"``, ``"last"`` or both; see ``comb``.
        graph: The model's graph where it is at hand; comb is not run then.
        score_ema: Share of the old scores in those of an interval, in [0, 1): an exponential moving average over the
            removals. 0 looks at the last interval alone.
        execution: How masked forwards run; ``"full_width"`` keeps the shapes that hooks on modules see, for losses on
            features. See :func:`cpd_fast.masked`.
        probe_every: Iterations between two looks of a criterion that needs the loss; 1 looks at all of them. None: one
            look an interval, at its end.
        options: ``round_to``, ``max_pruning_ratio``, ``min_channels``, ``normalize``, ``per_cost``, ``latency`` of
            :func:`cpd_fast.plan`.

    Attributes:
        graph: The model's channel graph.
        plan: What is kept now.
        scores: The scores of the last interval, or None.
        iteration: Steps taken.
        done: Whether the target holds and nothing more will be removed.

    Raises:
        PlanError: If the target cannot be reached, nothing is prunable, or the graph belongs to another model.
        UnsupportedOpError: If comb meets an operator without a rule.

    Source: the training-time pruning of arXiv:2408.03046 (CPD), masks "as if removed" instead of zeros.

    Example:
        >>> import cpd_fast as cpd
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = Pruner(model, torch.zeros(1, 4), Target(macs=0.5), schedule=Greedy(interval=2, steps=2))
        >>> while not pruner.done:
        ...     loss = model(torch.randn(16, 4)).square().mean()
        ...     loss.backward()
        ...     changed = pruner.step()
        ...     optimizer.step(); optimizer.zero_grad()
        >>> pruner.compact(optimizer)[0].out_features
        4
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        target: Target,
        criterion: Criterion | None = None,
        schedule: Greedy | OneGroup | None = None,
        ignore: Iterable[str | nn.Module] = (),
        on_unknown: str = "error",
        granularity: str = "dim",
        conv_groups: str = "channel",
        protect: Iterable[str] = (),
        graph: ChannelGraph | None = None,
        score_ema: float = 0.0,
        execution: str = "auto",
        probe_every: int | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= score_ema < 1:
            raise ScoreError(f"score_ema={score_ema}: expected a share of the old scores in [0, 1)")
        if probe_every is not None and probe_every < 1:
            raise ScoreError(f"probe_every={probe_every}: expected iterations, at least 1, or None")
        self.model, self._ddp = unwrap(model), ddp_of(model)
        if graph is None:
            graph = comb(self.model, example_inputs, ignore, on_unknown, granularity, conv_groups, protect)
        self.graph = graph
        self.target = target
        self.criterion = criterion if criterion is not None else Taylor()
        self.schedule = schedule if schedule is not None else Greedy()
        self.plan = PrunePlan({}, self.graph.fingerprint)
        self.scores: Scores | None = None
        self.score_ema = score_ema
        self.iteration = 0
        self._events = 0
        self._options = options
        self._probe_every = probe_every
        self._in_training: InTraining | None = None
        self._fitter: Fitter | None = None
        # Fail now, not after hours: can any scores reach the target?
        plan(self.graph, {g.name: torch.zeros(g.n_channels) for g in self.graph.groups}, target, **options)
        self._dense = self._dense_costs()
        self._context = Context(self.model, self.graph, self.criterion.seeded(), self.plan)
        params = self._context.params
        self._owners = {
            g.name: [params[s.param] for s in g.slices if s.produces and s.param in params]
            for g in self.graph.prunable_groups
            if any(s.produces and s.param in params for s in g.slices)
        }
        self._moments = self._context.moments()
        self._ema: dict[str, Tensor] = {}
        self._masks = attach_masks(self.model, self.graph, execution=execution)
        self._apply(self.plan, 0)

    @property
    def done(self) -> bool:
        """Whether the last removal has happened."""
        return self._is_over

    def backward(self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Run ``closure().backward()``, and where HessianTrace is to look, a second time at moved parameters.

        Parameters, ``.grad``, buffers and random state are afterwards bit for bit those of ``closure().backward()``
        alone. The curvature is that of the very loss and batch of this iteration, in the mode that the model is in.
        Call :meth:`step` after it without a closure; gradients may be clipped, averaged or unscaled in between.
        Several calls before one step accumulate, as gradients do: ``fit_memory(..., backward=pruner.backward)`` makes
        one for every micro-batch. For first-order criteria this is
        ``closure().backward()``.

        Args:
            closure: Returns the training loss (divided where gradients accumulate), computed with the model or its
                wrapper. It must be a function of the weights and of torch's random numbers alone: draw the batch
                before. It must not talk to other ranks, except through DDP's wrapper.
            scaler: Scales the loss; a step that overflows counts for nothing.

        Returns:
            The loss, detached.

        Raises:
            ScoreError: If the criterion cannot be had so (GateHessian and GroupFisher look in eval mode, HessianTrace
                with an exact engine), the loss is not a finite scalar or another one when called again, a scored
                parameter is frozen or of half precision, or DDP's wrapper was not given to the pruner.

        Example:
            >>> import cpd_fast as cpd
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
            >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(16, 4)
            >>> pruner = Pruner(
            ...     model, x, Target(macs=0.5), cpd.HessianTrace(), Greedy(interval=2, steps=2), probe_every=1
            ... )
            >>> while not pruner.done:
            ...     loss = pruner.backward(lambda: model(x).square().mean())
            ...     changed = pruner.step()
            ...     optimizer.step(); optimizer.zero_grad()
            >>> int(pruner.scores.info["observations"]), pruner.scores.info["engine"]
            (2, 'finite_difference')
        """
        if self.criterion.data == "loss":
            if self._in_training is None:
                self._in_training = self.criterion.in_training(self._context)
            if self._looks:
                return self._in_training.backward(closure, scaler, self._ddp)
        loss = closure()
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @property
    def _ends(self) -> bool:
        """Whether the iteration at hand is the last of an interval."""
        return self._counted % self.schedule.interval == 0

    @property
    def _looks(self) -> bool:
        """Whether a criterion that needs the loss looks at the iteration at hand."""
        if self.done or self._counted < 1:
            return False
        return self._ends or (self._probe_every is not None and self._counted % self._probe_every == 0)

    @property
    def _counted(self) -> int:
        """Iterations after the warm-up, with the one at hand."""
        return self.iteration + 1 - self.schedule.warmup

    def divided(
        self,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        memory_limit: int | str,
        split: Split | None = None,
    ) -> Callable[[], Tensor]:
        """A closure for :meth:`step` over micro-batches, and an engine, with which the look stays within a limit.

        Args:
            batch: What ``loss_fn`` takes.
            loss_fn: ``(model, batch) -> scalar loss``, a mean over the batch.
            memory_limit: As for :func:`cpd_fast.score`; what is chosen is remembered for batches of these shapes.
            split: As for :func:`cpd_fast.score`.

        Returns:
            The loss; its scores are those of the undivided batch up to rounding.

        Raises:
            MemoryLimitError: If nothing fits.
        """
        if self._fitter is None or self._fitter.limit != parse_bytes(memory_limit):
            self._fitter = Fitter(memory_limit, split)
        with quiet(self._context):
            return self._fitter.fit(self._context, batch, loss_fn, self.model, self.criterion)[1]

    def step(self, closure: Callable[[], Tensor] | None = None) -> bool:
        """Take the gradients of this iteration in; at the end of an interval remove channels.

        Args:
            closure: Returns the loss, built with the model, for criteria that need more than ``.grad``; it is called
                at the end of an interval only (see ``probe_every``), in eval mode, and must give the same loss when
                called again. Not needed after :meth:`backward`.

        Returns:
            Whether channels were removed now.

        Raises:
            ScoreError: If no parameter has a gradient, all that make a group's channels are frozen, every gradient of
                an interval was not finite, or the criterion needs a closure and there is none.
        """
        if self.done:
            return False
        if self._counted >= 1:
            if self.criterion.data == "gradients":
                self._observe_gradients()
            elif self._looks and self.criterion.data == "loss":
                self._look(closure)
        ends = self._ends and self._counted >= 1
        if ends:
            self._remove()
        self.iteration += 1
        return ends

    def _observe_gradients(self) -> None:
        gradients = {name: p.grad for name, p in self._context.params.items()}
        if all(g is None for g in gradients.values()):
            raise ScoreError(
                "no parameter has a gradient: call pruner.step() after loss.backward(), before zero_grad()"
            )
        for group, owners in self._owners.items():
            if not any(p.requires_grad for p in owners):
                raise ScoreError(
                    f"group {group}: every parameter that makes its channels is frozen (requires_grad=False), so that "
                    "its scores would be 0 and its channels go first; leave it out with ignore=, unfreeze it, or use a "
                    "criterion that looks at the loss itself: HessianTrace() and pruner.step(closure)"
                )
        # A step that a loss scaler will skip holds inf: it counts for nothing.
        self._moments.add(self.criterion.from_gradients(self._context, gradients), skip_nonfinite=True)

    def _look(self, closure: Callable[[], Tensor] | None) -> None:
        """Take observations of the loss in: those of a training step that :meth:`backward` ran, or of a closure.

        Raises:
            ScoreError: If there is neither, or both.
        """
        name = type(self.criterion).__name__
        if self._in_training is not None and self._in_training.waits:
            if closure is not None:
                raise ScoreError(
                    f"{name}: pruner.backward has looked at this iteration; call pruner.step() without one"
                )
            batch = self._context.moments()
            for observation in self._in_training.take():
                batch.add(observation, skip_nonfinite=self._in_training.may_overflow)
            self._moments.add_batch(batch)
            return
        if closure is None:
            raise ScoreError(
                f"{name} needs the loss itself: call pruner.step(closure) with a function that returns the loss, or "
                "use criterion=Taylor(); HessianTrace also takes pruner.backward(closure) in place of loss.backward()"
            )
        self._observe(closure)

    def _observe(self, closure: Callable[[], Tensor] | None) -> None:
        with quiet(self._context):
            batch = self._context.moments()
            for taken, observation in enumerate(self.criterion.observe(self._context, closure), 1):
                batch.add(observation)
                if self.criterion.enough(batch, taken):
                    break
            self._moments.add_batch(batch)

    def _remove(self) -> None:
        if self.criterion.data == "nothing":
            self._observe(None)
        self._moments.gather()  # ranks must take the same decision
        self._refuse_explosion()
        self.scores = self._averaged(self.criterion.finish(self._context, self._moments))
        event, before = self._events + 1, self.plan
        now = self.schedule.next_plan(event, self.graph, self.scores, self.target, self._dense, before, self._options)
        self._apply(now, event)
        self._moments = self._context.moments()

    def _refuse_explosion(self) -> None:
        """Tell gradients too large to square from gradients that are not finite, which ``finish`` reports.

        Raises:
            ScoreError: If every gradient was finite and every score was not.
        """
        if self.criterion.data != "gradients" or int(self._moments.count):
            return
        if all(bool(p.grad.isfinite().all()) for p in self._context.params.values() if p.grad is not None):
            raise ScoreError(
                f"{type(self.criterion).__name__}: the scores of all {self.schedule.interval} iterations overflow "
                "although the gradients are finite: training diverges, or gradients are still scaled by a GradScaler "
                "(call scaler.unscale_(optimizer) first); nothing was removed"
            )

    def _averaged(self, new: Scores) -> Scores:
        """Scores as the ranking sees them: with a share of the old ones, where the user wants it."""
        if not self.score_ema:
            return new
        share = self.score_ema if self._ema else 0.0
        self._ema = {k: share * self._ema.get(k, v) + (1 - share) * v for k, v in new.items()}
        info = {**new.info, "score_ema": self.score_ema}
        return Scores(self._ema, criterion=new.criterion, fingerprint=new.fingerprint, stderr=new.stderr, info=info)

    def _apply(self, new: PrunePlan, events: int) -> None:
        self._masks.update(new)
        self.plan = self._context.plan = new
        self._events = events
        self._is_over = self.schedule.is_over(events, self.graph, new, self.target, self._options)

    def _dense_costs(self) -> dict[str, float]:
        cost = plan_cost(self.graph)
        values = {"params": cost.params, "macs": cost.macs, "memory": cost.activation_bytes}
        if self.target.latency_ms is not None:
            values["latency_ms"] = self._options["latency"](self.plan)
        return {name: float(values[name]) for name in self.target.given}

    def compact(self, optimizer: torch.optim.Optimizer | None = None, inplace: bool = False) -> nn.Module:
        """The physically smaller model that the masked one computes.

        Args:
            optimizer: Carried along: its state and parameter groups then belong to the result.
            inplace: Cut the user's own model instead of a copy.

        Returns:
            The compacted model; without ``inplace`` the pruner's model stays as it is, masks on.

        Raises:
            CompactError: If the result could not be proven equal; nothing was changed then.
        """
        self._masks.remove()
        cut = False
        try:
            small = compact(self.model, self.graph, self.plan, optimizer=optimizer, inplace=inplace)
            cut = inplace
        finally:
            if not cut:
                self._masks.attach()
        return small

    def remove(self) -> None:
        """Take the masks off the model; the pruner cannot step any further."""
        self._masks.remove()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to take the same decisions bit for bit: plain values and tensors.

        The model's own weights and the optimizer's state are saved by the user as in any training.
        """
        return {
            "version": _STATE_VERSION,
            "fingerprint": self.graph.fingerprint,
            "iteration": self.iteration,
            "events": self._events,
            "plan": self.plan.to_json(),
            "moments": self._moments.state_dict(),
            "ema": dict(self._ema),
            "generator": self._context.generator.get_state(),
            "probes": self._context.probes.state(),
            "difference": self._context.step and (self._context.step.length, self._context.step.error),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the masks are put on at once.

        Raises:
            PlanError: If the state is of another model or of another version.
        """
        if state.get("version") != _STATE_VERSION:
            raise PlanError(f"pruner state version {state.get('version')!r}, this cpd_fast reads {_STATE_VERSION}")
        if state.get("fingerprint") != self.graph.fingerprint:
            raise PlanError(
                f"pruner state of another model: it has fingerprint {state.get('fingerprint')}, this model "
                f"{self.graph.fingerprint}; make the pruner with the same model and arguments"
            )
        self._apply(PrunePlan.from_json(state["plan"], "pruner state"), int(state["events"]))
        self.iteration = int(state["iteration"])
        self._moments.load_state_dict(state["moments"])
        self._ema = dict(state["ema"])
        self._context.generator.set_state(state["generator"])
        self._context.probes.set_state(state["probes"])
        if state.get("difference") is not None:  # chosen anew it would be another
            self._context.step = Step(*state["difference"])
