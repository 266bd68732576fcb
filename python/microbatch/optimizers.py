"""AdamW and SGD of the library, and the drivers by which an Accumulator steps any optimizer.

A driver has `parameters()`, `step(parameters, sums, divisor)`, `dry_run(...)`, `end_dry_run()`, `has_state()`,
`update_only(parameters)`, `update_all()`, `is_partial()`, `keeps(name)`, `own_numbers()`, `learning_rate()`,
`set_learning_rate(rate)`, `state()` and `prepare(tensors)`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from microbatch import _core
from microbatch.errors import BadData, DoesNotFit, UsageError

Named = list[tuple[str, Tensor]]

_PARTS = "_microbatch_updates"  # attribute of an optimizer with a part of the state: the ids of its own parameters


class _OnePass(torch.optim.Optimizer):
    """What AdamW and SGD share: torch's parameter groups over the library's update, which is made in one pass."""

    _moments: tuple[str, ...] = ()  # torch's names of the state's tensors, in the library's order
    _torch: dict[str, Any] = {}  # what else a group of torch's has; ours has no other value

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._native: Any = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._native is not None:
            self._native.add_group(self._named(len(self.param_groups) - 1))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a `.grad`. An Accumulator does not call this."""
        if hasattr(self, _PARTS):
            raise UsageError("the state is sharded over processes by an Accumulator: its step() makes the update")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(one, one.grad) for one in self._parameters() if one.grad is not None]
        self._step([parameter for parameter, _ in found], [gradient for _, gradient in found], 1.0)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """In torch's own format: torch.optim's optimizer of the same name loads it."""
        self._show_state()
        state = super().state_dict()
        state["param_groups"] = [self._torch | group for group in state["param_groups"]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UsageError if the state is of settings that are not offered here, such as amsgrad."""
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize", "dampening"):
                if group.get(name):
                    raise UsageError(f"{type(self).__name__}: the state is of an optimizer with {name}={group[name]}")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name in self._torch:
                group.pop(name, None)
        self._take_state()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _named(self, group: int) -> Named:
        return [(f"{group}.{i}", one) for i, one in enumerate(self.param_groups[group]["params"])]

    def _make(self) -> Any:
        raise NotImplementedError

    def _tell(self, native: Any) -> None:
        """Settings of this class that a schedule may have changed."""

    def _synced(self) -> Any:
        """The library's optimizer, with what the groups say now."""
        if self._native is None:
            self._native = self._make()
        self._tell(self._native)
        for i, group in enumerate(self.param_groups):
            self._native.set_group(i, float(group["lr"]), group["weight_decay"])
        return self._native

    def _step(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None:
        self._synced().step(parameters, sums, divisor)

    def _one_of_all(self, name: str) -> Any:
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise UsageError(f"{type(self).__name__}: {name} differs between parameter groups; it must be one for all")
        return values[0]

    def _show_state(self) -> None:
        """Puts the library's tensors where torch's format has them."""
        if self._native is None:
            return
        tensors = dict(self._native.state())
        self.state.clear()
        for i in range(len(self.param_groups)):
            for name, parameter in self._named(i):
                keys = {moment: f"{name}/{k}" for k, moment in enumerate(self._moments)}
                shown = {moment: tensors[key] for moment, key in keys.items() if key in tensors}
                if shown:
                    self.state[parameter] = shown

    def _take_state(self) -> None:
        """Copies into the library what torch's format brought."""
        tensors: Named = []
        for i in range(len(self.param_groups)):
            for name, parameter in self._named(i):
                for k, moment in enumerate(self._moments):
                    if moment in self.state[parameter]:
                        tensors.append((f"{name}/{k}", self.state[parameter][moment]))
        self.state.clear()
        self._synced().load_state(tensors)


class AdamW(_OnePass):
    """AdamW (Loshchilov and Hutter 2019) in one pass over parameter, gradient and moments.

        optimizer = mb.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
        accumulator = mb.Accumulator(model, optimizer, loss)

    A torch.optim.Optimizer: parameter groups, learning-rate schedulers and state_dict work as usual. A step that runs
    out of memory changes nothing. `betas` and `eps` are one for all groups; `lr` and `weight_decay` are a group's own.

    Memory: 2 x the parameters, from the first step on. Raises UsageError if a setting is out of range.
    """

    _moments = ("exp_avg", "exp_avg_sq", "step")
    _torch = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
              "fused": None, "decoupled_weight_decay": True}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        # With the names that torch.optim.AdamW has, so that a state goes from one to the other.
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._synced()

    def _make(self) -> Any:
        beta1, beta2 = self._one_of_all("betas")
        return _core.AdamW([self._named(i) for i in range(len(self.param_groups))], beta1, beta2, self._one_of_all("eps"))

    def _tell(self, native: Any) -> None:
        native.set_betas(*self._one_of_all("betas"))


class SGD(_OnePass):
    """Stochastic gradient descent with momentum, in one pass, as torch.optim.SGD: the decay is added to the gradient.

        optimizer = mb.SGD(model.parameters(), lr=0.1, momentum=0.9)
        accumulator = mb.Accumulator(model, optimizer, loss)

    decoupled_weight_decay: True shrinks the parameters instead (SGDW, Loshchilov and Hutter 2019). Memory: with momentum
    1 x the parameters, from the first step on. Raises UsageError if a setting is out of range.
    """

    _moments = ("momentum_buffer",)
    _torch = {"dampening": 0, "maximize": False, "foreach": None, "differentiable": False, "fused": None}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
    ) -> None:
        self._decoupled = decoupled_weight_decay
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)
        self._synced()

    def _make(self) -> Any:
        return _core.SGD(
            [self._named(i) for i in range(len(self.param_groups))],
            self._one_of_all("momentum"),
            self._one_of_all("nesterov"),
            self._decoupled,
        )

    def _tell(self, native: Any) -> None:
        native.set_momentum(self._one_of_all("momentum"))


