"""The Open Inference Protocol's model repository: the models that are served, and what is in the model folder. No gRPC.

Clients of the protocol name models; the folder has entries. A name is that of an entry, or else of the model that the
entry's own manifest names.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from export.manifest import BundleError, read_manifest
from model.errors import InvalidRequestError
from serve.admin import checked_name
from serve.errors import NotOfferedError
from serve.folder import Entry, ModelFolder
from serve.models import Serving
from serve.pb.inference import grpc_service_pb2 as pb


def model_index(
    request: pb.RepositoryIndexRequest,
    models: Iterable[Serving],
    entries: Sequence[Entry],
    ready: Callable[[Serving], bool],
) -> pb.RepositoryIndexResponse:
    """What is served; and what is in the folder and is not.

    Args:
        request: with `ready`, asks only for what takes requests.
        models: what is served.
        entries: of the model folder, where the caller is to know of them.
        ready: whether a model takes requests.

    Raises:
        NotOfferedError: another repository is asked for.
    """
    _check_repository(request.repository_name)
    response = pb.RepositoryIndexResponse()
    for serving in models:
        if ready(serving):
            response.models.add(name=serving.name, version=serving.version, state="READY")
        elif not request.ready:
            response.models.add(name=serving.name, version=serving.version, state="UNAVAILABLE", reason="engine failed")
    for entry in [] if request.ready else entries:
        if entry.serving is None:
            response.models.add(name=entry.name, state="UNAVAILABLE", reason=entry.told or "unloaded")
    return response


async def load_model(folder: ModelFolder, request: pb.RepositoryModelLoadRequest) -> None:
    """Load every entry of a name, whether it has changed or not.

    Raises:
        InvalidRequestError: no name, or a parameter: a bundle is served as it is.
        ModelNotFoundError: there is none.
        BundleError: one cannot be loaded.
    """
    _check_repository(request.repository_name)
    _check_parameters(request.parameters, ())
    names = await _entries(folder, request.model_name)
    entries = [await folder.load(name) for name in names]
    if failures := [entry.told for entry in entries if entry.failure]:
        raise BundleError("; ".join(failures))


async def unload_model(folder: ModelFolder, request: pb.RepositoryModelUnloadRequest) -> None:
    """Let every entry of a name take no more calls, until it is loaded again.

    Raises:
        InvalidRequestError: no name, or a parameter other than whether to unload dependents, which no model has.
        ModelNotFoundError: there is none.
    """
    _check_repository(request.repository_name)
    _check_parameters(request.parameters, ("unload_dependents",))
    for name in await _entries(folder, request.model_name):
        await folder.unload(name)


def _check_repository(name: str) -> None:
    if name:
        raise NotOfferedError(f"repository_name: {name!r} is not there, the only repository has no name")


def _check_parameters(parameters: Mapping[str, pb.ModelRepositoryParameter], known: tuple[str, ...]) -> None:
    for name in parameters:
        if name not in known:
            raise InvalidRequestError("parameters", f"{name!r} is not known: a bundle is served as its folder has it")


async def _entries(folder: ModelFolder, name: str) -> list[str]:
    """Names of the entries that are meant; what is no name of a model that is known, the folder looks for itself."""
    checked = checked_name(name, "model_name")
    if any(entry.name == checked for entry in folder.entries):
        return [checked]
    named = await asyncio.to_thread(lambda: [entry.name for entry in folder.entries if _model_of(entry) == checked])
    return named or [checked]


def _model_of(entry: Entry) -> str:
    try:
        return read_manifest(entry.path).name
    except (BundleError, OSError):  # it has none that could be meant
        return ""
