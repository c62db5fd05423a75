"""Names of one model in several spaces: what is called what there, and how it lies.

``spaces`` and ``links`` are the contract; ``translate`` follows links, ``cut``, ``fuse`` and ``stacked`` divide and join
tensors on the way; ``templates`` and ``decoders`` help to write rules, ``recognised`` finds weights by their values.
"""
