"""The command `hf-effml`; nothing here imports torch or transformers before a command needs it."""
