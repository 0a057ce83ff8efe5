"""What a model's directory says before a weight is read: its JSON files.

Owns how they are read (model_files.py), whether such a model can be served (families.py), and which tokens
end a sequence (end_tokens.py). Must not import torch. Start at families.py.
"""
