"""Weights that DeepSpeed gathers under ZeRO-3, from the order of the modules.

Follows DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py:

    before a module's forward, and before its   what it needs and is not there is gathered, then what comes
    backward                                    next in the order, up to `stage3_prefetch_bucket_size`
    after each                                  it is released, unless the order needs it again within
                                                `stage3_max_reuse_distance` parameters

A Transformer layer counts as one module. A table that several modules share is gathered for each module.
Layers that activation checkpointing computes again are there already for their backward.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import nn

from model.language_model import base_of
from model.soundwave import Soundwave
from train.flops import numel


def layer_classes(model: nn.Module) -> list[type[nn.Module]]:
    """Return the classes of modules whose weights are gathered at once: the layers of all lists."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return sorted({type(layer) for layers in lists for layer in layers}, key=lambda c: c.__name__)


@dataclass(frozen=True)
class Limits:
    """Numbers of parameters, from the section `zero_optimization`. persistent: tensors up to it stay."""

    reuse: float
    prefetch: float
    persistent: float
    live: float

    @classmethod
    def of(cls, section: dict) -> Limits:
        """section: of a resolved configuration (train/deepspeed_config.py)."""
        return cls(
            section.get("stage3_max_reuse_distance", 1e9),
            section["stage3_prefetch_bucket_size"],
            section["stage3_param_persistence_threshold"],
            section.get("stage3_max_live_parameters", 1e9),
        )


@dataclass(frozen=True, eq=False)
class Call:
    """A module in the order. own, nested: elements of its parameters, and of all in it, by id."""

    own: dict[int, int]
    nested: dict[int, int]
    is_layer: bool

    @property
    def needed(self) -> dict[int, int]:
        return self.nested if self.is_layer else self.own


@dataclass(frozen=True)
class Event:
    call: Call
    begins: bool


class ModuleOrder:
    """The order in which the modules of a micro-batch begin and end. model: stage set, on any device."""

    def __init__(self, model: Soundwave, uses_ctc: bool):
        self._layers = tuple(layer_classes(model))
        self.events: list[Event] = []
        self._learning: list[Call] = []  # with a backward, in the order of forward
        learns = False
        if model.encoder is not None:
            self._add(model.encoder, learns=None)
            learns = _has_trained(model.encoder)
        for part in (model.alignment, model.ctc_head, model.shrinking):
            if part is model.ctc_head:
                self._add(part, learns=uses_ctc and (learns or _has_trained(part)))
            elif part is not None:
                learns = learns or _has_trained(part)
                self._add(part, learns=learns)
        table: Call | None = None
        if model.llm is not None:
            base = base_of(model.llm)
            embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
            self._add(embeddings, learns=True)
            table = self._learning[-1]
            self._add(model.llm, learns=True, without=embeddings, only_forward=head)
        # The root's backward comes first. It needs nothing, and holds all that follows.
        self.events.append(Event(Call({}, _sizes(model), is_layer=False), begins=True))
        for call in reversed(self._learning):
            self.events.append(Event(call, begins=True))
            if call is not table:  # whose input has no gradient: DeepSpeed does not see its backward end
                self.events.append(Event(call, begins=False))

    def _add(
        self,
        module: nn.Module,
        *,
        learns: bool | None,
        without: nn.Module | None = None,
        only_forward: nn.Module | None = None,
    ) -> None:
        """Append a module and what is in it. learns: it has a backward; None: from its first trained
        parameter on."""
        if module is without:
            return
        call = Call(_sizes(module, recurse=False), _sizes(module), isinstance(module, self._layers))
        is_called = not isinstance(module, nn.ModuleList)
        if is_called:
            self.events.append(Event(call, begins=True))
        for child in [] if call.is_layer else module.children():
            self._add(child, learns=learns, without=without, only_forward=only_forward)
        if is_called:
            self.events.append(Event(call, begins=False))
            if learns is None:
                is_table = isinstance(module, nn.Embedding)  # of positions, whose input has no gradient
                follows = bool(self._learning) and not is_table
                learns = follows or _has_trained(module, recurse=call.is_layer)
            if learns and call.needed and module is not only_forward:
                self._learning.append(call)


def _sizes(module: nn.Module, recurse: bool = True) -> dict[int, int]:
    return {id(p): numel(p) for p in module.parameters(recurse=recurse)}


def _has_trained(module: nn.Module, recurse: bool = True) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=recurse))


class Coordinator:
    """What a rank gathers, micro-batch after micro-batch of a step."""

    def __init__(self, order: ModuleOrder, limits: Limits):
        self._events, self._limits = order.events, limits
        self._begun = [event.call for event in self._events if event.begins]
        self._there: set[int] = set()  # whole on this rank, without those that always are

    def micro_batch(self) -> int:
        """Return the elements that a forward and backward gather."""
        self._queue = deque(
            (parameter, size, step)
            for step, call in enumerate(self._begun)
            for parameter, size in call.needed.items()
        )
        self._fetched_for: dict[int, int] = {}  # the last step that a parameter was fetched for
        self._used_by: dict[int, set[Call]] = {}
        self._step = self._gathered = self._live = 0
        for event in self._events:
            if event.begins:
                self._fetch(event.call)
            else:
                self._end(event.call)
        for parameter, calls in self._used_by.items():
            if calls:
                self._there.discard(parameter)
        return self._gathered

    def _gather(self, parameter: int, size: int) -> bool:
        """Gather a parameter that is not there; return whether it was gathered."""
        if parameter in self._there or size <= self._limits.persistent:
            return False
        self._there.add(parameter)
        self._gathered += size
        self._live += size
        return True

    def _fetch(self, call: Call) -> None:
        for parameter, size in call.needed.items():
            self._gather(parameter, size)
            self._used_by.setdefault(parameter, set()).add(call)
        late = {p for p in call.needed if self._fetched_for.get(p, -1) < self._step}
        while self._queue and late:
            parameter, _, step = self._queue.popleft()
            self._fetched_for[parameter] = step
            late.discard(parameter)
        ahead, most = 0, min(self._limits.prefetch, self._limits.live - self._live)
        while self._queue and ahead < most:
            parameter, size, step = self._queue.popleft()
            self._fetched_for[parameter] = max(self._fetched_for.get(parameter, -1), step)
            if self._gather(parameter, size):
                ahead += size
        self._step += 1

    def _end(self, call: Call) -> None:
        released = {p for p in call.needed if self._fetched_for.get(p, -1) <= self._step}
        distance = 0
        for later in self._begun[self._step :]:
            if distance >= self._limits.reuse or not released:
                break
            # DeepSpeed looks into later modules where the one that ends is a layer, else at their own.
            seen = later.nested if call.is_layer else later.own
            released.difference_update(seen)
            distance += sum(seen.values())
        for parameter, size in call.needed.items():
            self._used_by[parameter].discard(call)
            if parameter in released & self._there and not self._used_by[parameter]:
                self._there.discard(parameter)
                self._live -= size


def gathered_elements(model: Soundwave, uses_ctc: bool, limits: Limits, micro_batches: int) -> int:
    """Return the elements of weights that a step gathers, the ones that always stay once."""
    coordinator = Coordinator(ModuleOrder(model, uses_ctc), limits)
    always = sum(size for size in _sizes(model).values() if size <= limits.persistent)
    first = [coordinator.micro_batch() for _ in range(min(micro_batches, 3))]
    return always + sum(first) + first[-1] * (micro_batches - len(first))
