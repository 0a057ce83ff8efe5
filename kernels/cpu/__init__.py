"""The CPU step: a Llama-like model in C++, whose bits depend on a row and its own context alone.

Owns the kernels (``native/``), how they are built (``build.py``, by ``compiler.py``, kept by ``objects.py``),
their C interface (``library.py``) and a step over them (``step.py``). Must not know models' files, sequences
or messages: arrays come in, arrays go out. Start reading in ``native/step/numerics.h``: what is computed, to
the bit; then ``native/step/step.h``.

    native/   abi.h       the C interface        model.h    what a step works on     pack.h   weights in tiles
              step/       numerics.h: the classes; product...   lanes/   registers of each variant
              tiles/      products and attention by AMX   pairs/   the same by VDPBF16PS
              variants/   a file for each     team/    threads
              door/       engines, weights, batches: what comes in is checked; what this CPU has

No CPU with AMX has run the AMX variant so far. What is known of it comes from CPUs without: its compiled
instructions emulated one by one (``tests/kernels/cpu/tiles``) give the portable variant's bits. Where it is
loaded it is compared with that one first, and left out where a bit differs; its speed is not known.
"""
