"""Options of the commands that take a model, and pairs to try it on."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[Path, typer.Argument(help="Checkpoint (run by PyTorch) or bundle (run by ONNX Runtime).")]
Part = Annotated[Literal["validation", "test"], typer.Option(help="Which part of the model's own data.")]
Source = Annotated[Path | None, typer.Option(help="File of source lines, instead of the model's data.")]
Target = Annotated[Path | None, typer.Option(help="File of target lines.")]
Tsv = Annotated[Path | None, typer.Option(help="TSV file of pairs, instead of the model's data.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace one value of the data section, for example data.folder=PATH."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many sources, drawn with a fixed seed.")]
Precision = Annotated[Literal["fp32", "int8", "fp16"], typer.Option(help="Of a bundle.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime; by default all there are.")]
