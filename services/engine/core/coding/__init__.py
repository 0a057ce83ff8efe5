"""KV that goes over a link in fewer bytes: the codec's part of a transfer, beside the engine's steps.

Owns the threads that encode (encoder.py) and decode (decoder.py), what one send puts and when (outgoing.py),
and by which profile it goes (choice.py). A receiver's decoder of one lane is kvcache/grant/decoding.py,
codecs are kvcache/codec. Must not know the scheduler or requests. Start at outgoing.py.
"""
