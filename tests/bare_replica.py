"""EngineReplica without Ray around it."""

from engine.config import EngineConfig
from serve_app.replica import EngineReplica


class BareReplica(EngineReplica.func_or_class):  # type: ignore[attr-defined]
    """One whose end is told to it: Ray Serve awaits `__del__`, which the garbage collector does not."""

    @classmethod
    async def start(cls, config: EngineConfig, model_name: str) -> "BareReplica":
        """As Ray Serve starts one, whose `__init__` is awaited."""
        made = cls.__new__(cls)
        await made.__init__(config, model_name)
        return made

    async def stop(self) -> None:
        """As Ray Serve stops one."""
        await super().__del__()

    def __del__(self) -> None:
        """Nothing is left to do."""