class Driver(Protocol):
    def parameters(self) -> list[Tensor]: ...
    def step(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None: ...
    def dry_run(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None: ...
    def end_dry_run(self) -> None: ...
    def has_state(self) -> bool: ...
    def update_only(self, parameters: list[Tensor]) -> None: ...
    def update_all(self) -> None: ...
    def is_partial(self) -> bool: ...
    def keeps(self, name: str) -> bool: ...
    def own_numbers(self) -> set[int]: ...


def driver_of(optimizer: Any) -> Driver:
    """Raises UsageError if it is no optimizer."""
    if isinstance(optimizer, _OnePass):
        return OnePassDriver(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError("LBFGS evaluates the loss several times in a step: it cannot be driven by one gathered gradient")
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        raise UsageError(
            f"the optimizer is a {type(optimizer).__name__}; it needs step() and param_groups, as torch.optim's have"
        )
    return TorchDriver(optimizer)


class _OfGroups:
    """What both drivers read from torch's parameter groups, and which of the parameters this process updates."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def is_partial(self) -> bool:
        return hasattr(self.optimizer, _PARTS)

    def own_numbers(self) -> set[int]:
        """The numbers of the parameters that this process updates, in the order of all groups."""
        own = getattr(self.optimizer, _PARTS, None)
        return {i for i, one in enumerate(self.parameters()) if own is None or id(one) in own}

    def _restrict(self, parameters: list[Tensor]) -> None:
        setattr(self.optimizer, _PARTS, {id(one) for one in parameters})

    def _lift(self) -> None:
        if self.is_partial():
            delattr(self.optimizer, _PARTS)

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, rate: float) -> None:
        first = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (group["lr"] / first if first else 1.0)


class OnePassDriver(_OfGroups):
    """Drives AdamW and SGD of this module."""

    def step(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None:
        self.optimizer._step(parameters, sums, divisor)
        self.optimizer._opt_called = True  # torch's schedulers warn without it

    def dry_run(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None:
        self.optimizer._synced().dry_run(parameters, sums, divisor)

    def end_dry_run(self) -> None:
        self.optimizer._synced().end_dry_run()

    def has_state(self) -> bool:
        return bool(self.optimizer._synced().has_state())

    def update_only(self, parameters: list[Tensor]) -> None:
        self._restrict(parameters)
        self.optimizer._synced().update_only(parameters)

    def update_all(self) -> None:
        self._lift()
        self.optimizer._synced().update_all()

    def keeps(self, name: str) -> bool:
        return bool(self.optimizer._synced().keeps(name))

    def state(self) -> Named:
        return list(self.optimizer._synced().state())

    def prepare(self, tensors: dict[str, Tensor]) -> Callable[[], None]:
        return lambda: self.optimizer._synced().load_state(list(tensors.items()))


class TorchDriver(_OfGroups):
    """Drives any optimizer of torch's interface, through `.grad`.

    A fused one divides by `grad_scale` in its own pass; its state is dropped if making it ran out of memory, so that a
    step is whole or not at all. Others allocate between their updates: where memory runs out there, DoesNotFit says so.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._dry_state: dict[int, Any] = {}
        self._hook: Any = None  # drops what load_state_dict() brings for them

    def step(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None:
        self._place(parameters, sums)
        if self._is_fused():
            self._fused_step(divisor)
            return
        try:
            _divide(sums, divisor)
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            text = str(error).split("\n")[0]
        else:
            return
        raise DoesNotFit(
            f"{type(self.optimizer).__name__} ran out of memory between its updates, and some parameters may have been "
            "updated: go on from weights that were saved before, with more memory (mb.AdamW, mb.SGD and torch's fused "
            f"optimizers update all or none); {text}"
        )

    def _fused_step(self, divisor: float) -> None:
        state = self.optimizer.state
        known = set(state)
        # Torch counts the step before it allocates.
        counts = [(one["step"], one["step"].clone()) for one in state.values() if isinstance(one.get("step"), Tensor)]
        self.optimizer.grad_scale = torch.tensor(divisor, dtype=torch.float32)
        try:
            self.optimizer.step()
        except torch.OutOfMemoryError:
            for parameter in [one for one in state if one not in known]:
                del state[parameter]
            for count, before in counts:
                count.copy_(before)
            raise
        finally:
            del self.optimizer.grad_scale

    def _is_fused(self) -> bool:
        name = type(self.optimizer).__module__
        return name.startswith("torch.optim") and all(group.get("fused") for group in self.optimizer.param_groups)

    def _place(self, parameters: Iterable[Tensor], sums: Iterable[Tensor]) -> None:
        for parameter in self.parameters():
            parameter.grad = None
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient

    def dry_run(self, parameters: list[Tensor], sums: list[Tensor], divisor: float) -> None:
        """A step on the gradients in place of the parameters, with a state of its own."""
        _divide(sums, divisor)
        stand_ins = {id(parameter): _stand_in(gradient) for parameter, gradient in zip(parameters, sums, strict=True)}
        groups, state = self.optimizer.param_groups, self.optimizer.state
        before = [group["params"] for group in groups]
        numbers = {id(parameter): i for i, parameter in enumerate(self.parameters())}
        self.optimizer.state = type(state)(state.default_factory) if hasattr(state, "default_factory") else {}
        try:
            for group in groups:
                group["params"] = [stand_ins[id(one)] for one in group["params"] if id(one) in stand_ins]
            for key, stand_in in stand_ins.items():
                if numbers.get(key) in self._dry_state:
                    self.optimizer.state[stand_in] = self._dry_state[numbers[key]]
            self.optimizer.step()
            for key, stand_in in stand_ins.items():
                if stand_in in self.optimizer.state:
                    self._dry_state[numbers[key]] = self.optimizer.state[stand_in]
        finally:
            for group, params in zip(groups, before, strict=True):
                group["params"] = params
            self.optimizer.state = state

    def end_dry_run(self) -> None:
        self._dry_state.clear()

    def has_state(self) -> bool:
        state, own = self.optimizer.state, self.own_numbers()
        updated = [one for i, one in enumerate(self.parameters()) if one.requires_grad and i in own]
        return bool(state) and all(one in state for one in updated)

    def update_only(self, parameters: list[Tensor]) -> None:
        self._restrict(parameters)
        self._drop_others()
        if self._hook is None and hasattr(self.optimizer, "register_load_state_dict_post_hook"):
            self._hook = self.optimizer.register_load_state_dict_post_hook(lambda _: self._drop_others())

    def update_all(self) -> None:
        self._lift()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _drop_others(self) -> None:
        own = self.own_numbers()
        for number, parameter in enumerate(self.parameters()):
            if number not in own:
                self.optimizer.state.pop(parameter, None)

    def keeps(self, name: str) -> bool:
        number = name.partition("/")[0]
        return not number.isdigit() or int(number) in self.own_numbers()

    def state(self) -> Named:
        """Tensors and numbers of the state as tensors, by "NUMBER/NAME"."""
        found: Named = []
        for i, parameter in enumerate(self.parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found.append((f"{i}/{key}", value))
                elif isinstance(value, int | float):
                    found.append((f"{i}/{key}", torch.tensor(value, dtype=torch.float64)))
        return found

    def prepare(self, tensors: dict[str, Tensor]) -> Callable[[], None]:
        parameters = self.parameters()
        state: dict[int, dict[str, Any]] = {}
        own = self.own_numbers()
        for name, value in tensors.items():
            number, _, key = name.partition("/")
            if not number.isdigit() or int(number) >= len(parameters):
                raise BadData(f"the state belongs to another optimizer: it has {name}")
            if int(number) not in own:
                continue
            now = self.optimizer.state.get(parameters[int(number)], {}).get(key)
            is_number = now is not None and not isinstance(now, Tensor)
            state.setdefault(int(number), {})[key] = type(now)(value.item()) if is_number else value

        def commit() -> None:
            self.optimizer.state.clear()
            for number, values in state.items():
                self.optimizer.state[parameters[number]] = values

        return commit


def _divide(sums: list[Tensor], divisor: float) -> None:
    if divisor != 1.0 and sums:
        with torch.no_grad():
            torch._foreach_div_(sums, divisor)


def _stand_in(gradient: Tensor) -> Tensor:
    result = gradient.detach().requires_grad_(True)
    result.grad = gradient
    return result
