"""Ray in this process: of its interface what `ray_engine` calls, done at once and in order."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class ActorUnavailableError(RayActorError):
    pass


class GetTimeoutError(RayError):
    pass


class Death(BaseException):
    """Raised in an actor, it dies, and so does everyone who is started in its place."""


class Reference:
    """What a call gave, or raised."""

    def __init__(self, call: Any, arguments: Sequence[Any], options: Any) -> None:
        values = [a.value() if isinstance(a, Reference) else a for a in arguments]
        self.found, self.error = None, None
        try:
            self.found = call(*values, **options)
        except Death:
            self.error = RayActorError("The actor died.")

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.found


class Actor:
    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._made, name)
        return SimpleNamespace(remote=lambda *given, **options: Reference(method, given, options))


class Here(ModuleType):
    """The module; `started` are the actors, each with what it was to have of the machine."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.exceptions = SimpleNamespace(
            RayError=RayError,
            RayActorError=RayActorError,
            ActorUnavailableError=ActorUnavailableError,
            GetTimeoutError=GetTimeoutError,
        )
        far = SimpleNamespace(is_connected=lambda: True)  # a client has no head to ask for
        self.util = SimpleNamespace(client=SimpleNamespace(ray=far))
        self.started: list[tuple[Actor, dict[str, Any]]] = []
        self.killed: list[Actor] = []

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": "here", "Resources": self.cluster_resources()}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **share: Any) -> Any:
        def of(kind: type) -> Any:
            return SimpleNamespace(remote=lambda *given: self._start(kind, given, share))

        return of

    def _start(self, kind: type, given: Sequence[Any], share: dict[str, Any]) -> Actor:
        actor = Actor(Reference(kind, given, {}).value())
        self.started.append((actor, share))
        return actor

    def get(self, asked: Any, timeout: float | None = None) -> Any:
        return asked.value() if isinstance(asked, Reference) else [a.value() for a in asked]

    def wait(
        self, references: Sequence[Reference], num_returns: int = 1, timeout: float | None = None
    ) -> Any:
        return references[:num_returns], references[num_returns:]

    def kill(self, actor: Actor) -> None:
        """A process takes its model along; here it is one that other tests have, too."""
        if actor._made.worker is not None:
            actor._made.worker.leave()
        self.killed.append(actor)
