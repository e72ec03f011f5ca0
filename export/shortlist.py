"""A search among a few candidates for each sentence: the graph that finds them, and the decoder step that reads them.

    source_ids ── lexicon ──► scores of all target tokens ── the best ──┬──► memory.candidate_ids
                                                                        └──► memory.candidate_weights
                                                                             (rows of the output projection)

    decoder ── features ── product with candidate_weights ── log-softmax ── the best ── candidate_ids ──► vocabulary ids

The output projection is the largest matrix that a step reads. Candidates belong to their sentence alone, and are as
many for every sentence: so they are memory like any other, and an answer does not depend on who is decoded beside it.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from onnx import ModelProto, NodeProto, helper, numpy_helper, parser
from torch import Tensor, nn

from export.graph_bytes import IR_VERSION, OPSET
from export.graphs import CANDIDATE_IDS, ExampleSizes, Exported, decoder_graph, key_values
from export.lexicon import Lexicon
from export.manifest import BundleError, TensorSpec
from export.onnx_writer import value_info
from export.quantise import lookup
from model.options import UNWRITABLE
from model.steps import Array
from model.transformer import Transformer
from model.vocabulary import END, UNKNOWN

CANDIDATES, SHORTLIST_DECODER, SHORTLIST_GREEDY = "shortlist", "decoder_shortlist", "greedy_shortlist"
"""Names of the graphs."""

CANDIDATE_WEIGHTS = "memory.candidate_weights"

SMALLEST = 8
"""Fewest candidates: fewer leave hardly a choice beside the end and the unknown token."""

FIRST = 100
"""Most of the most frequent tokens that are candidates of every sentence, as in Marian's `--shortlist lexicon 100 100`;
never more than a third of the candidates."""

ALWAYS = 1e6
"""What a frequent token's score is raised by: more than any sum of probabilities over a source."""

FILLER = 1e-6
"""Weight of a token's frequency, which decides where the lexicon says nothing."""

SEARCH = """
candidates () => () {
  found = Gather (lexicon_ids, source_ids)
  probabilities = Gather (lexicon_probabilities, source_ids)
  real = Cast <to: int = 1> (source_mask)
  real_column = Unsqueeze (real, two)
  counted = Mul (probabilities, real_column)
  rows = Reshape (counted, row_of_each)
  found_rows = Reshape (found, row_of_each)
  batch = Shape <start: int = 0, end: int = 1> (source_ids)
  batch_vocabulary = Concat <axis: int = 0> (batch, vocabulary)
  begun = Expand (priority, batch_vocabulary)
  scores = ScatterElements <axis: int = 1, reduction: string = "add"> (begun, found_rows, rows)
  best, candidate_ids = TopK (scores, size)
}
"""
"""The candidates of each sentence, in ONNX's own text."""


class ShortlistDecoderGraph(nn.Module):
    """One step, whose next tokens are among each sentence's candidates."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self,
        target_ids: Int[Tensor, "batch query"],
        positions: Int[Tensor, "batch query"],
        new_visible: Bool[Tensor, "batch query query"],
        past_visible: Bool[Tensor, "batch query past"],
        next_ids: Int[Tensor, "batch query"],
        source_mask: Bool[Tensor, "batch source"],
        memory: list[Tensor],
        candidate_ids: Int[Tensor, "batch candidate"],
        candidate_weights: Float[Tensor, "batch candidate d_model"],
        state: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """As `export.graphs.DecoderGraph`, with log-probabilities [batch query candidate].

        A next token that is no candidate has the log-probability minus infinity.
        """
        decoded = self.decoder(
            target_ids, positions, key_values(memory), source_mask, new_visible, key_values(state), past_visible
        )
        log_probabilities = (decoded.features @ candidate_weights.transpose(1, 2)).log_softmax(-1)
        asked = next_ids[:, :, None] == candidate_ids[:, None, :]
        return (
            log_probabilities,
            log_probabilities.masked_fill(~asked, -torch.inf).amax(-1),
            torch.stack(decoded.cross_attention, 1),
            torch.stack(decoded.decoder_attention, 1),
            *(tensor for pair in decoded.state for tensor in pair),
        )


def check_size(size: int, vocabulary: int) -> None:
    """Refuse so many candidates from a target vocabulary of so many entries.

    Raises:
        BundleError: there are fewer tokens that can be written, or it is too few for any search.
    """
    most = vocabulary - len(UNWRITABLE)
    if most < SMALLEST:
        raise BundleError(f"a target vocabulary of {vocabulary} is too small for a shortlist: export without it")
    if not SMALLEST <= size <= most:
        raise BundleError(
            f"a shortlist of {size} candidates: choose from {SMALLEST} to {most}, all that can be written with a "
            f"target vocabulary of {vocabulary}"
        )


def shortlist_decoder_graph(model: Transformer, size: int, vocabulary: int, sizes: ExampleSizes) -> Exported:
    """The decoder step among candidates with its contract: the plain one's, and the candidates after the memory."""
    plain = decoder_graph(model, vocabulary, sizes)
    place = next(index for index, spec in enumerate(plain.inputs) if spec.role == "state")
    *before, state = plain.example
    first, *others = plain.outputs
    ids = torch.stack([torch.randperm(vocabulary)[:size] for _ in range(sizes.batch)])
    return Exported(
        ShortlistDecoderGraph(model),
        (*before, ids, torch.randn(sizes.batch, size, model.config.d_model), state),
        (*plain.inputs[:place], *candidate_specs(size, model.config.d_model), *plain.inputs[place:]),
        (first.model_copy(update={"axes": (*first.axes[:-1], size)}), *others),
    )


