"""Every KV-cache bug of the catalogue that can exist in this engine, each injected alone: mutation testing
of the correctness suite itself (``kvfarm mutants``). Nothing here is imported by the product's own paths.
"""
