"""The special tokens that every vocabulary begins with. Torch-free, and free of the tokenizers' library."""

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
"""Padding, unknown, begin and end, at ids 0 to 3 of every vocabulary."""
PAD, UNKNOWN, BEGIN, END = range(4)