def candidate_specs(size: int, d_model: int) -> tuple[TensorSpec, TensorSpec]:
    """What a decoder remembers of a sentence's candidates."""
    return (
        TensorSpec(name=CANDIDATE_IDS, role="memory", dtype="int64", axes=("batch", size)),
        TensorSpec(name=CANDIDATE_WEIGHTS, role="memory", dtype="float32", axes=("batch", size, d_model)),
    )


def candidates_graph(
    lexicon: Lexicon, projection: Float[np.ndarray, "vocabulary d_model"], encoder: Exported, decoder: Exported
) -> tuple[ModelProto, Exported]:
    """Make the graph that finds the candidates, and its contract, in the precision of the decoder that reads them.

    Args:
        lexicon: what the candidates are chosen by.
        projection: the output projection, in float32.
        encoder: contract of the encoder, whose source it reads.
        decoder: contract of the decoder among candidates.
    """
    outputs = tuple(spec for spec in decoder.inputs if spec.name in (CANDIDATE_IDS, CANDIDATE_WEIGHTS))
    inputs = tuple(spec for spec in encoder.inputs if spec.role in ("source_ids", "source_mask"))
    size = int(outputs[0].axes[1])
    constants = {
        "lexicon_ids": lexicon.ids,
        "lexicon_probabilities": lexicon.probabilities,
        "priority": priority(lexicon, size),
        "size": np.array([size]),
        "vocabulary": np.array([len(projection)]),
        "two": np.array([2]),
        "row_of_each": np.array([0, -1]),
        "projection": projection.astype(outputs[1].dtype),
    }
    nodes = list(parser.parse_graph(SEARCH).node)
    nodes[-1].output[1] = CANDIDATE_IDS
    nodes.append(helper.make_node("Gather", ["projection", CANDIDATE_IDS], [CANDIDATE_WEIGHTS]))
    return _model(nodes, constants, inputs, outputs), encoder._replace(inputs=inputs, outputs=outputs)


def quantise_candidates(model: ModelProto) -> ModelProto:
    """The same graph with an int8 table, of the very levels that the int8 projection has."""
    quantised = ModelProto()
    quantised.CopyFrom(model)
    graph = quantised.graph
    (table,) = (numpy_helper.to_array(one) for one in graph.initializer if one.name == "projection")
    added: dict[str, Array] = {}
    gather = graph.node.pop()
    graph.node.extend(lookup(gather, table, added))
    kept = [one for one in graph.initializer if one.name != "projection"]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(numpy_helper.from_array(value, name) for name, value in added.items())])
    return quantised


def priority(lexicon: Lexicon, size: int) -> Float[np.ndarray, " vocabulary"]:
    """What each target token's score begins with, whatever the source.

    Args:
        lexicon: for the frequencies.
        size: candidates of each sentence.
    """
    values: Array = (FILLER * lexicon.frequencies).astype(np.float32)
    values[lexicon.most_frequent(min(FIRST, size // 3))] += ALWAYS
    values[[END, UNKNOWN]] = np.inf
    values[sorted(UNWRITABLE)] = -np.inf
    return values


def _model(
    nodes: list[NodeProto],
    constants: dict[str, Array],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        CANDIDATES,
        [value_info(spec) for spec in inputs],
        [value_info(spec) for spec in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
