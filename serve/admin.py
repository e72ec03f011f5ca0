"""The `limelight.v1.AdminService`: what is loaded of the model folder."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

from pathlib import PurePosixPath

import grpc

from export.manifest import BundleError
from model.errors import InvalidRequestError
from serve.convert import refuse_unknown_fields
from serve.folder import Entry, ModelFolder
from serve.pb.limelight.v1 import admin_pb2 as pb
from serve.pb.limelight.v1 import admin_pb2_grpc as rpc

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name


class AdminService(rpc.AdminServiceServicer):
    """Loads and unloads.

    Args:
        folder: the model folder.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder

    async def ListEntries(
        self,
        request: pb.ListEntriesRequest,
        context: grpc.aio.ServicerContext[pb.ListEntriesRequest, pb.ListEntriesResponse],
    ) -> pb.ListEntriesResponse:
        """See admin.proto."""
        refuse_unknown_fields(request)
        return pb.ListEntriesResponse(entries=map(entry_message, self._folder.entries))

    async def Reload(
        self, request: pb.ReloadRequest, context: grpc.aio.ServicerContext[pb.ReloadRequest, pb.ReloadResponse]
    ) -> pb.ReloadResponse:
        """See admin.proto."""
        refuse_unknown_fields(request)
        return pb.ReloadResponse(entries=map(entry_message, await self._folder.reload()))

    async def LoadEntry(
        self,
        request: pb.LoadEntryRequest,
        context: grpc.aio.ServicerContext[pb.LoadEntryRequest, pb.LoadEntryResponse],
    ) -> pb.LoadEntryResponse:
        """See admin.proto."""
        refuse_unknown_fields(request)
        entry = await self._folder.load(checked_name(request.name))
        if entry.failure:
            raise BundleError(entry.told)
        return pb.LoadEntryResponse(entry=entry_message(entry))

    async def UnloadEntry(
        self,
        request: pb.UnloadEntryRequest,
        context: grpc.aio.ServicerContext[pb.UnloadEntryRequest, pb.UnloadEntryResponse],
    ) -> pb.UnloadEntryResponse:
        """See admin.proto."""
        refuse_unknown_fields(request)
        return pb.UnloadEntryResponse(entry=entry_message(await self._folder.unload(checked_name(request.name))))


def checked_name(name: str, field: str = "name") -> str:
    """The name of an entry, which no path is.

    Args:
        name: as asked.
        field: of the request, that has it.

    Raises:
        InvalidRequestError: it is empty, or leads elsewhere.
    """
    path = PurePosixPath(name)
    if (
        not path.parts
        or "\0" in name
        or "\\" in name
        or path.is_absolute()
        or ".." in path.parts
        or path.as_posix() != name
    ):
        raise InvalidRequestError(field, "is no name of an entry of the model folder")
    return name


def entry_message(entry: Entry) -> pb.Entry:
    """An entry on the wire."""
    state = pb.ENTRY_STATE_READY
    if entry.unloaded:
        state = pb.ENTRY_STATE_UNLOADED
    elif entry.failure:
        state = pb.ENTRY_STATE_FAILED
    model, version = ("", "") if entry.serving is None else (entry.serving.name, entry.serving.version)
    return pb.Entry(name=entry.name, state=state, model=model, version=version, failure=entry.told)
