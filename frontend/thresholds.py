"""The thresholds of models as the mesh has them: followed in discovery, told and changed.

All frontends follow one record. What it says of a model replaces the whole configuration of this
frontend for that model; a record that cannot be read any more changes nothing.
"""

from collections.abc import Callable
from typing import Final

from frontend.admission import choose_model
from frontend.busy import Shedder
from frontend.mesh_view import MODELS_MAX, MeshView
from unbroken import discovery, log
from unbroken.discovery import Discovery
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.thresholds import Thresholds, from_proto, to_proto
from unbroken.v1 import admin_service_pb2 as pb
from unbroken.v1 import worker_pb2

CHANGES_TRIED_MAX: Final = 10
"""Times that a change is tried which others overtake."""

_log = log.get_logger(__name__)


class MeshThresholds:
    """What AdminService tells of thresholds, and `run`, which follows what others change."""

    def __init__(self, where: Discovery, mesh: MeshView, shedder: Shedder) -> None:
        self._discovery = where
        self._mesh = mesh
        self._shedder = shedder
        self._record = worker_pb2.ThresholdsRecord()
        self.on_change: list[Callable[[], None]] = []
        """Called when other thresholds hold."""

    async def run(self) -> None:
        """Follow the record, for ever."""
        async for record in self._discovery.watch_setting(discovery.THRESHOLDS):
            self._learn(record)

    def get(self, request: pb.GetThresholdsRequest) -> pb.GetThresholdsResponse:
        """Raises MODEL_NOT_FOUND."""
        own = {entry.model for entry in self._record.models}
        names = sorted(own | set(self._mesh.model_names()))
        if request.model:
            names = [choose_model(request.model, names) or request.model]
        return pb.GetThresholdsResponse(
            models=[self._info(name) for name in names], version=self._record.version
        )

    async def set(self, request: pb.SetThresholdsRequest) -> pb.SetThresholdsResponse:
        """Raises `UnbrokenError`: MODEL_NOT_FOUND, `InvalidField`, VERSION_MISMATCH."""
        own = {entry.model for entry in self._record.models}
        model = choose_model(request.model, sorted(own | set(self._mesh.model_names())))
        if model is None:
            raise InvalidField("model", "the name of a model", request.model)
        wanted: worker_pb2.BusyThresholds | None = None
        if request.HasField("thresholds"):
            from_proto(request.thresholds).check()
            wanted = request.thresholds
        for _ in range(CHANGES_TRIED_MAX):
            self._learn(await self._discovery.setting(discovery.THRESHOLDS))
            known = self._record
            if request.HasField("version") and request.version != known.version:
                raise UnbrokenError(
                    Reason.VERSION_MISMATCH,
                    f"thresholds: expected version {request.version}, got {known.version}",
                    metadata={"version": str(known.version)},
                )
            record = _with(known, model, wanted)
            try:
                await self._discovery.change(discovery.THRESHOLDS, record)
            except UnbrokenError as error:
                if error.reason is not Reason.VERSION_MISMATCH or request.HasField("version"):
                    raise
                continue
            self._learn(record)
            _log.info("thresholds changed", model=model, version=record.version)
            return pb.SetThresholdsResponse(
                thresholds=self._info(model), version=self._record.version
            )
        raise UnbrokenError(
            Reason.VERSION_MISMATCH,
            f"thresholds: others changed them {CHANGES_TRIED_MAX} times meanwhile",
            metadata={"version": str(self._record.version)},
        )

    def _learn(self, record: worker_pb2.ThresholdsRecord) -> None:
        """What holds from now on, unless something newer is known."""
        if record.version <= self._record.version:
            return
        self._record = record
        by_model: dict[str, Thresholds] = {}
        for entry in record.models:
            thresholds = from_proto(entry.thresholds)
            try:
                thresholds.check()
            except InvalidField as error:  # Of a newer frontend, or a hand that slipped.
                _log.warning("thresholds ignored", model=entry.model, error=str(error))
            else:
                by_model[entry.model] = thresholds
        self._shedder.changed(by_model, record.version)
        for callback in self.on_change:
            callback()

    def _info(self, model: str) -> pb.ThresholdsInfo:
        return pb.ThresholdsInfo(
            model=model,
            thresholds=to_proto(self._shedder.thresholds_of(model)),
            is_default=not self._shedder.has_own(model),
        )


def _with(
    record: worker_pb2.ThresholdsRecord, model: str, wanted: worker_pb2.BusyThresholds | None
) -> worker_pb2.ThresholdsRecord:
    """The record after it, in which the model has these, or none."""
    models = {entry.model: entry for entry in record.models}
    models.pop(model, None)
    if wanted is not None:
        models[model] = worker_pb2.ModelThresholds(model=model, thresholds=wanted)
    if len(models) > MODELS_MAX:
        raise InvalidField("model", f"at most {MODELS_MAX} with thresholds of their own", model)
    return worker_pb2.ThresholdsRecord(
        version=record.version + 1, models=[models[name] for name in sorted(models)]
    )
