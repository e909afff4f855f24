"""The class of an optimized model: a subclass of its own, of the same name, whose `_sample` asks the engine first.

An attribute on the model could not do it: Transformers looks the loop up on the class, and what an attribute holds of
the model would keep it alive.
"""

from __future__ import annotations

import copyreg
import functools
from functools import cache
from typing import Any

from torch import Tensor

from onegpu.decoder.arguments import check_arguments
from onegpu.decoder.driver import Driver
from onegpu.decoder.generate import run_request
from onegpu.decoder.requests import Request, plan_request
from onegpu.decoder.ways import Way
from onegpu.errors import UnsupportedError
from onegpu.loading.saving import plain_class, rebuild_model

__all__ = ["ATTRIBUTE", "driver_of", "generating_class", "is_generating", "original_class"]

ATTRIBUTE = "_onegpu_decoder"


class FastGeneration:
    """What the class of an optimized model gets before its own."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy and sampling: the engine, or Transformers' own loop with the reason kept in the report."""
        driver = driver_of(self)
        request = plan(
            self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs
        )
        if isinstance(request, Request):
            assert driver is not None
            driver.outcomes["fast"] += 1
            return run_request(driver, request)
        if driver is not None:
            driver.outcomes[f"Transformers' loop: {request}"] += 1
        return super()._sample(  # type: ignore[misc]
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )


def plan(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    synced_gpus: bool,
    streamer: Any,
    inputs: dict[str, Any],
) -> Request | str:
    """What the engine is to do, or why it is not its turn."""
    driver = driver_of(model)
    if driver is None:
        return "the model was restored"
    if driver.bypass is not None:
        return driver.bypass
    if input_ids.shape[0] > driver.options.max_batch:
        return f"the batch is larger than max_batch={driver.options.max_batch}"
    way = driver.prepare()
    if not isinstance(way, Way):
        return way
    request = plan_request(
        model, input_ids, processors, criteria, config, way.vocab_size, synced_gpus, streamer, inputs
    )
    if isinstance(request, Request) and request.tokens > way.limit:
        return f"{request.tokens:,} tokens are more than the {way.limit:,} positions of its layers"
    return request


def driver_of(model: Any) -> Driver | None:
    """The driver of an optimized model, None for another."""
    driver = model.__dict__.get(ATTRIBUTE)
    if not isinstance(driver, Driver):
        return None
    driver.attach(model)
    return driver


def generating_class(base: type[Any]) -> Any:
    """The subclass of a model's class that generates through the engine; the same name and everything else."""
    made: Any = base
    return make_class(made)


@cache
def make_class(base: Any) -> Any:
    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        driver = driver_of(self)
        if driver is None:
            return base.generate(self, *args, **kwargs)
        check_arguments(self, args, kwargs)
        before, driver.bypass = driver.bypass, driver.bypass or why_bypass(kwargs)
        try:
            return base.generate(self, *args, **kwargs)
        finally:
            driver.bypass = before

    fields = {"__module__": base.__module__, "__doc__": base.__doc__, "generate": generate}
    made = type(base.__name__, (FastGeneration, base), fields)
    copyreg.pickle(made, reduce_model)
    return made


def why_bypass(kwargs: dict[str, Any]) -> str | None:
    """A reason that is seen best where the call begins."""
    return "a cache was given" if kwargs.get("past_key_values") is not None else None


def is_generating(model: Any) -> bool:
    """Whether a model has a class made here."""
    return FastGeneration in type(model).__bases__


def original_class(cls: type[Any]) -> Any:
    """The class that `generating_class` was given."""
    if FastGeneration not in cls.__bases__:
        raise UnsupportedError(f"{cls.__name__} is no class of an optimized model")
    return cls.__bases__[1]


def reduce_model(model: Any) -> tuple[Any, ...]:
    """Copy and pickle by the class that can be imported, not by those made here and while loading."""
    base = original_class(type(model))
    importable = plain_class(base)
    return rebuild, (importable, importable is not base), model.__dict__


def rebuild(importable: type[Any], is_atomic: bool) -> Any:
    """An empty model of the class it had."""
    model = rebuild_model(importable) if is_atomic else object.__new__(importable)
    model.__class__ = generating_class(type(model))
    return model
