"""Train a Transformer: configuration, tokenizers, data, the network, search, training and evaluation.

Torch-free (safe for a server to import): `config`, `errors`, `vocabulary`, `tokenizer`, `pairs`, `steps`, `reading`,
`options`, `constraints`, `grid`, `search`, `sentence`, `trail`, `hypotheses`, `metrics`, `evaluate`,
`picture`, `card`.
"""
