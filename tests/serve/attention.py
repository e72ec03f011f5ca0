"""A model's attention, as its manifest has it: what requests are checked against."""

from typing import Any

from export.manifest import FamilyShape, Manifest
from model.steps import Family
from serve.pb.limelight.v1 import limelight_pb2 as pb

ENCODER, DECODER, CROSS = pb.ATTENTION_FAMILY_ENCODER, pb.ATTENTION_FAMILY_DECODER, pb.ATTENTION_FAMILY_CROSS

SHAPES: dict[Family, FamilyShape] = {
    "encoder": FamilyShape(layers=2, heads=4),
    "decoder": FamilyShape(layers=3, heads=4),
    "cross": FamilyShape(layers=3, heads=4),
}


def model_with(attention: dict[Family, FamilyShape]) -> Manifest:
    """A manifest that says this of its attention, and nothing else."""
    values: dict[str, Any] = {"name": "toy", "attention": attention}
    return Manifest.model_construct(**values)


MODEL = model_with(SHAPES)
