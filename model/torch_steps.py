"""A PyTorch Transformer as a step model for `model.search`: the reference that ONNX Runtime's answers are held to."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from model.layers import KeyValue
from model.steps import Memory, Scores, Step
from model.transformer import Decoded, Transformer


class TorchStepModel:
    """Steps of a Transformer, with its keys and values cached; in evaluation mode while a step runs.

    Args:
        transformer: the network, on any device.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._model = transformer
        self._device = next(transformer.parameters()).device

    @torch.inference_mode()
    def encode(
        self, source_ids: Int[np.ndarray, "batch source"], source_mask: Bool[np.ndarray, "batch source"]
    ) -> Memory:
        """See `StepModel.encode`."""
        encoded = self._model.encode(self._tensor(source_ids), self._tensor(source_mask))
        return Memory(encoded.memory, source_mask, torch.stack(encoded.attention, 1).float().cpu().numpy())

    @torch.inference_mode()
    def select(self, memory: Memory, sentences: Int[np.ndarray, " kept"]) -> Memory:
        """See `StepModel.select`."""
        return Memory(
            _take(memory.tensors, self._tensor(sentences)), memory.source_mask[sentences], memory.encoder_attention
        )

    @torch.inference_mode()
    def step(
        self,
        target_ids: Int[np.ndarray, "row new"],
        positions: Int[np.ndarray, "row new"],
        memory: Memory,
        state: Any,
        state_rows: Int[np.ndarray, " row"],
        top: int,
    ) -> Step:
        """See `StepModel.step`."""
        past = None if state is None else _take(state, self._tensor(state_rows))
        decoded = self._decode(target_ids, positions, memory, past)
        values, ids = decoded.logits.log_softmax(-1).topk(min(top, decoded.logits.shape[-1]), -1)
        cross, own = _attention(decoded)
        return Step(values.float().cpu().numpy(), ids.cpu().numpy(), cross, own, decoded.state)

    @torch.inference_mode()
    def score(
        self, target_ids: Int[np.ndarray, "row new"], next_ids: Int[np.ndarray, "row new"], memory: Memory
    ) -> Scores:
        """See `StepModel.score`."""
        positions = np.broadcast_to(np.arange(target_ids.shape[1]), target_ids.shape).copy()
        decoded = self._decode(target_ids, positions, memory, None)
        log_probabilities = decoded.logits.log_softmax(-1).gather(-1, self._tensor(next_ids)[..., None])[..., 0]
        return Scores(log_probabilities.float().cpu().numpy(), *_attention(decoded))

    def _decode(
        self,
        target_ids: Int[np.ndarray, "row new"],
        positions: Int[np.ndarray, "row new"],
        memory: Memory,
        past: list[KeyValue] | None,
    ) -> Decoded:
        decoded: Decoded = self._model.decoder(
            self._tensor(target_ids), self._tensor(positions), memory.tensors, self._tensor(memory.source_mask), past
        )
        return decoded

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _take(pairs: list[KeyValue], rows: Tensor) -> list[KeyValue]:
    return [KeyValue(pair.key.index_select(0, rows), pair.value.index_select(0, rows)) for pair in pairs]


def _attention(decoded: Decoded) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return (
        torch.stack(decoded.cross_attention, 1).float().cpu().numpy(),
        torch.stack(decoded.decoder_attention, 1).float().cpu().numpy(),
    )
