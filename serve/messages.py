"""Whole requests and answers of `limelight.v1`, put together from the parts in `convert`."""

from dataclasses import replace

from model.metrics import LOWER_IS_BETTER
from model.search import SearchOptions
from model.tokenizer import Token
from serve.bundle import ServedModel
from serve.convert import (
    FAMILY_NUMBERS,
    Asked,
    attention_wanted,
    check_size,
    encode_text,
    encoder_attention,
    hypothesis_message,
    refuse_unknown_fields,
    search_options,
    timings_message,
    token_message,
)
from serve.jobs import Decoded, Ticket
from serve.pb.limelight.v1 import limelight_pb2 as pb

Searched = pb.GenerateRequest | pb.GenerateStreamRequest | pb.GenerateChunkedRequest


def understand(model: ServedModel, request: Searched) -> Asked:
    """What a request to generate asks of a model.

    Raises:
        InvalidRequestError: naming the field at fault.
    """
    options = search_options(request.search, model.manifest.limits.longest_target, model.target)
    return replace(_asked(model, request, options), shortlist=request.search.shortlist)


def understand_pair(model: ServedModel, request: pb.ScoreRequest) -> tuple[Asked, list[Token]]:
    """What a request to score asks of a model, and the target's tokens.

    Raises:
        InvalidRequestError: naming the field at fault.
    """
    longest = model.manifest.limits.longest_target
    penalty = request.length_penalty if request.HasField("length_penalty") else 1.0
    asked = _asked(model, request, SearchOptions(longest=longest, length_penalty=penalty))
    target = encode_text("target", request.target, model.target, longest)
    asked.check_attention(len(target))
    return asked, target


def _asked(model: ServedModel, request: Searched | pb.ScoreRequest, options: SearchOptions) -> Asked:
    refuse_unknown_fields(request)
    manifest = model.manifest
    source = encode_text("source", request.source, model.source, manifest.limits.longest_source)
    wanted = attention_wanted(request.attention, manifest, apart=isinstance(request, pb.GenerateChunkedRequest))
    asked = Asked(source, options, wanted, size=request.ByteSize())
    asked.check_attention()
    return asked


def generate_response(model: ServedModel, asked: Asked, decoded: Decoded, ticket: Ticket) -> pb.GenerateResponse:
    """The answer to a request to generate.

    Raises:
        InvalidRequestError: its attention does not fit a message.
    """
    hypotheses = [hypothesis_message(hypothesis, model.target, asked.wanted) for hypothesis in decoded.hypotheses]
    attention = encoder_attention(asked.wanted, decoded.encoder_attention)
    check_size([*attention, *(one for hypothesis in hypotheses for one in hypothesis.attention)])
    return pb.GenerateResponse(
        model=version_message(model),
        source_tokens=map(token_message, asked.source),
        attention=attention,
        hypotheses=hypotheses,
        timings=timings_message(ticket),
    )


def score_response(model: ServedModel, asked: Asked, target: str, decoded: Decoded, ticket: Ticket) -> pb.ScoreResponse:
    """The answer to a request to score.

    Raises:
        InvalidRequestError: its attention does not fit a message.
    """
    hypothesis = hypothesis_message(decoded.hypotheses[0], model.target, asked.wanted, target)
    attention = encoder_attention(asked.wanted, decoded.encoder_attention)
    check_size([*attention, *hypothesis.attention])
    return pb.ScoreResponse(
        model=version_message(model),
        source_tokens=map(token_message, asked.source),
        attention=attention,
        hypothesis=hypothesis,
        timings=timings_message(ticket),
    )


def version_message(model: ServedModel) -> pb.ModelVersion:
    """Which model answers."""
    return pb.ModelVersion(name=model.manifest.name, version=model.manifest.version)


def summarise_model(model: ServedModel) -> pb.ModelSummary:
    """A model in a list."""
    return pb.ModelSummary(
        model=version_message(model), task=model.manifest.task, precision=model.precision, provider=model.provider
    )


def describe_model(model: ServedModel) -> pb.GetModelResponse:
    """What a model is, on the wire."""
    manifest, summary = model.manifest, summarise_model(model)
    shortlist = manifest.graphs[model.precision].shortlist
    families = [
        pb.FamilyShape(family=FAMILY_NUMBERS[family], layers=shape.layers, heads=shape.heads)
        for family, shape in manifest.attention.items()
    ]
    return pb.GetModelResponse(
        model=summary.model,
        task=summary.task,
        architecture=manifest.architecture,
        longest_source=manifest.limits.longest_source,
        longest_target=manifest.limits.longest_target,
        attention=families,
        alignment=pb.Alignment(**manifest.alignment) if manifest.alignment else None,
        precision=summary.precision,
        provider=summary.provider,
        quality={name: value for name, value in manifest.provenance.training.items() if name in LOWER_IS_BETTER},
        shortlist=0 if shortlist is None else shortlist.size,
    )
