"""What stands before a prompt's ids: a conversation as text, and words that were ids before.

Owns the model's chat template (chat_template.py), where a conversation ends that the model is to go on with
(continued.py), control tokens that a client has written, which are text (control.py), and ids of words that
came before (words.py). Must not know the tokenizer, which is made of these, nor answers. Start at
chat_template.py.
"""
