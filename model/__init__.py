"""Train a Transformer: configuration, tokenizers, data, the network, search, training and evaluation.

Torch-free (safe for a server to import): `config`, `errors`, `tokenizer`, `pairs`, `steps`, `reading`, `search`,
`metrics`, `evaluate`, `picture`, `card`.
"""
