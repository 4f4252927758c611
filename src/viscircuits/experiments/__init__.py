"""The paper's experiments, each rerun with one command: ``viscircuits experiment NAME``.

1. `composites`: a network that tells pairs of things, and what it loses without the circuit of one of them.
2. `hierarchy`: how circuits of a tree of concepts overlap, and who is hurt by whom.
3. `typographic`: a network that reads words pasted on photographs; the circuit of text, and the network without it.

Each has a version on rendered images that needs no data. What is finished is kept in the output folder (`kept`), so
that a run that was stopped goes on; the result is a `Report`: tables, figures and a page.

References
----------
Rajaram et al. 2023, arXiv:2404.14349.
"""
