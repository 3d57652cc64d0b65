"""Which upstream serves a model: the routing table in force decides, then the patterns of the settings."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from pydantic import SecretStr

from millstream.consumers.control import ControlFollower
from millstream.pipeline.protocols.openai import BadRequest
from millstream.pipeline.proxy.limits import Limiter, limited
from millstream.pipeline.proxy.upstreams.replicas import ReplicaPolicy, Replicas
from millstream.schemas.config.settings import Settings
from millstream.schemas.config.upstreams import Upstream, upstream_of
from millstream.schemas.control import LLM
from millstream.schemas.errors import ConfigError

DEFAULT = "model"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call goes. ``version`` is the routing table's, empty if the table does not name the model."""

    replicas: Replicas
    served_as: str
    version: str
    sampling: Mapping[str, object]  # request fields that apply unless the agent sets them
    limiters: tuple[Limiter, ...]


class Targets:
    """All upstreams of this proxy, and the way to them."""

    def __init__(self, settings: Settings, control: ControlFollower, policy: ReplicaPolicy) -> None:
        """Raises `ConfigError` naming the setting that does not fit."""
        upstreams = settings.upstreams or {DEFAULT: Upstream(urls=(settings.model_url,))}
        self._routes = settings.routes or ({"*": next(iter(upstreams))} if len(upstreams) == 1 else {})
        if not self._routes:
            raise ConfigError("routes: several upstreams need routes that say which models each one serves")
        for pattern, name in self._routes.items():
            if name not in upstreams:
                raise ConfigError(f"routes.{pattern}: there is no upstream {name!r}; known are {', '.join(upstreams)}")
        self.upstreams = {
            name: Replicas(name, upstream, _key(name, upstream), policy) for name, upstream in upstreams.items()
        }
        self._control = control
        self._routed = lru_cache(1024)(partial(upstream_of, routes=self._routes))  # clients choose the names
        self._limiters = {
            name: Limiter(f"upstream {name}", upstream.limits)
            for name, upstream in upstreams.items()
            if limited(upstream.limits)
        }
        limited_routes = {pattern: pattern for pattern in settings.route_limits}
        self._limited = lru_cache(1024)(partial(upstream_of, routes=limited_routes))
        self._route_limiters = {
            pattern: Limiter(f"model {pattern}", limits) for pattern, limits in settings.route_limits.items()
        }

    def close(self) -> None:
        for replicas in self.upstreams.values():
            replicas.close()

    def of(self, model: str, rollout_id: str, resources_id: str) -> Target:
        """Raises `BadRequest` if no upstream serves that model."""
        resources = self._control.pinned(resources_id) if resources_id else None
        items = resources.items.values() if resources is not None else ()
        llm = next((item for item in items if isinstance(item, LLM) and item.model == model), None)
        arm = self._control.routing.choose(model, rollout_id, llm.model_version if llm is not None else "")
        name = arm.upstream if arm is not None else self._routed(model)
        replicas = self.upstreams.get(name or "")
        if replicas is None:
            known = ", ".join([*self._control.routing.models, *self._routes])
            where = f"is at {name!r}, which this proxy does not have" if name else f"is unknown; known are {known}"
            raise BadRequest(f"model {model!r} {where}")
        limits = [self._limiters.get(replicas.name), self._route_limiters.get(self._limited(model) or "")]
        return Target(
            replicas,
            arm.served_as if arm is not None else model.removeprefix(replicas.upstream.strip_prefix),
            arm.version if arm is not None else "",
            llm.sampling if llm is not None else {},
            tuple(limiter for limiter in limits if limiter is not None),
        )

    def names(self) -> list[str]:
        """Models that are known by name, and not by a pattern."""
        return list(
            dict.fromkeys([*self._control.routing.models, *(r for r in self._routes if not set(r) & set("*?["))])
        )

    def routed_to(self, upstream: str, served: str) -> str | None:
        """The name under which clients ask for a model of an upstream; None if that name leads to another upstream."""
        name = self.upstreams[upstream].upstream.strip_prefix + served
        return name if self._routed(name) == upstream else None


def _key(name: str, upstream: Upstream) -> SecretStr:
    try:
        return upstream.key(os.environ)
    except ConfigError as error:
        raise ConfigError(f"upstreams.{name}: {error}") from error
